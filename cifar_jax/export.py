"""Exports a trained network as a file for another runtime.

python -m cifar_jax.export OUT [--format …] [--pretrained NAME | --workdir RUN | --weights FILE] [--uint8]

The file is loaded again by its own runtime and compared with the network before it gets its name.
"""

from __future__ import annotations

if __name__ == "__main__":
    from cifar_jax.interrupt import exit_on_interrupt

    exit_on_interrupt()

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from cifar_jax.batches import pixel_statistics, scale_images
from cifar_jax.calibration import calibrate
from cifar_jax.cli import command, parse_arguments
from cifar_jax.datasets import load_dataset
from cifar_jax.environment import describe_environment
from cifar_jax.errors import UserError
from cifar_jax.export_formats import FORMATS, choose_format, create_network
from cifar_jax.host import prepare_host
from cifar_jax.io import check_new_file, write_atomically
from cifar_jax.sources import Source, SourceFlags, load_source
from cifar_jax.weights.scaling import describe_scaling

DIFFERENCE = 1e-3  # largest accepted difference of logits, relative to the largest: float32 in another order
NUM_IMAGES, BATCH_SIZE = 1000, 250

FormatName = Literal["onnx", "stablehlo", "safetensors", "pytorch", "keras"]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Exports a network to another runtime, where the file is loaded and compared before it is kept."""

    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """New file to write. It returns logits for any number of images."""
    format: FormatName | None = None
    """None: found by the ending of OUT: .onnx, .stablehlo, .safetensors, .pth or .pt (PyTorch), .keras, .h5 or
    .weights.h5 (Keras)."""
    source: tyro.conf.OmitArgPrefixes[SourceFlags] = dataclasses.field(default_factory=SourceFlags)
    uint8: bool = False
    """Take uint8 images and scale their pixels in the network (onnx, stablehlo). Otherwise the input is scaled pixels,
    float32."""
    data_dir: str | None = None
    """Folder of the dataset, whose first 1,000 test images are compared; None: compare the embedded digits."""
    json: bool = False
    """Print the result as JSON."""


def export(
    source: Source, output: Path, uint8: bool = False, data_dir: str | None = None, format: FormatName | None = None
) -> dict[str, Any]:
    """Writes a network as a file, see Arguments, and compares it with the network.

    Returns: JSON values: largest difference of logits relative to the largest logit, options, hardware, versions, date.
    Raises: UserError if the file exists, its ending fits no format, a package is missing, or the logits differ.
    """
    name, ending = choose_format(output, format)
    if uint8 and FORMATS[name].holds_weights:
        raise UserError(f"--uint8: a {name} file has only weights: scale the pixels yourself, or use onnx or stablehlo")
    check_new_file(output)
    config, network = source.config, create_network(source, uint8)
    data, run = FORMATS[name].create(network, ending)
    dataset = load_dataset(config.dataset, data_dir) if data_dir else load_dataset("digits")  # is on every machine
    images = dataset.test_images[:NUM_IMAGES]
    if not uint8:
        images = np.asarray(scale_images(jnp.asarray(images), *pixel_statistics(config.input_scaling, config.dataset)))
    difference, largest, function = 0.0, 0.0, jax.jit(network.function)
    # Other runtimes have no TensorFloat-32 or bfloat16, as JAX has in products on accelerators.
    precision = "highest" if FORMATS[name].runtime != "jax" else None
    for start in range(0, len(images), BATCH_SIZE):
        batch = images[start : start + BATCH_SIZE]
        with jax.default_matmul_precision(precision):
            logits = np.asarray(function(batch))
        difference = np.maximum(difference, np.abs(run(batch) - logits).max())  # unlike max, it keeps nan
        largest = np.maximum(largest, np.abs(logits).max())
    difference = float(difference / largest)
    if not difference <= DIFFERENCE:
        raise UserError(f"{output} is not written: its logits differ by {difference:.1e} of the largest one")
    package = FORMATS[name].runtime
    runtime = f"{package} {importlib.import_module(package).__version__}"  # also of onnxruntime-gpu and the like
    write_atomically(output, data)
    compared = {"data": dataset.source, "num_examples": len(images), "difference": difference}
    options = {"format": name, "runtime": runtime, "uint8": uint8}
    return {**source.origin, **options, **compared, **describe_environment(jax.local_devices()[:1])}


@command
def main() -> int:
    flags = (tyro.conf.FlagCreatePairsOff,)
    arguments = parse_arguments(Arguments, prog="python -m cifar_jax.export", config=flags)
    prepare_host()
    check_new_file(arguments.output)  # before a temperature is fitted, which takes a while
    source = calibrate(load_source(arguments.source, "float32", default="all_cnn"), arguments.data_dir)
    result = export(source, arguments.output, arguments.uint8, arguments.data_dir, arguments.format)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return 0
    compared = (
        f"logits of {result['num_examples']:,} images differ by at most {result['difference']:.1e} of the largest"
    )
    print(f"{arguments.output}: {source.name}, {compared}")
    if not arguments.uint8:
        print(describe_scaling(source.config.input_scaling, source.config.dataset))
    if source.temperature is not None:
        print(f"calibrated probabilities are softmax(logits / {source.temperature:.4f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
