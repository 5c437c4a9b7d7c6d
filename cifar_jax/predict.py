"""Classifies image files: python -m cifar_jax.predict IMAGE … [--pretrained NAME | --workdir RUN | --weights FILE]"""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import PIL.Image
import PIL.ImageOps
import tyro

from cifar_jax.batches import scale_images
from cifar_jax.cli import command, parse_arguments
from cifar_jax.datasets import get_dataset
from cifar_jax.errors import UserError
from cifar_jax.evaluate import WeightFileFlags, load_file, load_run
from cifar_jax.host import prepare_cpu
from cifar_jax.pretrained import pretrained_path

DEFAULT = "all_cnn"  # the most accurate of the released networks
BATCH_SIZE = 256


def load_image(path: Path) -> np.ndarray:
    """An image file as the networks take it: upright, on white, its middle square in 32×32 pixels, uint8 [32, 32, 3].

    Raises: UserError if it is not an image that Pillow can read; PermissionError.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        with warnings.catch_warnings(action="ignore"), PIL.Image.open(path) as image:  # large ones are warned of
            if image.mode.startswith(("I", "F")):  # convert would cut them off at 255
                raise ValueError("more than 8 bits a pixel")
            upright = PIL.ImageOps.exif_transpose(image).convert("RGBA")
    except PermissionError:
        raise
    except PIL.UnidentifiedImageError as error:
        raise UserError(f"{path}: not an image that Pillow can read: convert it to PNG or JPEG") from error
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{path}: can't be read ({error}): convert it to PNG or JPEG") from error
    opaque = PIL.Image.alpha_composite(PIL.Image.new("RGBA", upright.size, "white"), upright)
    return np.asarray(PIL.ImageOps.fit(opaque.convert("RGB"), (32, 32)))


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Classifies image files: the middle square of each, at 32×32 pixels. The probabilities are not calibrated."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE …")]
    """Files of any kind that Pillow reads."""
    pretrained: str | None = None
    """A released network, by the name of its model card; None: all_cnn, unless a run or a file is named."""
    workdir: Path | None = None
    """A run's folder: its latest checkpoint."""
    weights: Path | None = None
    """A weight file, trained on CIFAR-10: see cifar_jax.evaluate."""
    weight_file: tyro.conf.OmitArgPrefixes[WeightFileFlags] = dataclasses.field(default_factory=WeightFileFlags)
    top: int = 3
    """How many classes to tell of each image."""
    json: bool = False
    """Print JSON."""


@command
def main() -> int:
    flags = (tyro.conf.FlagCreatePairsOff,)
    arguments = parse_arguments(Arguments, prog="python -m cifar_jax.predict", config=flags)
    prepare_cpu()
    if not arguments.images:
        raise UserError("name one image file or more")
    if [arguments.pretrained, arguments.workdir, arguments.weights].count(None) < 2:
        raise UserError("name only one of --pretrained, --workdir and --weights")
    if arguments.weights is None:
        arguments.weight_file.refuse(without="--weights")
    if not 1 <= arguments.top <= 10:
        raise UserError(f"--top {arguments.top}: there are 10 classes")
    images = np.stack([load_image(path) for path in arguments.images])
    if arguments.workdir is not None:
        config, state, _ = load_run(arguments.workdir, "latest")
    else:
        path = arguments.weights or pretrained_path(arguments.pretrained or DEFAULT)
        weights = arguments.weight_file.load(path)
        config, state = load_file(weights, "float32")

    @jax.jit
    def classify(images: jax.Array) -> jax.Array:
        logits = state.apply_fn({"params": state.eval_params}, scale_images(images, config.input_scaling))
        return jax.nn.softmax(logits)

    parts = [classify(images[start : start + BATCH_SIZE]) for start in range(0, len(images), BATCH_SIZE)]
    probabilities = np.concatenate(parts)
    if not np.isfinite(probabilities).all():
        raise UserError("some probabilities are not finite: the weights are too large")
    names, results = get_dataset(config.dataset).class_names, []
    for path, row in zip(arguments.images, probabilities.tolist()):
        ranked = sorted(zip(names, row), key=lambda pair: -pair[1])[: arguments.top]
        results.append({"image": str(path), "probabilities": dict(ranked)})
        if not arguments.json:
            print(f"{path}: {', '.join(f'{name} {probability:.1%}' for name, probability in ranked)}")
    if arguments.json:
        print(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
