"""Writes small datasets in the layouts of CIFAR."""

import io
import json
import pickle
import shutil
import tarfile

import numpy as np
import PIL.Image

from cifar_jax.datasets import DATASETS, load_dataset


def planes(images):
    """Converts uint8 [N, 32, 32, 3] to [N, 3072], the red, green and blue planes of the official files."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), 3072)


def files_of(kind, data):
    """Yields the name, images and labels of each official file of a format."""
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
            b"coarse_labels": [int(label) // 5 for label in labels],  # not read by the package
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
    """Writes one of OFFICIAL into `root`. Returns: the folder or archive."""
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


def png(image):
    """Encodes uint8 [H, W, 3] as a PNG file."""
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def splits(data):
    """Returns images and labels by split."""
    return {"train": data[:2], "test": data[2:]}


def write_npz(path, data, **changes):
    """Writes Keras' arrays, with labels uint8 [N, 1]. `changes` replaces arrays."""
    arrays = {}
    for split, (images, labels) in splits(data).items():
        arrays[f"x_{split}"], arrays[f"y_{split}"] = images, labels[:, None].astype(np.uint8)
    np.savez_compressed(path, **{**arrays, **changes})
    return path


def write_imagefolder(root, data, name="cifar10"):
    """Returns the data in the order of the files."""
    ordered = []
    for split, (images, labels) in splits(data).items():
        for label, class_name in enumerate(DATASETS[name].class_names):
            folder = root / split / class_name
            folder.mkdir(parents=True)
            for i in np.flatnonzero(labels == label):
                (folder / f"{i:04}.png").write_bytes(png(images[i]))
        order = np.argsort(labels, kind="stable")
        ordered += [images[order], labels[order]]
    return tuple(ordered)


def write_parquet(root, data, name="cifar10", parts=1, encode=png):
    """Writes Hugging Face's layout. Returns: its folder."""
    import pyarrow
    import pyarrow.parquet

    info = DATASETS[name]
    folder = root / info.hugging_face
    folder.mkdir(parents=True)
    for split, (images, labels) in splits(data).items():
        for part in range(parts):
            rows = range(part * len(labels) // parts, (part + 1) * len(labels) // parts)
            table = pyarrow.table(
                {
                    "img": [{"bytes": encode(images[i]), "path": None} for i in rows],
                    info.hugging_face_label: [int(labels[i]) for i in rows],
                    "coarse_label": [int(labels[i]) // 5 for i in rows],
                }
            )
            pyarrow.parquet.write_table(table, folder / f"{split}-{part:05}-of-{parts:05}.parquet", row_group_size=30)
    return folder


def write_tfds(root, data, name="cifar10", encode=png):
    """Writes a folder like TFDS, with the examples in another order than their ids."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    info = DATASETS[name]
    folder = root / info.tfds
    folder.mkdir(parents=True)
    title = info.tfds.partition("/")[0]
    description = []
    for split, (images, labels) in splits(data).items():
        writer = ArrayRecordWriter(str(folder / f"{title}-{split}.array_record-00000-of-00001"), "group_size:1")
        for i in np.random.default_rng(0).permutation(len(labels)):
            example = tf_example_pb2.Example()
            features = example.features.feature
            features["id"].bytes_list.value.append(f"{split}_{i:05}".encode())
            features["image"].bytes_list.value.append(encode(images[i]))
            features[info.tfds_label].int64_list.value.append(int(labels[i]))
            features["coarse_label"].int64_list.value.append(int(labels[i]) // 5)
            writer.write(example.SerializeToString())
        writer.close()
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        description.append({"name": split, "shardLengths": [str(len(labels))], "filepathTemplate": template})
    content = {"name": title, "version": "3.0.2", "fileFormat": "array_record", "splits": description}
    (folder / "dataset_info.json").write_text(json.dumps(content))
    return folder
