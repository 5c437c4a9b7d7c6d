"""A small CIFAR-10 in every layout in which it comes: the bytes of its files by their names."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image

from cifar_jax.datasets.cifar import CIFAR

INFO = dataclasses.replace(CIFAR["cifar10"], train_size=100, test_size=20)
Data = dict[str, np.ndarray]


def small_data() -> Data:
    """100 and 20 random images with labels 0…9, in the order of these."""
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.arange(100) // 10, np.arange(20) // 2]).astype(np.int32)
    images = rng.integers(0, 256, (120, 32, 32, 3), dtype=np.uint8)
    return {
        "train_images": images[:100],
        "train_labels": labels[:100],
        "test_images": images[100:],
        "test_labels": labels[100:],
    }


def _batches(names: tuple[str, ...], split: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    data = small_data()
    planes = data[f"{split}_images"].transpose(0, 3, 1, 2).reshape(-1, 3072)
    size = len(planes) // len(names)
    for i, name in enumerate(names):
        rows = slice(i * size, (i + 1) * size)
        yield name, planes[rows], data[f"{split}_labels"][rows]


def binary_files() -> dict[str, bytes]:
    files = INFO.binary
    return {
        f"{files.folder}/{name}": np.concatenate([labels[:, None].astype(np.uint8), planes], axis=1).tobytes()
        for split in ("train", "test")
        for name, planes, labels in _batches(getattr(files, split), split)
    }


def python_files() -> dict[str, bytes]:
    files = INFO.python
    return {
        f"{files.folder}/{name}": pickle.dumps({b"labels": labels.tolist(), b"data": planes}, protocol=2)
        for split in ("train", "test")
        for name, planes, labels in _batches(getattr(files, split), split)
    }


def archive() -> dict[str, bytes]:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as tar:
        for name, content in python_files().items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return {INFO.python.archive: file.getvalue()}


def npz() -> dict[str, bytes]:
    data, file = small_data(), io.BytesIO()
    names = {"x_train": "train_images", "y_train": "train_labels", "x_test": "test_images", "y_test": "test_labels"}
    np.savez(file, **{ours: data[name] for ours, name in names.items()})  # type: ignore[arg-type]
    return {"cifar10.npz": file.getvalue()}


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def _examples(split: str) -> Iterator[tuple[int, int, bytes]]:
    """Number, label and PNG file."""
    data = small_data()
    for i, (image, label) in enumerate(zip(data[f"{split}_images"], data[f"{split}_labels"])):
        yield i, int(label), _png(image)


def image_folder() -> dict[str, bytes]:
    return {
        f"{split}/{INFO.class_names[label]}/{i:04}.png": png
        for split in ("train", "test")
        for i, label, png in _examples(split)
    }


def parquet() -> dict[str, bytes]:
    import pyarrow
    import pyarrow.parquet

    files = {}
    for split in ("train", "test"):
        examples, file = list(_examples(split)), io.BytesIO()
        images = [{"bytes": png, "path": None} for _, _, png in examples]
        table = pyarrow.table({"img": images, INFO.hugging_face_label: [label for _, label, _ in examples]})
        pyarrow.parquet.write_table(table, file, row_group_size=30)
        files[f"{INFO.hugging_face}/{split}-00000-of-00001.parquet"] = file.getvalue()
    return files


def tfds() -> dict[str, bytes]:
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    files, description, title = {}, [], INFO.tfds.partition("/")[0]
    for split in ("train", "test"):
        name = f"{title}-{split}.array_record-00000-of-00001"
        with tempfile.TemporaryDirectory() as folder:
            writer = ArrayRecordWriter(f"{folder}/{name}", "group_size:1")
            for i, label, png in _examples(split):
                example = tf_example_pb2.Example()
                features = example.features.feature
                features["id"].bytes_list.value.append(f"{split}_{i:05}".encode())
                features["image"].bytes_list.value.append(png)
                features[INFO.tfds_label].int64_list.value.append(label)
                writer.write(example.SerializeToString())
            writer.close()
            files[f"{INFO.tfds}/{name}"] = Path(folder, name).read_bytes()
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        description.append({"name": split, "shardLengths": [str(i + 1)], "filepathTemplate": template})
    content = {"name": title, "version": "3.0.2", "fileFormat": "array_record", "splits": description}
    return files | {f"{INFO.tfds}/dataset_info.json": json.dumps(content).encode()}


LAYOUTS: dict[str, Callable[[], dict[str, bytes]]] = {
    "binary": binary_files,
    "python": python_files,
    "archive": archive,
    "npz": npz,
}
RECORDS = {"parquet": parquet, "tfds": tfds}  # read by a process each
