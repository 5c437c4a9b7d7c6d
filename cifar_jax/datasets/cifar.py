"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): a table of everything in which they differ."""

from __future__ import annotations

import dataclasses
import os

from cifar_jax.datasets.info import Dataset, DatasetInfo

HOST = "https://www.cs.toronto.edu/~kriz"
PIXELS = 3 * 32 * 32  # bytes of an image: the red, green and blue planes
IMAGE_SHAPE = (32, 32, 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfficialFiles:
    """An official archive, its folder, and each split's files in order. All files of a split have the same size."""

    archive: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return self.train + self.test


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cifar(DatasetInfo):
    """A dataset in CIFAR's formats, with its file names. A field that is left out means that there is no such format.

    A .npz file and folders of PNG files are found by the names of the dataset and of its classes.
    """

    train_size: int
    test_size: int
    python: OfficialFiles  # pickles of {'data': uint8 [N, 3072], label_key: N integers}
    label_key: str
    url: str  # of the Python archive
    checksum: str
    binary: OfficialFiles | None = None  # records of label_bytes labels, the last of which counts, and the pixels
    label_bytes: int = 1
    keras_archives: tuple[str, ...] = ()  # what Keras calls the Python archive
    keras_folder: str = ""  # where Keras unpacks it
    tfds: str = ""  # TensorFlow Datasets' name and version, as cifar10/3.0.2
    tfds_label: str = "label"
    hugging_face: str = ""  # the folder of the parquet files
    hugging_face_label: str = "label"

    @property
    def official(self) -> tuple[OfficialFiles, ...]:
        """The official files of either kind, Python's first."""
        return (self.python,) if self.binary is None else (self.python, self.binary)

    def size(self, split: str) -> int:
        return {"train": self.train_size, "test": self.test_size}[split]

    @property
    def advice(self) -> str:
        """Advice for a damaged file."""
        return f"replace it with an intact copy, for instance from {self.url}"

    def load(self, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
        from cifar_jax.datasets.files import load_files  # imported here because it imports this module

        return load_files(self, data_dir)


_CIFAR10 = Cifar(
    name="cifar10",
    title="CIFAR-10",
    class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    train_size=50_000,
    test_size=10_000,
    python=OfficialFiles(
        archive="cifar-10-python.tar.gz",
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test=("test_batch",),
    ),
    label_key="labels",
    binary=OfficialFiles(
        archive="cifar-10-binary.tar.gz",
        folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test=("test_batch.bin",),
    ),
    label_bytes=1,
    url=f"{HOST}/cifar-10-python.tar.gz",
    checksum="sha256:6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    keras_archives=("cifar-10-batches-py.tar.gz", "cifar-10-batches-py-target_archive"),
    keras_folder="cifar-10-batches-py-target",
    tfds="cifar10/3.0.2",
    tfds_label="label",
    hugging_face="plain_text",
    hugging_face_label="label",
)

_FINE_LABELS = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""

_CIFAR100 = Cifar(
    name="cifar100",
    title="CIFAR-100",
    class_names=tuple(_FINE_LABELS.split()),
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    train_size=50_000,
    test_size=10_000,
    python=OfficialFiles(
        archive="cifar-100-python.tar.gz", folder="cifar-100-python", train=("train",), test=("test",)
    ),
    label_key="fine_labels",
    binary=OfficialFiles(
        archive="cifar-100-binary.tar.gz", folder="cifar-100-binary", train=("train.bin",), test=("test.bin",)
    ),
    label_bytes=2,  # coarse, fine
    url=f"{HOST}/cifar-100-python.tar.gz",
    checksum="sha256:85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    keras_archives=("cifar-100-python-target_archive",),
    keras_folder="cifar-100-python-target",
    tfds="cifar100/3.0.2",
    tfds_label="label",
    hugging_face="cifar100",
    hugging_face_label="fine_label",
)

CIFAR = {info.name: info for info in (_CIFAR10, _CIFAR100)}
