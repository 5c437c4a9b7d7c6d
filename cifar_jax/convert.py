"""Converts the weights of a file or a run to another framework's file format.

python -m cifar_jax.convert IN OUT [--architecture JSON] [--model …] [--input-scaling …] [--checkpoint best|latest]

The content of IN and the name of OUT decide their formats: see weights/files.py.
"""

from __future__ import annotations

if __name__ == "__main__":
    from cifar_jax.interrupt import exit_on_interrupt

    exit_on_interrupt()

import contextlib
import dataclasses
import io
import sys
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from cifar_jax.calibration import calibrate
from cifar_jax.cli import command, parse_arguments
from cifar_jax.errors import UserError
from cifar_jax.host import check_devices
from cifar_jax.sources import SourceFlags, WeightFileFlags, load_source
from cifar_jax.weights.files import check_weight_file, is_saved_model, load_weights, save_weights
from cifar_jax.weights.scaling import describe_scaling


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Converts weights between .safetensors, .pth (PyTorch) and .h5, .weights.h5, .keras (Keras)."""

    input: Annotated[Path, tyro.conf.arg(metavar="IN")]
    """Weight file or run folder to read."""
    output: Annotated[Path, tyro.conf.arg(metavar="OUT")]
    """File to write. It must not exist."""
    weight_file: tyro.conf.OmitArgPrefixes[WeightFileFlags] = dataclasses.field(default_factory=WeightFileFlags)
    checkpoint: Literal["best", "latest"] | None = None
    """Checkpoint of a run folder to convert; None: latest."""


@command
def main() -> int:
    positional = (tyro.conf.PositionalRequiredArgs,)
    arguments = parse_arguments(Arguments, prog="python -m cifar_jax.convert", config=positional)
    check_devices()
    check_weight_file(arguments.output)  # before a temperature is fitted, which takes a while
    if arguments.input.is_dir() and not is_saved_model(arguments.input):
        arguments.weight_file.refuse(without="a weight file as IN")
        source = load_source(SourceFlags(workdir=arguments.input, checkpoint=arguments.checkpoint))
        weights = calibrate(source).weights()
    elif arguments.checkpoint is not None:
        raise UserError(f"--checkpoint needs a run folder, and {arguments.input} is not one")
    else:
        weights = arguments.weight_file.load(arguments.input)
    save_weights(arguments.output, weights)
    count = sum(x.size for x in jax.tree.leaves(weights.params))
    relu = ", with the final ReLU" if weights.final_relu else ""
    scaling = describe_scaling(weights.input_scaling, weights.dataset)
    print(f"{arguments.output}: {weights.model}, {count:,} parameters{relu}, for {weights.input_scaling} pixels:")
    print(scaling)
    if weights.temperature is not None:
        print(f"calibrated probabilities are softmax(logits / {weights.temperature:.4f})")
    with contextlib.redirect_stderr(io.StringIO()):  # hides notes on assumed defaults: the lines below tell the values
        written = load_weights(arguments.output)
    if written.input_scaling != weights.input_scaling:
        print(f"this format does not store the scaling: use it with --input-scaling {weights.input_scaling}")
    if written.temperature != weights.temperature:
        print("this format does not store the temperature")
    if written.final_relu != weights.final_relu:
        print("this format does not store the final ReLU: use it with an --architecture that has it")
    if written.dataset != weights.dataset and weights.dataset not in (None, "cifar10"):
        print(f"trained on {weights.dataset}: evaluate it with --dataset {weights.dataset}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
