"""Measures a trained network on the test set and writes report.html, its figures and report.json."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from cifar_jax.calibration import held_out_part
from cifar_jax.cli import command, parse_arguments
from cifar_jax.datasets import load_dataset
from cifar_jax.environment import describe_environment
from cifar_jax.errors import UserError
from cifar_jax.host import prepare_host
from cifar_jax.io import made_folder, write_atomically, write_json
from cifar_jax.models import get_model
from cifar_jax.report import page, sections
from cifar_jax.report.analysis import Predictions
from cifar_jax.report.corruptions import find_sets, read_sets
from cifar_jax.report.sections import Contents, Logits
from cifar_jax.sources import Source, SourceFlags, load_source

NOISY_COPIES, NOISE = 16, 0.1  # SmoothGrad's copies of an image, and their noise as a share of the range of pixels


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes a page about a network's accuracy, mistakes, calibration and robustness. The default is all_cnn."""

    out: Path
    """Folder for report.html, report.json and the figures. It is made if it does not exist."""
    source: tyro.conf.OmitArgPrefixes[SourceFlags] = dataclasses.field(default_factory=SourceFlags)
    data_dir: str | None = None
    """Folder of the dataset; None: the standard places (docs/data.md)."""
    disturbed_images: int = 1000
    """Number of test images that are disturbed, in 25 ways; 0: none."""
    sets: Path | None = None
    """Folder with the .npy files of CIFAR-10.1 or CIFAR-10-C, to be tested too."""


def create_functions(source: Source) -> tuple[Logits, Callable[[np.ndarray], np.ndarray]]:
    """Returns (logits, importance), functions of uint8 images [N, 32, 32, 3].

    Importance, float32 [N, 32, 32], is how much each pixel matters by SmoothGrad (Smilkov et al. 2017,
    arXiv:1706.03825): the gradient of the largest logit by the pixels is averaged over noisy copies of the image. Its
    absolute values are summed over the channels.
    """
    gradient = jax.jit(jax.grad(lambda pixels: source.logits(pixels).max(-1).sum()))

    def importance(images: np.ndarray) -> np.ndarray:
        rng, total = np.random.default_rng(0), np.zeros(images.shape, np.float32)
        for _ in range(NOISY_COPIES):
            noisy = images + rng.normal(0, 255 * NOISE, images.shape)
            total += np.asarray(gradient(jnp.asarray(noisy, jnp.float32)))
        return np.abs(total / NOISY_COPIES).sum(-1)

    return source.create_predictor(), importance


def report(arguments: Arguments, source: Source) -> dict[str, Any]:
    """Writes the report's files into the folder --out, which exists. Returns: the content of report.json.

    Raises: UserError if the classes differ from the dataset's, data can't be loaded, or files can't be written.
    """
    config, names, count = source.config, source.class_names, arguments.disturbed_images
    source.check_classes()
    sets = find_sets(arguments.sets) if arguments.sets is not None else []  # first, as the rest takes minutes
    if sets and config.dataset != "cifar10":
        raise UserError(f"--sets has images of CIFAR-10's classes, and {source.name} was trained on {config.dataset}")
    dataset = load_dataset(config.dataset, arguments.data_dir or config.data_dir)
    logits, importance = create_functions(source)
    predict = lambda images, labels: Predictions(logits(images), labels)
    images, labels = dataset.test_images, dataset.test_labels
    tested, held_out, contents = predict(images, labels), None, Contents()
    if not np.isfinite(tested.logits).all():
        raise UserError(f"{source.name}: some logits are not finite: the weights are too large for {config.dtype}")
    if (part := held_out_part(source, dataset)) is not None:
        held_out = predict(part.test_images, part.test_labels)
    kernel = jax.device_get(source.state.eval_params)[get_model(config.model).LAYERS[0]]["kernel"]
    parts = [
        sections.overview(contents, tested),
        sections.classes(contents, tested, names),
        sections.calibration(contents, tested, held_out, source.temperature),
        sections.pictures(contents, tested, images, names),
        sections.importance(contents, tested, images, names, importance),
        sections.first_layer(contents, np.asarray(kernel, np.float32)),
    ]
    if count:
        few = Predictions(tested.logits[:count], labels[:count])
        parts.append(sections.disturbances(contents, few, images[:count], logits))
    if sets:
        parts.append(sections.other_sets(contents, read_sets(sets), logits))
    measured = describe_environment(jax.local_devices()[:1])
    result = {**source.origin, "dataset": config.dataset, **contents.numbers, **measured}
    versions = ", ".join(f"{package} {version}" for package, version in measured["versions"].items())
    note = page.paragraph(f"Measured on {measured['hardware']}; {versions}; {measured['date']}.", soft=True)
    _write(
        arguments.out, page.page(f"{source.name}: {config.model} on {config.dataset}", note, *parts), contents, result
    )
    return result


def _write(folder: Path, text: str, contents: Contents, result: dict[str, Any]) -> None:
    for name, png in contents.figures.items():
        write_atomically(folder / name, png)
    write_json(folder / "report.json", result)
    write_atomically(folder / "report.html", text.encode(errors="replace"))  # paths may not be UTF-8


@command
def main() -> int:
    flags = (tyro.conf.FlagCreatePairsOff,)
    arguments = parse_arguments(Arguments, prog="python -m cifar_jax.report", config=flags)
    if arguments.disturbed_images < 0:
        raise UserError(f"--disturbed-images {arguments.disturbed_images}: must be 0 or more")
    prepare_host()
    source = load_source(arguments.source, default="all_cnn")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(made_folder(arguments.out))  # first, as the rest takes minutes
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise UserError(f"--out {arguments.out}: {error.strerror}: name a writable folder") from error
        result = report(arguments, source)
    print(f"{arguments.out / 'report.html'}: {source.name}, accuracy {result['test_accuracy']:.2%}")
    return 0
