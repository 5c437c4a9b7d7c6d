"""Classifies image files: python -m cifar_jax.predict IMAGE … [--pretrained NAME | --workdir RUN | --weights FILE]

IMAGE is a file, a folder, a pattern such as 'photos/*.jpg', or - for one image on standard input.
"""

from __future__ import annotations

if __name__ == "__main__":
    from cifar_jax.interrupt import exit_on_interrupt

    exit_on_interrupt()

import csv
import dataclasses
import io
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from scipy.special import softmax
from tqdm import tqdm

from cifar_jax.cli import command, parse_arguments
from cifar_jax.console import say
from cifar_jax.errors import UserError
from cifar_jax.host import prepare_host
from cifar_jax.image_files import find_images, load_image
from cifar_jax.sources import Source, SourceFlags, load_source

DEFAULT = "all_cnn"  # the most accurate released network
BATCH_SIZE = 256

Classify = Callable[[np.ndarray], np.ndarray]  # uint8 [N, 32, 32, 3] → probabilities, float32 [N, num_classes]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Classifies image files by their central square, at 32×32 pixels.

    The probabilities are calibrated if the weight file stores a temperature. Of the released networks, only
    lenet5_reference has one.

    Files that can't be read are listed at the end. The exit status is then 1, or 2 if no file could be read.
    """

    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE …")]
    """Image files in any format that Pillow reads, folders of such files, patterns, or - for standard input."""
    source: tyro.conf.OmitArgPrefixes[SourceFlags] = dataclasses.field(default_factory=SourceFlags)
    no_calibration: bool = False
    """Ignore the temperature that a weight file stores."""
    top: int = 3
    """Number of most probable classes to print for each image."""
    json: bool = False
    """Print the result as JSON."""
    csv: bool = False
    """Print the result as CSV: image, then class and probability of the most probable, the second, …"""


def create_classifier(source: Source) -> Classify:
    """Returns classify(images) → class probabilities: uint8 [N, 32, 32, 3] → float32 [N, num_classes].

    classify raises UserError for images of another type or shape, or if a probability is not finite.
    """
    temperature, logits = source.temperature or 1.0, source.create_predictor()

    def classify(images: np.ndarray) -> np.ndarray:
        result = softmax(logits(images) / temperature, axis=-1).astype(np.float32)
        if not np.isfinite(result).all():
            raise UserError(f"{source.name}: some probabilities are not finite: the weights are too large")
        return result

    return classify


def predict(source: Source, images: np.ndarray) -> np.ndarray:
    """Returns class probabilities, float32 [N, num_classes]. Args: images: uint8 [N, 32, 32, 3].

    Raises: UserError for images of another type or shape, or if a probability is not finite.
    """
    return create_classifier(source)(images)


def classify_files(paths: list[Path], classify: Classify, failures: list[str]) -> Iterator[tuple[Path, list[float]]]:
    """Yields (file, class probabilities) batch by batch. Appends a line to `failures` for each unreadable file."""
    hidden = None if sys.stderr and len(paths) > BATCH_SIZE else True  # None: unless it is a terminal
    with tqdm(total=len(paths), unit="image", leave=False, disable=hidden) as bar:
        for start in range(0, len(paths), BATCH_SIZE):
            batch, read, images = paths[start : start + BATCH_SIZE], [], []
            for path in batch:
                try:
                    images.append(load_image(path))
                    read.append(path)
                except UserError as error:
                    failures.append(str(error))
            if images:
                bar.clear()  # the caller prints what it gets
                yield from zip(read, classify(np.stack(images)).tolist())
            bar.update(len(batch))


@command
def main() -> int:
    flags = (tyro.conf.FlagCreatePairsOff,)
    arguments = parse_arguments(Arguments, prog="python -m cifar_jax.predict", config=flags)
    prepare_host()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of large or odd images
    if not arguments.images:
        raise UserError("no image given: name one or more image files")
    if arguments.top < 1:
        raise UserError(f"--top {arguments.top}: must be 1 or more")
    if arguments.json and arguments.csv:
        raise UserError("--csv: can't be combined with --json")
    paths, failures = find_images(arguments.images)
    source = load_source(arguments.source, default=DEFAULT)
    if arguments.no_calibration:
        source = dataclasses.replace(source, temperature=None)
    names = source.class_names
    if arguments.top > len(names):
        raise UserError(f"--top {arguments.top}: there are only {len(names)} classes")
    results, table = [], csv.writer(sys.stdout or io.StringIO(), lineterminator="\n")
    classified = 0
    for path, row in classify_files(paths, create_classifier(source), failures):
        classified += 1
        ranked = sorted(zip(names, row), key=lambda pair: -pair[1])[: arguments.top]
        if arguments.json:
            results.append({"image": str(path), "probabilities": dict(ranked)})
        elif arguments.csv:
            table.writerow([path, *itertools.chain(*((name, f"{share:.6f}") for name, share in ranked))])
        else:
            print(f"{path}: {', '.join(f'{name} {share:.1%}' for name, share in ranked)}")
    if arguments.json and classified:
        print(json.dumps(results, indent=2))
    for line in failures:
        say(f"error: {' '.join(line.split())}", error=True)
    return (1 if classified else 2) if failures else 0


if __name__ == "__main__":
    sys.exit(main())
