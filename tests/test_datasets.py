import hashlib
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cifar_files import OFFICIAL, assert_loads, official, write_binary, write_python

from cifar_jax.datasets import DATASETS, get_dataset, hold_out, load_dataset
from cifar_jax.datasets.cifar import CIFAR, Cifar
from cifar_jax.errors import UserError


def test_the_registry_is_known_without_files_and_without_readers():
    program = """
import sys, types
package = types.ModuleType("cifar_jax")  # the real __init__ imports the networks
package.__path__ = [sys.argv[1]]
sys.modules["cifar_jax"] = package
from cifar_jax.datasets import DATASETS
heavy = {"jax", "pooch", "requests", "PIL", "sklearn", "tensorflow_datasets", "pyarrow"} & set(sys.modules)
print(sorted(DATASETS), sorted(heavy))
"""
    package = str(Path(__file__).resolve().parent.parent / "cifar_jax")
    result = subprocess.run([sys.executable, "-c", program, package], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"{sorted(DATASETS)} []"


def test_every_entry_has_its_facts():
    for name, info in DATASETS.items():
        assert info.name == name
        assert len(set(info.class_names)) == info.num_classes
        assert len(info.mean) == len(info.std) == 3
    assert [DATASETS[name].num_classes for name in ("cifar10", "cifar100", "digits")] == [10, 100, 10]
    assert DATASETS["cifar10"].mean == DATASETS["digits"].mean == (0.4914, 0.4822, 0.4465)
    assert DATASETS["cifar10"].std == DATASETS["digits"].std == (0.2470, 0.2435, 0.2616)
    assert DATASETS["cifar100"].mean == (0.5071, 0.4865, 0.4409)
    assert DATASETS["cifar100"].std == (0.2673, 0.2564, 0.2762)
    for name in ("cifar10", "cifar100"):  # the official files have the classes in this order
        assert list(DATASETS[name].class_names) == sorted(DATASETS[name].class_names)


@pytest.mark.parametrize("function", [get_dataset, load_dataset])
def test_an_unknown_dataset(function):
    with pytest.raises(UserError) as error:
        function("mnist")
    assert all(name in str(error.value) for name in ("mnist", *DATASETS))


@pytest.mark.parametrize("name", CIFAR)
@pytest.mark.parametrize("layout", OFFICIAL)
def test_official_layouts(layout, name, small_cifar, tmp_path):
    path = official(tmp_path, small_cifar[name], layout, name)
    dataset = assert_loads(small_cifar[name], tmp_path, name)
    assert (dataset.info, dataset.class_names) == (DATASETS[name], CIFAR[name].class_names)
    assert dataset.source == str(path)
    assert_loads(small_cifar[name], path, name)  # data_dir names the folder or archive itself
    if path.is_file():
        assert_loads(small_cifar[name], path.rename(tmp_path / "any name"), name)


def test_a_dataset_without_other_files_than_pickles(small_cifar, tmp_path, monkeypatch):
    """What an entry leaves out is not looked for, and no message names it."""
    names = ("name", "title", "class_names", "mean", "std", "train_size", "test_size", "python", "label_key", "url")
    fields = {name: getattr(DATASETS["cifar100"], name) for name in names}
    info = Cifar(**fields | {"name": "pickles"}, checksum="sha256:0")
    monkeypatch.setitem(DATASETS, "pickles", info)
    write_python(tmp_path / "data" / "cifar-100-python", small_cifar["cifar100"], name="pickles")
    assert_loads(small_cifar["cifar100"], tmp_path / "data", "pickles")
    (tmp_path / "other" / "cifar-100-binary").mkdir(parents=True)
    with pytest.raises(UserError) as error:
        load_dataset("pickles", tmp_path / "other")
    wanted = str(error.value).partition("none of ")[2].partition("):")[0]
    images = "{train,test}-*.parquet, train/CLASS/*.png and test/CLASS/*.png"
    assert wanted == f"cifar-100-python, cifar-100-python.tar.gz, pickles.npz, {images}"


def test_an_archive_that_was_only_unzipped(small_batches, tmp_path):
    folder = write_python(tmp_path / "cifar-10-batches-py", small_batches)
    archive = shutil.make_archive(str(tmp_path / "cifar"), "tar", tmp_path, folder.name)
    assert_loads(small_batches, archive)


@pytest.mark.parametrize("name", CIFAR)
@pytest.mark.parametrize("place", [".", "data", ".keras/datasets", ".keras/datasets/{}"])
def test_where_torchvision_and_keras_leave_it(place, name, small_cifar):
    folder = Path.home() / place.format(CIFAR[name].keras_folder) / CIFAR[name].python.folder
    write_python(folder, small_cifar[name], name=name)
    assert_loads(small_cifar[name], name=name)


def test_both_in_one_folder(small_cifar, tmp_path):
    for name, data in small_cifar.items():
        official(tmp_path, data, "python", name)
    for name, data in small_cifar.items():
        assert_loads(data, tmp_path, name)


def test_python_2_and_numpy_1_pickles(small_batches, tmp_path):
    """The official files have byte strings of Python 2, and numpy.core instead of numpy._core."""

    def dump(batch):
        opcodes = pickle.dumps({key.decode(): value for key, value in batch.items()}, protocol=2)
        return opcodes.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")

    write_python(tmp_path / "cifar-10-batches-py", small_batches, dump)
    assert_loads(small_batches, tmp_path)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pickles_of_any_protocol_with_binary_strings(protocol, small_batches, tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    write_python(folder, small_batches, lambda batch: pickle.dumps(batch, protocol=protocol))
    assert_loads(small_batches, tmp_path)


def test_files_that_only_share_a_batchs_name_are_passed_over(small_batches):
    for name in ("test_batch", "data_batch_1.bin"):
        Path(name).touch()  # in the current folder, which is not named
    write_python(Path("data/cifar-10-batches-py"), small_batches)
    assert_loads(small_batches)


def test_a_named_folder_is_the_only_one_looked_at(small_batches, tmp_path, run_command):
    from cifar_jax import evaluate

    write_binary(Path("data/cifar-10-batches-bin"), small_batches)
    (tmp_path / "CIFAR-10-C").mkdir()
    np.save(tmp_path / "CIFAR-10-C" / "fog.npy", np.zeros(3))
    arguments = ("--pretrained", "lenet5", "--data-dir", tmp_path / "CIFAR-10-C")
    status, output, error = run_command(evaluate.main, *arguments)
    assert (status, output) == (2, "")
    assert len(error.splitlines()) == 1
    for looked_for in (str(tmp_path / "CIFAR-10-C"), "cifar-10-batches-py", "cifar-10-python.tar.gz", "cifar10/3.0.2"):
        assert looked_for in error


@pytest.mark.parametrize("name", ["nothing", "gs://bucket/cifar"])
def test_a_named_folder_that_is_not_there(name):
    with pytest.raises(UserError, match="does not exist"):
        load_dataset("cifar10", name)


def test_the_home_folders_short_name(small_batches, tmp_path, monkeypatch):
    write_python(Path.home() / "mine" / "cifar-10-batches-py", small_batches)
    assert_loads(small_batches, "~/mine")
    assert not Path("~").exists()
    write_python(Path.home() / "keras" / "datasets" / "cifar-10-batches-py", small_batches)
    monkeypatch.setenv("KERAS_HOME", "~/keras")
    monkeypatch.setenv("TFDS_DATA_DIR", "~/mine")
    monkeypatch.setenv("CIFAR_JAX_CACHE", "~/my cache")
    assert "mine" in assert_loads(small_batches).source
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert "keras" in assert_loads(small_batches).source
    assert len(list((Path.home() / "my cache").iterdir())) == 2
    assert not Path("~").exists()
    with pytest.raises(UserError, match=r"--data-dir ~nobody-of-this-name/x"):
        load_dataset("cifar10", "~nobody-of-this-name/x")


def test_a_tfds_data_dir_that_names_nothing(small_batches, tmp_path, monkeypatch):
    write_python(Path("data/cifar-10-batches-py"), small_batches)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"TFDS_DATA_DIR .*/nothing"):
        load_dataset("cifar10")
    assert_loads(small_batches, "data")  # a named folder is used without the variable
    load_dataset("digits")


@pytest.fixture
def homeless(monkeypatch):
    """HOME is not set and the system has no such user, as in a container with a random user id."""
    import pwd

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "CIFAR_JAX_CACHE", "TFDS_DATA_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError):
        Path.home()


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize("data_dir", [None, "data"])
def test_without_a_home_folder(data_dir, small_batches, capsys):
    write_python(Path("data/cifar-10-batches-py"), small_batches)
    assert_loads(small_batches, data_dir)
    assert "CIFAR_JAX_CACHE" in capsys.readouterr().err
    assert sorted(os.listdir(".")) == ["data", "tfds"]
    with pytest.raises(UserError, match="--data-dir"):
        load_dataset("cifar100")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_that_may_not_be_read(small_batches, tmp_path):
    (Path.home() / ".keras").mkdir(mode=0)
    write_python(tmp_path / "cifar-10-batches-py", small_batches)
    assert_loads(small_batches, tmp_path)
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(UserError, match="Permission denied"):
        load_dataset("cifar10", tmp_path / "closed")


def test_a_missing_batch_is_named(small_batches, tmp_path):
    (write_python(tmp_path / "cifar-10-batches-py", small_batches) / "data_batch_4").unlink()
    with pytest.raises(UserError, match="data_batch_4"):
        load_dataset("cifar10", tmp_path)
    folder = write_python(tmp_path / "b" / "cifar-10-batches-py", small_batches)
    (folder / "test_batch").unlink()
    shutil.make_archive(str(tmp_path / "b" / "cifar-10-python"), "gztar", folder.parent, folder.name)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz: test_batch"):
        load_dataset("cifar10", tmp_path / "b")


def test_an_archive_of_the_other_dataset(small_cifar, tmp_path):
    path = official(tmp_path, small_cifar["cifar100"], "python archive", "cifar100")
    with pytest.raises(UserError) as error:
        load_dataset("cifar10", path)
    assert "cifar-100-python.tar.gz: no file of CIFAR-10" in str(error.value)
    assert not re.search(r"delete|replace", str(error.value))  # the file is intact


def test_wrong_labels_and_shapes_are_named(small_batches, tmp_path):
    train_images, train_labels, *test = small_batches
    write_binary(tmp_path / "a" / "cifar-10-batches-bin", (train_images, train_labels + 5, *test))
    with pytest.raises(UserError, match="a label outside"):
        load_dataset("cifar10", tmp_path / "a")
    folder = write_python(tmp_path / "b" / "cifar-10-batches-py", (train_images, train_labels, *test))
    write_python(tmp_path / "short", (train_images[:50], train_labels[:50], *test))
    shutil.copy(tmp_path / "short" / "data_batch_5", folder)
    with pytest.raises(UserError, match=r"data_batch_5: .*10 images and 10 labels, not 20"):
        load_dataset("cifar10", tmp_path / "b")


def test_digits():
    digits = load_dataset("digits")
    assert digits.train_images.shape == (1437, 32, 32, 3)
    assert digits.test_images.shape == (360, 32, 32, 3)
    assert (digits.train_images.dtype, digits.train_labels.dtype) == (np.uint8, np.int32)
    assert digits.train_images.max() == 255
    np.testing.assert_array_equal(digits.train_images[..., 0], digits.train_images[..., 2])
    np.testing.assert_allclose(np.bincount(digits.test_labels), 36, atol=1)  # stratified
    together = {image.tobytes() for image in digits.train_images} & {image.tobytes() for image in digits.test_images}
    assert not together


def test_hold_out(tiny_dataset):
    held_out = hold_out(tiny_dataset, 20)
    np.testing.assert_array_equal(held_out.train_labels, tiny_dataset.train_labels[:70])
    np.testing.assert_array_equal(held_out.test_images, tiny_dataset.train_images[70:])
    assert hold_out(tiny_dataset, 0) is tiny_dataset
    with pytest.raises(UserError, match="--holdout 90"):
        hold_out(tiny_dataset, 90)


@pytest.mark.slow
@pytest.mark.long
def test_real_cifar10_through_tfds(cifar10_dir):
    cifar10 = load_dataset("cifar10", cifar10_dir)
    assert cifar10.train_images.shape == (50_000, 32, 32, 3)
    np.testing.assert_array_equal(np.bincount(cifar10.train_labels), [5000] * 10)
    np.testing.assert_array_equal(np.bincount(cifar10.test_labels), [1000] * 10)
    # Sorted by TFDS' ids, independent of the shards' order. The released weights were trained in this order.
    checksum = hashlib.sha256(cifar10.train_labels.tobytes()).hexdigest()
    assert checksum == "b07e5384160a1c4227bd86f44485da4098551522af44c9347f9d53790532be24"
    values = np.arange(256) / 255
    for channel, mean, std in zip(range(3), cifar10.mean, cifar10.std):
        share = np.bincount(cifar10.train_images[..., channel].ravel(), minlength=256) / 50_000 / 1024
        np.testing.assert_allclose(share @ values, mean, atol=1e-4)
        np.testing.assert_allclose(np.sqrt(share @ values**2 - (share @ values) ** 2), std, atol=1e-4)
