"""The command line of the parity scripts, and the checks that both make."""

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
    """Compares cifar_jax with the reference networks; exit status 1 if a check fails."""

    layers: bool = False
    """Compare every layer's activations as well."""
    json: bool = False
    """Print JSON."""
    out: Path | None = None
    """Write the JSON to this file, too."""
    dataset: DatasetName = ORIGINAL_DATASET
    """The data, of 10 classes as the originals' are; digits is embedded."""
    data_dir: str | None = None
    """Where to look for the dataset first."""
    weights: tuple[Path, ...] = ()
    """Trained weights to compare predictions with; without: those in cifar_jax/pretrained."""
    images: int = 256
    """Test images for the logits."""
    steps: int = 20
    """Free steps of the trajectories."""
    batch_size: int = 64
    """Of gradients, and of the trajectory, where it is at most the recipe's."""
    seeds: int = 8
    """Initialisations whose values are pooled."""
    test_images: int = 10_000
    """Test images for the predictions."""


def common_checks(
    reference: type[Reference], config: Config, fed_optimizer: FedOptimizer, arguments: Arguments, dataset: Dataset
) -> list[Check]:
    """All checks that both scripts make: on every network, and of the original's own recipe."""
    checks: list[Check] = []
    batch_size = min(arguments.batch_size, config.batch_size)
    start, count = (dataset.train_images, dataset.train_labels), arguments.steps * batch_size
    if count > len(dataset.train_labels):
        raise UserError(f"--steps {arguments.steps}: {batch_size} images each are more than the training set has")
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
    """The same, with the released weights where none are named. Raises: UserError for what can't be used."""
    for name in ("images", "steps", "batch_size", "seeds", "test_images"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be 1 or more")
    out = arguments.out
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    if out is not None and (out.is_dir() or not os.access(out.parent, os.W_OK)):
        raise UserError(f"--out {out}: can't be written: name a file")
    classes, expected = (get_dataset(name).num_classes for name in (arguments.dataset, ORIGINAL_DATASET))
    if classes != expected:
        raise UserError(f"--dataset {arguments.dataset}: has {classes} classes, and the originals {expected}")
    weights = arguments.weights or tuple(map(pretrained_path, pretrained_names()))
    if not weights:
        raise UserError("there are no weight files in cifar_jax/pretrained: name some with --weights")
    return dataclasses.replace(arguments, weights=weights)


def print_table(checks: Sequence[Check]) -> None:
    """A line for each check, and the number of those that passed."""
    width = max(len(check.name) for check in checks)
    print(f"{'check':{width}} {'error':>9} {'tolerance':>9}")
    for check in checks:
        verdict = "pass" if check.passed else "FAIL"
        print(f"{check.name:{width}} {check.error:9.1e} {check.tolerance:9.1e} {verdict}")
    print(f"{sum(check.passed for check in checks)} of {len(checks)} checks passed")


def run(prog: str, packages: Sequence[str], checks_of: Callable[[Arguments, Dataset], list[Check]]) -> int:
    """Parses the command line, makes the checks, prints the table; 0 if all passed, 1 if not, 2 for bad input."""

    @command
    def main() -> int:
        arguments = parse_arguments(Arguments, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))
        arguments = check_arguments(arguments)
        prepare_host()
        for path in arguments.weights:
            classes = load_weights(path).num_classes  # a bad file is refused now and not after the other checks
            if classes != get_dataset(arguments.dataset).num_classes:
                raise UserError(f"--weights {path}: has {classes} classes, and {arguments.dataset} others")
        dataset = load_dataset(arguments.dataset, arguments.data_dir)
        with jax.default_matmul_precision("highest"):  # else TensorFloat-32 on NVIDIA's GPUs
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
        finally:  # whichever fails, the other is there
            if arguments.out is not None:
                write_json(arguments.out, content)
        return int(not passed)

    return main()
