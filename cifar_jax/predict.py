"""Classifies image files: python -m cifar_jax.predict IMAGE … [--pretrained NAME | --workdir RUN | --weights FILE]"""

from __future__ import annotations

if __name__ == "__main__":
    from cifar_jax.interrupt import exit_on_interrupt

    exit_on_interrupt()

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

from cifar_jax.batches import pixel_statistics, scale_images
from cifar_jax.cli import command, parse_arguments
from cifar_jax.errors import UserError
from cifar_jax.host import prepare_host
from cifar_jax.sources import Source, SourceFlags, load_source

DEFAULT = "all_cnn"  # the most accurate released network
BATCH_SIZE = 256


def load_image(path: Path) -> np.ndarray:
    """Reads an image file for the networks: uint8 [32, 32, 3].

    EXIF rotation is applied, transparency becomes white, and the central square is resized to 32×32 pixels.
    Raises: UserError if Pillow can't read the file; PermissionError.
    """
    path = path.expanduser()
    if path.is_dir():
        raise UserError(f"{path}: is a folder: name the image files in it")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with warnings.catch_warnings(action="ignore"), PIL.Image.open(path) as image:  # Pillow warns of large images
            if image.mode.startswith(("I", "F")):  # convert would clip them at 255
                raise ValueError("more than 8 bits per channel")
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
    """Classifies image files by their central square, at 32×32 pixels. The probabilities are not calibrated."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE …")]
    """Image files in any format that Pillow reads."""
    source: tyro.conf.OmitArgPrefixes[SourceFlags] = dataclasses.field(default_factory=SourceFlags)
    top: int = 3
    """Number of most probable classes to print for each image."""
    json: bool = False
    """Print the result as JSON."""


def predict(source: Source, images: np.ndarray) -> np.ndarray:
    """Returns class probabilities, float32 [N, num_classes]. Args: images: uint8 [N, 32, 32, 3].

    Raises: UserError if they are not finite.
    """
    state, statistics = source.state, pixel_statistics(source.config.input_scaling, source.config.dataset)

    @jax.jit
    def classify(images: jax.Array) -> jax.Array:
        return jax.nn.softmax(state.apply_fn({"params": state.eval_params}, scale_images(images, *statistics)))

    parts = [classify(images[start : start + BATCH_SIZE]) for start in range(0, len(images), BATCH_SIZE)]
    probabilities = np.concatenate(parts)
    if not np.isfinite(probabilities).all():
        raise UserError(f"{source.name}: some probabilities are not finite: the weights are too large")
    return probabilities


@command
def main() -> int:
    flags = (tyro.conf.FlagCreatePairsOff,)
    arguments = parse_arguments(Arguments, prog="python -m cifar_jax.predict", config=flags)
    prepare_host()
    if not arguments.images:
        raise UserError("no image given: name one or more image files")
    if arguments.top < 1:
        raise UserError(f"--top {arguments.top}: must be 1 or more")
    images = np.stack([load_image(path) for path in arguments.images])
    source = load_source(arguments.source, default=DEFAULT)
    names, results = source.class_names, []
    if arguments.top > len(names):
        raise UserError(f"--top {arguments.top}: there are only {len(names)} classes")
    for path, row in zip(arguments.images, predict(source, images).tolist()):
        ranked = sorted(zip(names, row), key=lambda pair: -pair[1])[: arguments.top]
        results.append({"image": str(path), "probabilities": dict(ranked)})
        if not arguments.json:
            print(f"{path}: {', '.join(f'{name} {probability:.1%}' for name, probability in ranked)}")
    if arguments.json:
        print(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
