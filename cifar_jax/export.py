"""Exports a trained network as one file that runs without this package.

python -m cifar_jax.export OUT.onnx | OUT.stablehlo [--pretrained NAME | --workdir RUN | --weights FILE] [--uint8]

The file is loaded again by its own runtime and compared with the network before it gets its name.
"""

from __future__ import annotations

if __name__ == "__main__":
    from cifar_jax.interrupt import exit_on_interrupt

    exit_on_interrupt()

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from cifar_jax.batches import pixel_statistics, scale_images
from cifar_jax.cli import command, parse_arguments
from cifar_jax.datasets import load_dataset
from cifar_jax.environment import describe_environment
from cifar_jax.errors import UserError
from cifar_jax.host import prepare_host
from cifar_jax.io import write_atomically
from cifar_jax.onnx_graph import NOT_INSTALLED, import_onnx, to_onnx
from cifar_jax.sources import Source, SourceFlags, load_source
from cifar_jax.weights.scaling import describe_scaling

SIZE = (32, 32, 3)
PLATFORMS = ("cpu", "cuda", "tpu")
DIFFERENCE = 1e-3  # largest accepted difference of logits, relative to the largest: float32 in another order

Run = Callable[[np.ndarray], np.ndarray]  # images → logits


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Exports a network as an ONNX or StableHLO file that returns logits for any number of images."""

    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """New file to write: .onnx (ONNX Runtime and others) or .stablehlo (jax.export on CPU, GPU or TPU)."""
    source: tyro.conf.OmitArgPrefixes[SourceFlags] = dataclasses.field(default_factory=SourceFlags)
    uint8: bool = False
    """Take uint8 images and scale their pixels in the network. Otherwise the input is scaled pixels, float32."""
    data_dir: str | None = None
    """Folder of the dataset, whose first 1,000 test images are compared; None: compare the embedded digits."""
    json: bool = False
    """Print the result as JSON."""


@dataclasses.dataclass(frozen=True)
class Network:
    """The function to export, logits of images [N, 32, 32, 3] of type `dtype`, and its description for users."""

    function: Callable[[jax.Array], jax.Array]
    dtype: Any
    metadata: dict[str, str]


def create_network(source: Source, uint8: bool) -> Network:
    """Returns a source's network in float32. Args: uint8: the function scales uint8 images itself."""
    mean, std = pixel_statistics(source.config.input_scaling, source.config.dataset)
    metadata = {
        "class_names": json.dumps(source.class_names),
        "input": "uint8 [N, 32, 32, 3]" if uint8 else "(pixel / 255 - mean) / std, float32 [N, 32, 32, 3]",
        "mean": json.dumps(list(mean)),
        "std": json.dumps(list(std)),
    }
    return Network(source.logits, jnp.uint8, metadata) if uint8 else Network(source.apply, jnp.float32, metadata)


def onnx_file(network: Network) -> tuple[bytes, Run]:
    """Returns the ONNX file and a function that runs it in ONNX Runtime. Raises: UserError if a package is missing."""
    onnx = import_onnx()
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(NOT_INSTALLED) from error
    model = to_onnx(network.function, network.dtype, SIZE)
    onnx.helper.set_model_props(model, network.metadata)
    data = model.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return data, lambda images: session.run(["logits"], {"images": images})[0]


def stablehlo_file(network: Network) -> tuple[bytes, Run]:
    """Returns jax.export's file for all PLATFORMS and a function to run it. Raises: UserError without flatbuffers."""
    (count,) = jax.export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((count, *SIZE), network.dtype)
    exported = jax.export.export(jax.jit(network.function), platforms=PLATFORMS)(images)
    try:
        data = bytes(exported.serialize())
    except ImportError as error:  # flatbuffers
        raise UserError(NOT_INSTALLED) from error
    call = jax.jit(jax.export.deserialize(bytearray(data)).call)
    return data, lambda images: np.asarray(call(images))


FORMATS = {".onnx": onnx_file, ".stablehlo": stablehlo_file}


def export(source: Source, output: Path, uint8: bool = False, data_dir: str | None = None) -> dict[str, Any]:
    """Writes a network as a file, see Arguments, and compares it with the network.

    Returns: JSON values: largest difference of logits relative to the largest logit, options, hardware, versions, date.
    Raises: UserError if the file exists, its ending is unknown, a package is missing, or the logits differ.
    """
    if output.suffix not in FORMATS:
        raise UserError(f"{output}: must end in {' or '.join(FORMATS)}; cifar_jax.convert writes weight files")
    if output.exists():
        raise UserError(f"{output}: exists: name another file")
    config, network = source.config, create_network(source, uint8)
    data, run = FORMATS[output.suffix](network)
    dataset = load_dataset(config.dataset, data_dir) if data_dir else load_dataset("digits")  # is on every machine
    images = dataset.test_images[:1000]
    if not uint8:
        images = np.asarray(scale_images(jnp.asarray(images), *pixel_statistics(config.input_scaling, config.dataset)))
    logits = np.asarray(jax.jit(network.function)(images))
    difference = float(np.abs(run(images) - logits).max() / np.abs(logits).max())
    if not difference <= DIFFERENCE:
        raise UserError(f"{output} is not written: its logits differ by {difference:.1e} of the largest one")
    write_atomically(output, data)
    compared = {"data": dataset.source, "num_examples": len(images), "difference": difference}
    options = {"format": output.suffix[1:], "uint8": uint8}
    return {**source.origin, **options, **compared, **describe_environment(jax.local_devices()[:1])}


@command
def main() -> int:
    flags = (tyro.conf.FlagCreatePairsOff,)
    arguments = parse_arguments(Arguments, prog="python -m cifar_jax.export", config=flags)
    prepare_host()
    source = load_source(arguments.source, "float32", default="all_cnn")
    result = export(source, arguments.output, arguments.uint8, arguments.data_dir)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return 0
    compared = (
        f"logits of {result['num_examples']:,} images differ by at most {result['difference']:.1e} of the largest"
    )
    print(f"{arguments.output}: {source.name}, {compared}")
    if not arguments.uint8:
        print(describe_scaling(source.config.input_scaling, source.config.dataset))
    return 0


if __name__ == "__main__":
    sys.exit(main())
