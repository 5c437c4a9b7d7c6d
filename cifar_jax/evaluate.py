"""Loss and accuracy of a trained network on the test set, every example counted once.

python -m cifar_jax.evaluate --workdir RUN [--checkpoint best|latest] [--eval-dropout] [--json]
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from cifar_jax.checkpoint import Checkpoints
from cifar_jax.configs.default import Config
from cifar_jax.errors import UserError, command, parse_arguments
from cifar_jax.input_pipeline import load_dataset
from cifar_jax.training import (
    TrainState,
    create_eval_steps,
    create_history,
    create_train_state,
    default_steps_per_call,
    eval_batch_size,
    replicate,
)


class Evaluator:
    """Evaluates states on a dataset that stays on the devices; compiles once."""

    def __init__(
        self,
        config: Config,
        state: TrainState,
        images: np.ndarray,
        labels: np.ndarray,
        devices: Sequence[jax.Device],
        dropout: bool = False,
    ) -> None:
        """Args: images uint8 [N, 32, 32, 3]; labels int32 [N]; dropout: leave it on, as the PyTorch notebook does."""
        self._data = replicate((images, labels), devices)
        self._devices, self._size = devices, len(labels)
        self._num_steps = -(-self._size // eval_batch_size(config, self._size, devices))
        self._per_call = config.steps_per_call or default_steps_per_call(devices)
        start = replicate(jnp.int32(0), devices)
        compile_for = create_eval_steps(config, devices, self._per_call, dropout)
        self._eval_steps = compile_for(self._history(), state, *self._data, start, start)

    def _history(self) -> dict[str, jax.Array]:
        return replicate(create_history(self._num_steps), self._devices)

    def __call__(self, state: TrainState, stop: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """{'loss': mean over the examples in nats, 'accuracy': from 0 to 1}; None if `stop` said so before the end."""
        history = self._history()
        for start in range(0, self._num_steps, self._per_call):
            count = min(self._per_call, self._num_steps - start)
            history = self._eval_steps(history, state, *self._data, np.int32(start), np.int32(count))
            jax.block_until_ready(history)
            if stop():
                return None
        sums = {name: np.asarray(values).astype(np.float64).sum() for name, values in history.items()}
        assert sums["count"] == self._size, "every example is counted exactly once"
        return {"loss": sums["loss"] / self._size, "accuracy": sums["correct"] / self._size}


def read_config(workdir: Path) -> Config:
    """The config that a run was made with. Raises UserError if there is none."""
    path = workdir / "config.json"
    try:
        fields = json.loads(path.read_text())
        fields["dropout_rates"] = tuple(fields["dropout_rates"])
        return Config(**fields)
    except FileNotFoundError as error:
        raise UserError(f"{workdir}: no config.json, so not the workdir of a run") from error
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not a config of this program ({error})") from error


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Evaluates a run's checkpoint on the test set."""

    workdir: Path
    """The run's folder, as given to cifar_jax.train."""
    checkpoint: Literal["best", "latest"] = "latest"
    """The latest checkpoint, or the best. The best was chosen by test accuracy, so its accuracy is biased upwards."""
    data_dir: str | None = None
    """Where to look for CIFAR-10 first."""
    eval_dropout: bool = False
    """Leave dropout on, as the PyTorch notebook does when it tests."""
    json: bool = False
    """Print JSON."""


@command
def main() -> int:
    flags = (tyro.conf.FlagCreatePairsOff,)
    arguments = parse_arguments(lambda: tyro.cli(Arguments, prog="python -m cifar_jax.evaluate", config=flags))
    config = read_config(arguments.workdir)
    config = dataclasses.replace(config, data_dir=arguments.data_dir or config.data_dir, num_devices=None)
    # The batch of training need not divide over this machine's devices.
    devices = jax.local_devices()
    dataset = load_dataset(config.dataset, config.data_dir)
    steps_per_epoch = -(-len(dataset.train_labels) // config.batch_size)
    state = replicate(create_train_state(config, steps_per_epoch), devices)
    state, progress = Checkpoints(arguments.workdir).restore_state(arguments.checkpoint, state)
    evaluator = Evaluator(
        config, state, dataset.test_images, dataset.test_labels, devices, dropout=arguments.eval_dropout
    )
    metrics = evaluator(state)
    assert metrics is not None  # nothing stops it
    result = {
        "workdir": str(arguments.workdir),
        "checkpoint": arguments.checkpoint,
        "epoch": progress.epoch,
        "step": int(state.step),
        "eval_dropout": arguments.eval_dropout,
        "test_loss": metrics["loss"],
        "test_accuracy": metrics["accuracy"],
        "num_examples": len(dataset.test_labels),
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        print(
            f"{arguments.checkpoint} checkpoint, epoch {progress.epoch}: test loss {metrics['loss']:.4f} "
            f"accuracy {metrics['accuracy']:.2%} of {result['num_examples']:,} images"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
