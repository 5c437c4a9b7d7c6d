import sys
from pathlib import Path

import pytest
from cifar_files import assert_loads, write_python

from cifar_jax.datasets import load_dataset
from cifar_jax.errors import UserError


def write_folder(root, file):
    folder = root / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    (folder / file).touch()
    return folder


def test_a_damaged_shard_is_named(cifar10_dir, tmp_path):
    folder = tmp_path / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    for file in (Path(cifar10_dir) / "cifar10" / "3.0.2").iterdir():
        (folder / file.name).symlink_to(file)
    shard = sorted(folder.glob("cifar10-train.array_record-*"))[-1]
    data = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=f"{shard.name}: can't read"):
        load_dataset("cifar10", tmp_path)


def test_by_a_relative_path_or_a_link(cifar10_dir, tmp_path, monkeypatch):
    import tensorflow_datasets

    asked = []
    monkeypatch.setattr(tensorflow_datasets, "data_source", lambda *_, data_dir, **__: asked.append(data_dir))
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "linked").symlink_to(Path(cifar10_dir) / "cifar10" / "3.0.2")
    (tmp_path / "cifar10" / "3.0.2").symlink_to(tmp_path / "linked")
    for folder, data_dir in [(".", "."), ("cifar10", "."), ("cifar10", "3.0.2")]:
        monkeypatch.chdir(tmp_path / folder)
        with pytest.raises(UserError, match="can't read the train split"):
            load_dataset("cifar10", data_dir)
    assert set(asked) == {tmp_path}


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record.python.array_record_module"])
def test_without_its_packages(package, tmp_path, monkeypatch):
    write_folder(tmp_path, "cifar10-train.array_record-00000-of-00001")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"3\.0\.2: reading it needs tensorflow-datasets and array-record"):
        load_dataset("cifar10", tmp_path)


def test_a_tfrecord_copy_is_passed_over_unless_it_is_named(small_batches, tmp_path, monkeypatch, capsys):
    write_folder(tmp_path, "cifar10-train.tfrecord-00000-of-00001")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    write_python(Path("data/cifar-10-batches-py"), small_batches)
    assert_loads(small_batches)
    assert "file_format='array_record'" in capsys.readouterr().err
    with pytest.raises(UserError, match="file_format='array_record'"):
        load_dataset("cifar10", tmp_path)
