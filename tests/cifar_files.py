"""Writes small datasets in the layouts of CIFAR."""

import pickle
import shutil
import tarfile

import numpy as np

from cifar_jax.datasets import DATASETS, load_dataset


def planes(images):
    """uint8 [N, 32, 32, 3] → [N, 3072]: the red, green and blue planes of the official files."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), 3072)


def files_of(kind, data):
    """The name, images and labels of each file of a kind of official files."""
    train_images, train_labels, test_images, test_labels = data
    for names, images, labels in ((kind.train, train_images, train_labels), (kind.test, test_images, test_labels)):
        size = -(-len(labels) // len(names))
        for i, name in enumerate(names):
            yield name, images[i * size : (i + 1) * size], labels[i * size : (i + 1) * size]


def write_python(folder, data, dump=lambda batch: pickle.dumps(batch, protocol=2), name="cifar10"):
    info = DATASETS[name]
    folder.mkdir(parents=True)
    for file, images, labels in files_of(info.python, data):
        batch = {
            b"batch_label": file.encode(),
            b"coarse_labels": [int(label) // 5 for label in labels],  # which nobody reads
            info.label_key.encode(): [int(label) for label in labels],
            b"data": planes(images),
            b"filenames": [b"%d.png" % i for i in range(len(labels))],
        }
        (folder / file).write_bytes(dump(batch))
    return folder


def write_binary(folder, data, name="cifar10"):
    info = DATASETS[name]
    folder.mkdir(parents=True)
    for file, images, labels in files_of(info.binary, data):
        other = [labels[:, None] // 5] * (info.label_bytes - 1)
        records = np.concatenate([*other, labels[:, None], planes(images)], axis=1)
        (folder / file).write_bytes(records.astype(np.uint8).tobytes())
    return folder


def pack(archive, folder):
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(folder, folder.name)
    shutil.rmtree(folder)
    return archive


def official(root, data, layout, name="cifar10"):
    """Writes one of OFFICIAL into `root`, and returns the folder or archive."""
    info = DATASETS[name]
    if layout.startswith("binary"):
        kind, folder = info.binary, write_binary(root / info.binary.folder, data, name)
    else:
        kind, folder = info.python, write_python(root / info.python.folder, data, name=name)
    archive = info.keras_archives[0] if layout == "keras archive" else kind.archive
    return pack(root / archive, folder) if layout.endswith("archive") else folder


OFFICIAL = ["python", "python archive", "keras archive", "binary", "binary archive"]


def assert_loads(data, data_dir=None, name="cifar10"):
    dataset = load_dataset(name, data_dir)
    arrays = (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels)
    for actual, expected in zip(arrays, data):
        np.testing.assert_array_equal(actual, expected)
        assert actual.dtype == expected.dtype
    return dataset
