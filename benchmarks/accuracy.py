"""Measures accuracy over seeds: of a recipe, of its variants, or of a reference recipe in JAX and PyTorch.

python -m benchmarks.accuracy --recipe NAME --out DIR [--seeds 0 1 2] [--runs RUNS]
python -m benchmarks.accuracy --ablation NAME --out DIR [--num-epochs N] …
python -m benchmarks.accuracy --parity MODEL --out DIR …

All runs resume from their folders in RUNS, so the command can be stopped and started again.

--recipe writes DIR/accuracy_NAME.json: learning curves, mean and standard deviation of the last test accuracy, times to
given accuracies, images and FLOPs. --ablation (ablation.py) trains the recipe and variants that differ in one setting
each. It holds out 5,000 training images and writes the accuracies on them to DIR/ablation_NAME.json. --parity
(parity_training.py) trains a reference recipe in both frameworks and writes DIR/parity_MODEL.json: learning curves,
mean and standard deviation by framework, and Welch's t-test of the two means. Several processes can share this work:
give each its --frameworks and --seeds, then run the command once more with all of them.
"""

from __future__ import annotations

import collections
import sys
from typing import Any

from benchmarks import output_file, write_result
from benchmarks.ablation import run_ablation
from benchmarks.parity_training import TRAINERS, run_parity
from benchmarks.seeds import Arguments, Stop, configure, origin, spread, train_in_jax
from benchmarks.workloads import flops_per_image, reference_recipe
from cifar_jax.cli import StopSignals, command, parse_arguments
from cifar_jax.configs.base import Config
from cifar_jax.datasets import load_dataset
from cifar_jax.environment import describe_command
from cifar_jax.errors import UserError
from cifar_jax.host import prepare_host
from cifar_jax.outcomes import Interrupted

MILESTONES = (0.70, 0.74, 0.80, 0.86, 0.90, 0.94)  # test accuracies whose training times are reported


def time_to(metrics: list[dict[str, float]], accuracy: float) -> float | None:
    """Returns the training seconds, without compilation and evaluation, to a test accuracy; None if not reached."""
    for number, row in enumerate(metrics, 1):
        if row["test_accuracy"] >= accuracy:
            return round(sum(earlier["seconds"] for earlier in metrics[:number]), 1)
    return None


def training_cost(config: Config, num_images: int) -> dict[str, float]:
    """Returns {'images', 'flops'} of a whole run. FLOPs count forward and backward (see workloads.layer_flops)."""
    sizes = collections.Counter(config.image_size(epoch) for epoch in range(config.num_epochs))
    flops = sum(epochs * flops_per_image(config, size)["training"] for size, epochs in sizes.items())
    return {"images": config.num_epochs * num_images, "flops": flops * num_images}


def run_recipe(arguments: Arguments, recipe: str, stop: Stop) -> dict[str, Any]:
    """Returns the content of accuracy_RECIPE.json. Raises: UserError; Interrupted."""
    configs = [configure(arguments, recipe, f"accuracy_{recipe}/seed{seed}", seed) for seed in arguments.seeds]
    dataset = load_dataset(configs[0].dataset, arguments.data_dir)
    summaries = [train_in_jax(config, dataset, stop) for config in configs]
    runs = [summary["metrics"] for summary in summaries]
    times = {accuracy: [time_to(run, accuracy) for run in runs] for accuracy in MILESTONES}
    return {
        "recipe": recipe,
        "dataset": configs[0].dataset,
        "config": summaries[0]["config"] | {"seed": None},
        "seeds": list(arguments.seeds),
        **origin(summaries),
        "test_accuracy": spread([run[-1]["test_accuracy"] for run in runs]),
        "train_accuracy": spread([run[-1]["train_accuracy"] for run in runs]),
        "training_seconds": [summary["training_seconds"] for summary in summaries],
        "seconds_to": {f"{accuracy:.2f}": seconds for accuracy, seconds in times.items()},
        "cost": training_cost(configs[0], len(dataset.train_labels)),
        "test_accuracy_by_epoch": [[row["test_accuracy"] for row in run] for run in runs],
        "test_loss_by_epoch": [[row["test_loss"] for row in run] for run in runs],
    }


# Flag: (prefix of its result's name, function).
MODES = {
    "recipe": ("accuracy", run_recipe),
    "ablation": ("ablation", run_ablation),
    "parity": ("parity", run_parity),
}


def choose_mode(arguments: Arguments) -> str:
    """Returns the given flag of MODES. Raises: UserError for conflicting flags and bad seeds."""
    asked = [mode for mode in MODES if getattr(arguments, mode) is not None]
    if len(asked) != 1:
        raise UserError("name one of --recipe, --ablation and --parity")
    if len(set(arguments.seeds)) < max(1, len(arguments.seeds)):
        raise UserError(f"--seeds {' '.join(map(str, arguments.seeds))}: name one or more, each once")
    if asked[0] != "parity" and arguments.frameworks != tuple(TRAINERS):
        raise UserError(f"--frameworks needs --parity: --{asked[0]} trains only in JAX")
    return asked[0]


@command
def main() -> int:
    with StopSignals() as stop:
        arguments = parse_arguments(Arguments, prog="python -m benchmarks.accuracy")
        prepare_host()
        mode = choose_mode(arguments)
        name, (kind, run_mode) = getattr(arguments, mode), MODES[mode]
        try:
            for seed in arguments.seeds:  # reports bad flags now and not after hours of training
                configure(arguments, reference_recipe(name) if mode == "parity" else name, "", seed)
            dtype = f"_{arguments.dtype}" if arguments.dtype else ""
            file = output_file(arguments.out, arguments.name or f"{kind}_{name}{dtype}")
            content = run_mode(arguments, name, stop)
        except Interrupted as interrupted:
            print(f"{interrupted}. Run the same command again to resume.", file=sys.stderr)
            return 128 + (stop.received or 0)
        except UserError as error:
            own_flags = str(error).replace("--workdir", "--runs").replace("--seed ", "--seeds ")
            raise UserError(own_flags) from error
        if content is not None:
            command_line = describe_command("-m benchmarks.accuracy", sys.argv[1:])
            write_result(file, {"command": command_line} | content)
        return 0


if __name__ == "__main__":
    sys.exit(main())
