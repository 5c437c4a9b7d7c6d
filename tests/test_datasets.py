import gzip
import hashlib
import http.server
import io
import os
import pickle
import shutil
import socket
import sys
import tarfile
import threading
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cifar_jax import datasets
from cifar_jax.batches import epoch_order, scale_images, take_batch
from cifar_jax.datasets import load_dataset
from cifar_jax.errors import UserError


def planes(images):
    """uint8 [N, 32, 32, 3] → [N, 3072]: the red, green and blue planes of the official files."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), 3072)


def batches(small_batches):
    train_images, train_labels, test_images, test_labels = small_batches
    for i in range(5):
        yield f"data_batch_{i + 1}", train_images[20 * i : 20 * i + 20], train_labels[20 * i : 20 * i + 20]
    yield "test_batch", test_images, test_labels


def write_python(folder, small_batches, dump=lambda batch: pickle.dumps(batch, protocol=2)):
    folder.mkdir(parents=True)
    for name, images, labels in batches(small_batches):
        batch = {
            b"batch_label": name.encode(),
            b"labels": [int(label) for label in labels],
            b"data": planes(images),
            b"filenames": [b"%d.png" % i for i in range(len(labels))],
        }
        (folder / name).write_bytes(dump(batch))
    return folder


def write_binary(folder, small_batches):
    folder.mkdir(parents=True)
    for name, images, labels in batches(small_batches):
        records = np.concatenate([labels[:, None].astype(np.uint8), planes(images)], axis=1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    return folder


def pack(archive, folder):
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(folder, folder.name)
    shutil.rmtree(folder)
    return archive


def unpacks_to(path, content):
    try:
        return gzip.decompress(path.read_bytes()) == content
    except (OSError, EOFError, zlib.error):
        return False


def assert_loads(small_batches, data_dir=None):
    dataset = load_dataset("cifar10", data_dir)
    arrays = (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels)
    for actual, expected in zip(arrays, small_batches):
        np.testing.assert_array_equal(actual, expected)
        assert actual.dtype == expected.dtype
    return dataset


LAYOUTS = {
    "torchvision": lambda root, data: write_python(root / "cifar-10-batches-py", data),
    "torchvision archive": lambda root, data: pack(
        root / "cifar-10-python.tar.gz", write_python(root / "cifar-10-batches-py", data)
    ),
    "keras 2 archive": lambda root, data: pack(
        root / "cifar-10-batches-py.tar.gz", write_python(root / "cifar-10-batches-py", data)
    ),
    "binary": lambda root, data: write_binary(root / "cifar-10-batches-bin", data),
    "binary archive": lambda root, data: pack(
        root / "cifar-10-binary.tar.gz", write_binary(root / "cifar-10-batches-bin", data)
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_official_layouts(layout, small_batches, tmp_path):
    path = LAYOUTS[layout](tmp_path, small_batches)
    assert_loads(small_batches, tmp_path)
    assert_loads(small_batches, path)  # the folder or archive itself
    if path.is_file():
        assert_loads(small_batches, path.rename(tmp_path / "cifar.tar.gz"))  # of any name


@pytest.mark.parametrize("place", [".", "data", ".keras/datasets", ".keras/datasets/cifar-10-batches-py-target"])
def test_where_torchvision_and_keras_leave_it(place, small_batches):
    write_python(datasets.Path.home() / place / "cifar-10-batches-py", small_batches)
    assert_loads(small_batches)


def test_data_dir_comes_first_and_an_empty_one_is_said(small_batches, tmp_path, capsys):
    write_binary(datasets.Path("data/cifar-10-batches-bin"), small_batches)
    assert "data/cifar-10-batches-bin" in assert_loads(small_batches, tmp_path).source
    assert f"no CIFAR-10 in --data-dir {tmp_path}" in capsys.readouterr().err
    write_python(tmp_path / "cifar-10-batches-py", small_batches)
    assert str(tmp_path) in assert_loads(small_batches, tmp_path).source


def test_an_empty_data_dir_that_is_searched_anyway_is_said_once(small_batches, capsys):
    datasets.Path("data").mkdir()
    write_python(datasets.Path.home() / ".keras/datasets/cifar-10-batches-py", small_batches)
    assert_loads(small_batches, "data")
    assert capsys.readouterr().err.count("no CIFAR-10 in --data-dir data") == 1


def test_decoded_once_then_memory_mapped(small_batches, tmp_path, monkeypatch):
    folder = write_python(tmp_path / "cifar-10-batches-py", small_batches)
    assert_loads(small_batches, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "_read_pickle", None)  # nothing may be decoded again
        assert isinstance(assert_loads(small_batches, tmp_path).train_images, np.memmap)
    # A changed file is decoded again, and so is a damaged cache entry.
    write_binary(tmp_path / "new", small_batches)
    shutil.rmtree(folder)
    write_python(folder, (255 - small_batches[0], *small_batches[1:]))
    assert_loads((255 - small_batches[0], *small_batches[1:]), tmp_path)
    for size in (1000, 0):
        for array in datasets._cache_dir().rglob("train_images.npy"):
            array.write_bytes(array.read_bytes()[:size])
        assert_loads((255 - small_batches[0], *small_batches[1:]), tmp_path)


def test_a_shared_cache_can_be_read_by_others(small_batches, tmp_path):
    write_python(tmp_path / "cifar-10-batches-py", small_batches)
    previous = os.umask(0o022)
    try:
        assert_loads(small_batches, tmp_path)
    finally:
        os.umask(previous)
    (entry,) = datasets._cache_dir().iterdir()
    assert entry.stat().st_mode & 0o777 == 0o755


def test_a_named_cache_needs_no_pooch(small_batches, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    write_python(tmp_path / "cifar-10-batches-py", small_batches)
    assert_loads(small_batches, tmp_path)


def test_another_process_was_faster(small_batches, tmp_path, monkeypatch, capsys):
    rename = datasets.Path.rename

    def late(partial, entry):
        shutil.copytree(partial, entry)
        rename(partial, entry)

    monkeypatch.setattr(datasets.Path, "rename", late)
    write_python(tmp_path / "cifar-10-batches-py", small_batches)
    assert_loads(small_batches, tmp_path)
    assert capsys.readouterr().err == ""


def test_an_unwritable_cache_is_no_obstacle(small_batches, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CIFAR_JAX_CACHE", str(tmp_path / "file"))
    write_python(tmp_path / "cifar-10-batches-py", small_batches)
    assert_loads(small_batches, tmp_path)
    assert "can't cache" in capsys.readouterr().err


@pytest.mark.parametrize("layout", LAYOUTS)
def test_truncated_files_are_named(layout, small_batches, tmp_path):
    path = LAYOUTS[layout](tmp_path, small_batches)
    if path.is_dir():
        path = sorted(path.iterdir())[2]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=path.name):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize("layout", ["torchvision archive", "binary archive"])
def test_every_changed_bit_of_an_archive_is_noticed(layout, small_batches, tmp_path):
    path = LAYOUTS[layout](tmp_path, small_batches)
    data = path.read_bytes()
    noticed = 0
    for position in np.random.default_rng(0).integers(100, len(data) - 8, 40):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        if unpacks_to(path, gzip.decompress(data)):
            continue  # deflate has a few bits without a meaning, as the lengths of codes that nothing uses
        noticed += 1
        with pytest.raises(UserError, match=f"{path.name}: incomplete or corrupt"):
            load_dataset("cifar10", tmp_path)
    assert noticed > 30


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_ARCHIVE_SIZE_LIMIT", 10**6)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(gzip.compress(bytes(2 * 10**6)))
    with pytest.raises(UserError, match="unpacks to more than 1000000 bytes"):
        load_dataset("cifar10", tmp_path)


def test_files_that_only_share_a_batchs_name_are_passed_over(small_batches):
    for name in ("test_batch", "data_batch_1.bin"):
        datasets.Path(name).touch()  # in the current folder, which nobody named
    write_python(datasets.Path("data/cifar-10-batches-py"), small_batches)
    assert_loads(small_batches)


def test_a_missing_batch_is_named(small_batches, tmp_path):
    (write_python(tmp_path / "cifar-10-batches-py", small_batches) / "data_batch_4").unlink()
    with pytest.raises(UserError, match="data_batch_4: No such file"):
        load_dataset("cifar10", tmp_path)
    folder = write_python(tmp_path / "b" / "cifar-10-batches-py", small_batches)
    (folder / "test_batch").unlink()
    pack(tmp_path / "b" / "cifar-10-python.tar.gz", folder)
    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz: lacks test_batch"):
        load_dataset("cifar10", tmp_path / "b")
    (tmp_path / "cifar-100-python").mkdir()
    with pytest.raises(UserError, match=r"cifar-100-python.tar.gz: lacks data_batch_1:"):
        load_dataset("cifar10", pack(tmp_path / "cifar-100-python.tar.gz", tmp_path / "cifar-100-python"))


def test_a_page_saved_under_the_archives_name_is_named(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_text("<html>not found</html>")
    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz: incomplete or corrupt"):
        load_dataset("cifar10", tmp_path)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(gzip.compress(b"not a tar" * 1000))
    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz: incomplete or corrupt"):
        load_dataset("cifar10", tmp_path)


def test_wrong_labels_and_shapes_are_named(small_batches, tmp_path):
    train_images, train_labels, *test = small_batches
    write_binary(tmp_path / "a" / "cifar-10-batches-bin", (train_images, train_labels + 5, *test))
    with pytest.raises(UserError, match="a label outside"):
        load_dataset("cifar10", tmp_path / "a")
    write_python(tmp_path / "b" / "cifar-10-batches-py", (train_images[:90], train_labels[:90], *test))
    with pytest.raises(UserError, match="data_batch_5: holds 10 images"):
        load_dataset("cifar10", tmp_path / "b")


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


EVIL = {
    "os.system": Evil(os.system, "touch pwned"),
    "eval": Evil(eval, "open('pwned', 'w')"),
    "a codec": Evil(__import__("codecs").encode, b"pwned", "rot13"),
    "a numpy loader": Evil(np.load, "pwned"),
    "an object array": {b"data": np.array([[None]], dtype=object), b"labels": [0]},
    "a fake array": {b"data": Evil(bytearray, 10**12), b"labels": [0]},
}


@pytest.mark.parametrize("what", EVIL)
def test_a_hostile_pickle_runs_nothing(what, small_batches, tmp_path):
    folder = write_python(tmp_path / "cifar-10-batches-py", small_batches)
    (folder / "data_batch_3").write_bytes(pickle.dumps(EVIL[what], protocol=2))
    with pytest.raises(UserError, match="data_batch_3: not a batch of CIFAR-10"):
        load_dataset("cifar10", tmp_path)
    assert not os.path.exists("pwned")


def test_a_pickle_of_a_single_pixel(small_batches, tmp_path):
    folder = write_python(tmp_path / "cifar-10-batches-py", small_batches)
    batch = {b"data": np.array(7, np.uint8), b"labels": list(range(20))}
    (folder / "data_batch_3").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(UserError, match="data_batch_3: holds 0 images and 20 labels"):
        load_dataset("cifar10", tmp_path)


def test_a_pickle_can_neither_change_the_reader_nor_fake_pixels():
    load = lambda data: datasets._ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    # BUILD with a slot state: setattr(_codecs.encode, "__name__", "pwned").
    load(b"\x80\x02c_codecs\nencode\nN}X\x08\x00\x00\x00__name__X\x05\x00\x00\x00pwneds\x86b.")
    assert datasets._latin1.__name__ == "_latin1"
    # The number 3 in the place of an array's 3 bytes.
    state = b"(K\x01K\x03\x85cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R\x89%stb."
    array = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R" + state
    np.testing.assert_array_equal(load(array % b"U\x03abc").array, list(b"abc"))
    with pytest.raises(pickle.UnpicklingError, match="not of C-ordered uint8"):
        load(array % b"K\x03")


def test_python_2_and_numpy_1_pickles(small_batches, tmp_path):
    """The official files: byte strings of Python 2, numpy.core instead of numpy._core."""

    def dump(batch):
        opcodes = pickle.dumps({key.decode(): value for key, value in batch.items()}, protocol=2)
        return opcodes.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")

    write_python(tmp_path / "cifar-10-batches-py", small_batches, dump)
    assert_loads(small_batches, tmp_path)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch, small_batches):
    """A local stand-in for the dataset's home: yields the folder it serves."""
    served = tmp_path / "served"
    archive = LAYOUTS["torchvision archive"](served, small_batches)
    handler = lambda *arguments: Quiet(*arguments, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{http_server.server_address[1]}/{archive.name}"
        monkeypatch.setattr(datasets, "ARCHIVE_URL", url)
        import pooch

        monkeypatch.setattr(datasets, "ARCHIVE_SHA256", pooch.file_hash(str(archive)))
        yield served
        http_server.shutdown()
        thread.join()


def test_download_to_data_dir_or_cache(server, small_batches, tmp_path):
    (tmp_path / "mine").mkdir()
    assert_loads(small_batches, tmp_path / "mine")
    assert (tmp_path / "mine" / "cifar-10-python.tar.gz").exists()
    assert_loads(small_batches)
    (server / "cifar-10-python.tar.gz").unlink()  # from now on the network would fail
    assert_loads(small_batches)


def test_a_wrong_download_is_refused_and_leaves_nothing(server, tmp_path):
    (tmp_path / "mine").mkdir()
    (server / "cifar-10-python.tar.gz").write_bytes(b"something else")
    with pytest.raises(UserError, match="can't download CIFAR-10"):
        load_dataset("cifar10", tmp_path / "mine")
    (server / "cifar-10-python.tar.gz").unlink()
    with pytest.raises(UserError, match="the download failed"):
        load_dataset("cifar10", tmp_path / "mine")
    assert not any((tmp_path / "mine").iterdir())


def test_no_network(monkeypatch, run_command):
    from cifar_jax import train

    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed_port = listener.getsockname()[1]
    monkeypatch.setattr(datasets, "ARCHIVE_URL", f"http://127.0.0.1:{closed_port}/cifar-10-python.tar.gz")
    status, _, error = run_command(train.main, "lenet5")
    assert status == 2
    lines = [line for line in error.splitlines() if not line.startswith("Downloading data from")]
    assert len(lines) == 1
    assert "the download failed (" in lines[0]
    assert "--data-dir" in lines[0]


def test_real_cifar10_through_tfds(cifar10):
    assert cifar10.train_images.shape == (50_000, 32, 32, 3)
    np.testing.assert_array_equal(np.bincount(cifar10.train_labels), [5000] * 10)
    np.testing.assert_array_equal(np.bincount(cifar10.test_labels), [1000] * 10)
    # By TFDS' ids, whatever the shards' order: those of this order trained the released weights.
    checksum = hashlib.sha256(cifar10.train_labels.tobytes()).hexdigest()
    assert checksum == "b07e5384160a1c4227bd86f44485da4098551522af44c9347f9d53790532be24"
    values = np.arange(256) / 255
    for channel, mean, std in zip(range(3), datasets.CIFAR10_MEAN, datasets.CIFAR10_STD):
        share = np.bincount(cifar10.train_images[..., channel].ravel(), minlength=256) / 50_000 / 1024
        np.testing.assert_allclose(share @ values, mean, atol=1e-4)
        np.testing.assert_allclose(np.sqrt(share @ values**2 - (share @ values) ** 2), std, atol=1e-4)


def test_a_damaged_tfds_shard_is_named(cifar10_dir, tmp_path):
    folder = tmp_path / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    for file in (datasets.Path(cifar10_dir) / "cifar10" / "3.0.2").iterdir():
        (folder / file.name).symlink_to(file)
    shard = sorted(folder.glob("cifar10-train.array_record-*"))[-1]
    data = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=f"{shard.name}: can't read"):
        load_dataset("cifar10", tmp_path)


def test_tfds_by_a_relative_path_or_a_link(cifar10_dir, tmp_path, monkeypatch):
    import tensorflow_datasets

    asked = []
    monkeypatch.setattr(tensorflow_datasets, "data_source", lambda *_, data_dir, **__: asked.append(data_dir))
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "linked").symlink_to(datasets.Path(cifar10_dir) / "cifar10" / "3.0.2")
    (tmp_path / "cifar10" / "3.0.2").symlink_to(tmp_path / "linked")
    for folder, data_dir in [(".", "."), ("cifar10", "."), ("cifar10", "3.0.2")]:
        monkeypatch.chdir(tmp_path / folder)
        with pytest.raises(UserError, match="can't read the train split"):
            load_dataset("cifar10", data_dir)
    assert set(asked) == {tmp_path}


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record.python.array_record_module"])
def test_a_tfds_folder_without_its_packages(package, tmp_path, monkeypatch):
    folder = tmp_path / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "cifar10-train.array_record-00000-of-00001").touch()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"3\.0\.2: reading it needs tensorflow-datasets and array-record"):
        load_dataset("cifar10", tmp_path)


def test_a_tfrecord_copy_is_passed_over(small_batches, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "cifar10-train.tfrecord-00000-of-00001").touch()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    write_python(datasets.Path("data/cifar-10-batches-py"), small_batches)
    assert_loads(small_batches)
    assert "file_format='array_record'" in capsys.readouterr().err


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


def test_an_unknown_dataset():
    with pytest.raises(UserError, match="choose cifar10 or digits"):
        load_dataset("mnist")


def test_scale_images():
    images = jnp.asarray([0, 255, 51], jnp.uint8).reshape(1, 1, 1, 3)
    scaled = {scaling: scale_images(images, scaling).ravel() for scaling in ("unit", "symmetric", "standardized")}
    np.testing.assert_allclose(scaled["unit"], [0, 1, 0.2], rtol=1e-6)
    np.testing.assert_allclose(scaled["symmetric"], [-1, 1, -0.6], rtol=1e-6)
    expected = [(0 - 0.4914) / 0.2470, (1 - 0.4822) / 0.2435, (0.2 - 0.4465) / 0.2616]
    np.testing.assert_allclose(scaled["standardized"], expected, rtol=1e-6)


def test_epoch_order_is_a_function_of_seed_and_epoch():
    orders = [np.asarray(epoch_order(seed, epoch, 1000)) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    assert (orders[0] != orders[1]).mean() > 0.9
    assert (orders[0] != orders[2]).mean() > 0.9
    np.testing.assert_array_equal(epoch_order(0, 1, 1000), orders[1])


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_batches_cover_the_order_once_whatever_the_number_of_devices(num_devices):
    """The reference recipe's shape in small: 130 images in batches of 64, the last of 2."""
    images = jnp.arange(130, dtype=jnp.uint8).reshape(130, 1, 1, 1)
    order, size = epoch_order(0, 0, 130), 64 // num_devices
    seen = []
    for step in range(3):
        slices = [
            take_batch(images, jnp.arange(130), order, jnp.int32(step * 64 + device * size), size)
            for device in range(num_devices)
        ]
        batch = jax.tree.map(lambda *parts: np.concatenate(parts), *slices)
        assert batch["image"].shape == (64, 1, 1, 1)
        np.testing.assert_array_equal(batch["image"].ravel(), batch["label"])
        np.testing.assert_array_equal(batch["index"], batch["label"])
        assert batch["mask"].sum() == (64 if step < 2 else 2)
        seen.append(batch["label"][batch["mask"] == 1])
    np.testing.assert_array_equal(np.concatenate(seen), order)


def test_the_restricted_unpickler_still_reads_what_numpy_writes():
    data = pickle.dumps({"data": np.arange(6, dtype=np.uint8).reshape(2, 3), "labels": [1, 2]}, protocol=2)
    batch = datasets._ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    np.testing.assert_array_equal(batch["data"].array, [[0, 1, 2], [3, 4, 5]])
