import importlib.util
import io
import os
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from cifar_files import (
    assert_loads,
    png,
    write_imagefolder,
    write_npz,
    write_parquet,
    write_python,
    write_tfds,
)

from cifar_jax.datasets import DATASETS, Dataset, load_dataset, mix_classes
from cifar_jax.datasets.cifar import CIFAR
from cifar_jax.datasets.png import decode_png
from cifar_jax.errors import UserError

every_cifar = pytest.mark.parametrize("name", CIFAR)


@every_cifar
def test_npz(name, small_cifar, tmp_path):
    path = write_npz(tmp_path / f"{name}.npz", small_cifar[name])
    assert_loads(small_cifar[name], tmp_path, name)
    assert_loads(small_cifar[name], path.rename(tmp_path / "any name"), name)
    labels = {"y_train": small_cifar[name][1].astype(np.int64), "y_test": small_cifar[name][3]}
    assert_loads(small_cifar[name], write_npz(tmp_path / "flat.npz", small_cifar[name], **labels), name)
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("cifar-10-batches-py/data_batch_1", b"")
    with pytest.raises(UserError, match=r"archive.zip: a zip archive.*unpack"):
        load_dataset(name, tmp_path / "archive.zip")


@every_cifar
def test_imagefolder(name, small_cifar, tmp_path):
    ordered = write_imagefolder(tmp_path, small_cifar[name], name)
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / DATASETS[name].class_names[0] / ".DS_Store").touch()
    mixed = mix_classes(Dataset(*ordered, DATASETS[name], ""))
    assert_loads((mixed.train_images, mixed.train_labels, mixed.test_images, mixed.test_labels), tmp_path, name)


def test_images_sorted_by_class_are_mixed(small_batches):
    train, test = (np.argsort(labels, kind="stable") for labels in small_batches[1::2])
    images = [small_batches[0][train], small_batches[2][test]]
    labels = [small_batches[1][train], small_batches[3][test]]
    dataset = Dataset(images[0], labels[0], images[1], labels[1], DATASETS["cifar10"], "")
    mixed = mix_classes(dataset)
    assert len(set(mixed.train_labels[-20:])) > 5  # the last ones may be held out
    position = {image.tobytes(): label for image, label in zip(images[0], labels[0])}
    assert [position[image.tobytes()] for image in mixed.train_images] == list(mixed.train_labels)
    assert len({image.tobytes() for image in mixed.test_images}) == 20
    assert mix_classes(mixed).train_images is mixed.train_images
    assert mix_classes(dataset).train_labels.tolist() == mixed.train_labels.tolist()


@every_cifar
def test_parquet_of_hugging_face(name, small_cifar, tmp_path):
    folder = write_parquet(tmp_path, small_cifar[name], name)
    assert_loads(small_cifar[name], tmp_path, name)
    assert_loads(small_cifar[name], folder, name)
    shutil.rmtree(folder)
    write_parquet(tmp_path, small_cifar[name], name, parts=3)
    assert_loads(small_cifar[name], tmp_path, name)
    with pytest.raises(UserError, match="name the folder"):
        load_dataset(name, folder / "train-00001-of-00003.parquet")


@every_cifar
def test_tfds(name, small_cifar, tmp_path):
    folder = write_tfds(tmp_path, small_cifar[name], name)
    for place in (tmp_path, folder.parent, folder)[: 3 if name == "cifar10" else 1]:
        assert_loads(small_cifar[name], place, name)


def test_layouts_that_are_read_only_where_they_are_named(small_batches, tmp_path):
    for root in (Path("."), Path("data")):
        write_imagefolder(root, small_batches)
        write_parquet(root, small_batches)
        write_npz(root / "cifar10.npz", small_batches)
    write_python(Path.home() / ".keras" / "datasets" / "cifar-10-batches-py", small_batches)
    assert ".keras" in assert_loads(small_batches).source


def test_parquet_without_its_package(small_batches, tmp_path, monkeypatch):
    write_parquet(tmp_path, small_batches)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else find_spec(name))
    with pytest.raises(UserError, match="pip install pyarrow"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record"])
def test_tfds_without_its_packages(package, small_batches, tmp_path, monkeypatch):
    write_tfds(tmp_path, small_batches)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(UserError, match="needs tensorflow-datasets and array-record"):
        load_dataset("cifar10", tmp_path)


def test_other_classes_are_named(small_batches, tmp_path):
    write_imagefolder(tmp_path, small_batches)
    (tmp_path / "train" / "automobile").rename(tmp_path / "train" / "car")
    with pytest.raises(UserError, match="automobile is missing"):
        load_dataset("cifar10", tmp_path)
    with pytest.raises(UserError, match=r"apple is missing|airplane is not a class"):
        load_dataset("cifar100", tmp_path)


def test_coarse_labels_are_not_taken_for_fine_ones(small_cifar, tmp_path):
    images, labels, test_images, test_labels = small_cifar["cifar100"]
    write_npz(tmp_path / "cifar100.npz", (images, labels // 5, test_images, test_labels // 5))
    with pytest.raises(UserError, match="0 to 19"):
        load_dataset("cifar100", tmp_path)


def test_incomplete_copies(small_batches, tmp_path):
    images, labels, *test = small_batches
    short = (images[:90], labels[:90], *test)
    write_imagefolder(tmp_path / "a", short)
    write_parquet(tmp_path / "b", short)
    (tmp_path / "c").mkdir()
    write_npz(tmp_path / "c" / "cifar10.npz", short)
    write_tfds(tmp_path / "d", short)
    for folder in "abcd":
        with pytest.raises(UserError, match=r"\b90\b"):
            load_dataset("cifar10", tmp_path / folder)
    long = (np.concatenate([images, images]), np.concatenate([labels, labels]), *test)
    write_parquet(tmp_path / "e", long)
    with pytest.raises(UserError, match="more than 100 records"):
        load_dataset("cifar10", tmp_path / "e")


NO_CIFAR_IMAGE = {
    "grey": np.zeros((32, 32), np.uint8),
    "with an alpha channel": np.zeros((32, 32, 4), np.uint8),
    "of 16 bits": np.zeros((32, 32), np.uint16),
    "larger": np.zeros((33, 32, 3), np.uint8),
}


@pytest.mark.parametrize("what", NO_CIFAR_IMAGE)
def test_png_files_of_another_kind(what):
    with pytest.raises(ValueError, match="not a PNG file of 32×32"):
        decode_png(png(NO_CIFAR_IMAGE[what]))


def test_16_bits_are_not_cut_to_8():
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(32 * (1 + 32 * 6))))
    data = b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")
    with PIL.Image.open(io.BytesIO(data)) as image:
        assert image.mode == "RGB"
    with pytest.raises(ValueError, match="8-bit"):
        decode_png(data)


def test_png_files_as_programs_write_them(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    text = PIL.PngImagePlugin.PngInfo()
    text.add_text("Comment", "made by a test")
    for options in ({}, {"optimize": True}, {"compress_level": 0}, {"pnginfo": text, "dpi": (72, 72)}):
        PIL.Image.fromarray(image).save(tmp_path / "image.png", **options)
        np.testing.assert_array_equal(decode_png((tmp_path / "image.png").read_bytes()), image)


def test_every_changed_byte_of_a_png_file_is_noticed():
    data = png(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for position in range(0, len(data), 7):
        with pytest.raises(ValueError, match="PNG"):
            decode_png(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(ValueError, match="PNG"):
            decode_png(data[:position])


def test_jpeg_files_are_not_taken(small_batches, tmp_path):
    write_imagefolder(tmp_path, small_batches)
    for file in (tmp_path / "train").rglob("*.png"):
        with PIL.Image.open(file) as image:
            image.save(file.with_suffix(".jpg"))
        os.unlink(file)
    with pytest.raises(UserError, match="0 of 100 PNG files"):
        load_dataset("cifar10", tmp_path)
