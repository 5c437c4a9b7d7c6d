"""Measures loss and accuracy of a trained network on the test set. Every image counts exactly once.

python -m cifar_jax.evaluate --workdir RUN | --weights FILE | --pretrained NAME; --help lists the flags.
"""

from __future__ import annotations

if __name__ == "__main__":
    from cifar_jax.interrupt import exit_on_interrupt

    exit_on_interrupt()

import dataclasses
import json
import math
import sys
from typing import Any

import jax
import tyro

from cifar_jax.cli import command, parse_arguments
from cifar_jax.console import say
from cifar_jax.datasets import load_dataset
from cifar_jax.environment import describe_environment
from cifar_jax.errors import UserError
from cifar_jax.host import prepare_host
from cifar_jax.sources import Dtype, Source, SourceFlags, load_source
from cifar_jax.trainer import Evaluator


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Evaluates a run's checkpoint, a weight file of any framework, or a released network on the test set."""

    source: tyro.conf.OmitArgPrefixes[SourceFlags] = dataclasses.field(default_factory=SourceFlags)
    dtype: Dtype | None = None
    """Computation type; None: the run's, or float32 for weight files."""
    data_dir: str | None = None
    """Folder of the dataset; None: the standard places (docs/data.md)."""
    eval_dropout: bool = False
    """Keep dropout on while testing, like the PyTorch notebook."""
    flip_tta: bool = False
    """Test-time augmentation: average the logits of each image and its mirror image."""
    json: bool = False
    """Print the result as JSON."""


def evaluate(
    source: Source, data_dir: str | None = None, eval_dropout: bool = False, flip_tta: bool = False
) -> dict[str, Any]:
    """Tests a network on its dataset's test set.

    Args: data_dir: folder of the dataset; eval_dropout: keep dropout on; flip_tta: average the logits of each image and
    its mirror image. Returns: JSON values: loss in nats, accuracy from 0 to 1, options, hardware, versions, date.
    Raises: UserError if the data can't be loaded, the classes differ, or the loss is not finite.
    """
    config, devices = source.config, jax.local_devices()
    source.check_classes()
    dataset = load_dataset(config.dataset, data_dir or config.data_dir)
    images, labels = dataset.test_images, dataset.test_labels
    metrics = Evaluator(config, source.state, images, labels, devices, eval_dropout, flip_tta)(source.state)
    assert metrics is not None  # nothing stops it
    if not math.isfinite(metrics["loss"]):
        raise UserError(f"{source.name}: the loss is {metrics['loss']}: the weights are too large for {config.dtype}")
    # Weight files don't store dropout rates, so the original's are used.
    dropout = {"dropout_rates": config.dropout_rates} if eval_dropout else {}
    return {
        **source.origin,
        **dropout,
        "dataset": config.dataset,
        "data": dataset.source,
        "eval_dropout": eval_dropout,
        "flip_tta": flip_tta,
        "test_loss": metrics["loss"],
        "test_accuracy": metrics["accuracy"],
        "num_examples": len(labels),
        **describe_environment(devices),
    }


@command
def main() -> int:
    flags = (tyro.conf.FlagCreatePairsOff,)
    arguments = parse_arguments(Arguments, prog="python -m cifar_jax.evaluate", config=flags)
    prepare_host()
    source = load_source(arguments.source, arguments.dtype)
    if source.config.holdout:
        say("note: this run tested on held-out training images; this command uses the test set", error=True)
    result = evaluate(source, arguments.data_dir, arguments.eval_dropout, arguments.flip_tta)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return 0
    dropout = f", dropout {' '.join(map(str, source.config.dropout_rates))}" if arguments.eval_dropout else ""
    counted = f"{result['test_accuracy']:.2%} of {result['num_examples']:,} images of {result['dataset']}"
    print(f"{source.name}{dropout}: test loss {result['test_loss']:.4f} accuracy {counted} ({result['data']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
