"""Command line of the parity scripts, and the checks that both run."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import tyro

from cifar_jax.cli import command, parse_arguments
from cifar_jax.configs.base import Config, DatasetName
from cifar_jax.datasets import Dataset, get_dataset, load_dataset
from cifar_jax.environment import PACKAGES, describe_command, describe_environment
from cifar_jax.errors import UserError
from cifar_jax.host import prepare_host
from cifar_jax.io import write_json
from cifar_jax.pretrained import pretrained_names, pretrained_path
from cifar_jax.weights.files import load_weights
from parity.check import Check
from parity.distributions import check_initial
from parity.forward import check_activations, check_gradients, check_logits
from parity.ours import ORIGINAL_DATASET
from parity.predictions import check_predictions
from parity.reference import FedOptimizer, Reference
from parity.training import check_optimizer, check_trajectory


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compares cifar_jax with the reference networks. The exit status is 1 if a check fails."""

    layers: bool = False
    """Also compare every layer's activations."""
    json: bool = False
    """Print the result as JSON."""
    out: Path | None = None
    """File to which the JSON is written too."""
    dataset: DatasetName = ORIGINAL_DATASET
    """Dataset with 10 classes, like the originals'. digits needs no download."""
    data_dir: str | None = None
    """Folder of the dataset; None: the standard places (docs/data.md)."""
    weights: tuple[Path, ...] = ()
    """Weight files for the comparison of predictions; none: those in cifar_jax/pretrained."""
    images: int = 256
    """Number of test images for logits."""
    steps: int = 20
    """Number of free steps of the trajectories."""
    batch_size: int = 64
    """Batch size of gradients and of trajectories (there at most the recipe's)."""
    seeds: int = 8
    """Number of initialisations whose values are pooled."""
    test_images: int = 10_000
    """Number of test images for predictions."""


def common_checks(
    reference: type[Reference], config: Config, fed_optimizer: FedOptimizer, arguments: Arguments, dataset: Dataset
) -> list[Check]:
    """Runs the checks of both scripts: on every network, and on the original's recipe."""
    checks: list[Check] = []
    batch_size = min(arguments.batch_size, config.batch_size)
    start, count = (dataset.train_images, dataset.train_labels), arguments.steps * batch_size
    if count > len(dataset.train_labels):
        raise UserError(f"--steps {arguments.steps}: too few training images for batches of {batch_size}: lower it")
    images, labels = dataset.test_images, dataset.test_labels
    for model in reference.MODELS:
        checks += check_logits(reference, model, images[: arguments.images])
        if arguments.layers:
            checks += check_activations(reference, model, images[: arguments.batch_size])
        checks += check_gradients(reference, model, images[: arguments.batch_size], labels[: arguments.batch_size])
        checks += check_initial(reference, model, arguments.seeds)
    for path in arguments.weights:
        checks += check_predictions(reference, path, images[: arguments.test_images], labels[: arguments.test_images])
    checks += check_optimizer(config, fed_optimizer)
    return checks + check_trajectory(reference, config, *(array[:count] for array in start), batch_size)


def check_arguments(arguments: Arguments) -> Arguments:
    """Checks flags and fills in the released weights if none are named. Raises: UserError for invalid flags."""
    for name in ("images", "steps", "batch_size", "seeds", "test_images"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be 1 or more")
    out = arguments.out
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist: create it")
    if out is not None and (out.is_dir() or not os.access(out.parent, os.W_OK)):
        raise UserError(f"--out {out}: can't be written: name another file")
    classes, expected = (get_dataset(name).num_classes for name in (arguments.dataset, ORIGINAL_DATASET))
    if classes != expected:
        raise UserError(f"--dataset {arguments.dataset}: has {classes} classes, but the originals have {expected}")
    weights = arguments.weights or tuple(map(pretrained_path, pretrained_names()))
    if not weights:
        raise UserError("no weight files in cifar_jax/pretrained: name some with --weights")
    return dataclasses.replace(arguments, weights=weights)


def print_table(checks: Sequence[Check]) -> None:
    """Prints a line for each check and the number of checks that passed."""
    width = max(len(check.name) for check in checks)
    print(f"{'check':{width}} {'error':>9} {'tolerance':>9}")
    for check in checks:
        verdict = "pass" if check.passed else "FAIL"
        print(f"{check.name:{width}} {check.error:9.1e} {check.tolerance:9.1e} {verdict}")
    print(f"{sum(check.passed for check in checks)} of {len(checks)} checks passed")


def run(prog: str, packages: Sequence[str], checks_of: Callable[[Arguments, Dataset], list[Check]]) -> int:
    """Parses flags, runs the checks and prints the table. Returns: 0 if all passed, 1 if not, 2 for bad input."""

    @command
    def main() -> int:
        arguments = parse_arguments(Arguments, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))
        arguments = check_arguments(arguments)
        prepare_host()
        for path in arguments.weights:
            classes = load_weights(path).num_classes  # fails now and not after the other checks
            if classes != get_dataset(arguments.dataset).num_classes:
                raise UserError(f"--weights {path}: its {classes} classes are not those of {arguments.dataset}")
        dataset = load_dataset(arguments.dataset, arguments.data_dir)
        with jax.default_matmul_precision("highest"):  # otherwise NVIDIA GPUs use TensorFloat-32
            checks = checks_of(arguments, dataset)
        passed = all(check.passed for check in checks)
        content = {
            "command": describe_command(prog, sys.argv[1:]),
            **describe_environment(jax.local_devices(), (*PACKAGES, *packages)),
            "dataset": arguments.dataset,
            "passed": passed,
            "checks": [check.as_json() for check in checks],
        }
        try:
            if arguments.json:
                print(json.dumps(content, indent=2))
            else:
                print_table(checks)
        finally:  # written even if printing fails
            if arguments.out is not None:
                write_json(arguments.out, content)
        return int(not passed)

    return main()
