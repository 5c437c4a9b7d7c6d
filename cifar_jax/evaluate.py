"""Loss and accuracy of a trained network on the test set, every example counted once.

python -m cifar_jax.evaluate --workdir RUN | --weights FILE | --pretrained NAME; --help lists the flags.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from cifar_jax.checkpoint import Checkpoints, Progress
from cifar_jax.cli import command, parse_arguments
from cifar_jax.configs import RECIPES
from cifar_jax.configs.base import Config, InputScaling, ModelName
from cifar_jax.datasets import load_dataset
from cifar_jax.environment import describe_environment
from cifar_jax.errors import UserError
from cifar_jax.host import prepare_cpu
from cifar_jax.parallel import default_steps_per_call, replicate
from cifar_jax.pretrained import pretrained_path
from cifar_jax.train_step import TrainState, create_eval_steps, create_history, create_train_state, eval_batch_size
from cifar_jax.weights.files import Weights, load_weights


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
        mirror: bool = False,
    ) -> None:
        """Args: images uint8 [N, 32, 32, 3]; labels int32 [N]; dropout and mirror: see create_eval_step."""
        self._data = replicate((images, labels), devices)
        self._devices, self._size = devices, len(labels)
        self._num_steps = -(-self._size // eval_batch_size(config, self._size, devices))
        self._per_call = config.steps_per_call or default_steps_per_call(config.model, devices)
        compile_for = create_eval_steps(config, devices, self._per_call, dropout, mirror)
        self._eval_steps = compile_for(self._history(), state, *self._data, np.int32(0), np.int32(0))

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
        fields["image_sizes"] = tuple(map(tuple, fields.get("image_sizes", ())))
        return Config(**fields)
    except FileNotFoundError as error:
        raise UserError(f"{workdir}: no config.json, so not the workdir of a run") from error
    except (OSError, TypeError, KeyError, ValueError, UserError) as error:
        raise UserError(f"{path}: not a config of this program ({error})") from error


def load_run(
    workdir: Path, checkpoint: Literal["best", "latest"], dtype: Literal["float32", "bfloat16"] | None = None
) -> tuple[Config, TrainState, Progress]:
    """A run's config (computing in `dtype` if that is given) and the state of one of its checkpoints.

    Raises: UserError if there is no run or no such checkpoint, or it is damaged, or the run was started again.
    """
    config = read_config(workdir)
    restarts = sorted(workdir.glob("restart[0-9]"))
    if restarts:
        raise UserError(f"{workdir}: its training was dead and was started again: name {restarts[-1]}")
    config = dataclasses.replace(config, dtype=dtype or config.dtype)
    state = replicate(create_train_state(config, steps_per_epoch=1), jax.local_devices())
    state, progress = Checkpoints(workdir).restore_state(checkpoint, state)
    return config, state, progress


def load_file(weights: Weights, dtype: Literal["float32", "bfloat16"]) -> tuple[Config, TrainState]:
    """A config that says how to evaluate these weights, and a state that holds them."""
    recipe = RECIPES[f"{weights.model}_reference"]
    config = dataclasses.replace(recipe, input_scaling=weights.input_scaling, dtype=dtype)
    model = weights.create_module(dropout_rates=config.dropout_rates, dtype=jnp.dtype(dtype))
    state = TrainState.create(
        apply_fn=model.apply, params=weights.params, tx=optax.identity(), rng=jax.random.key(config.seed)
    )
    return config, replicate(state, jax.local_devices())


@dataclasses.dataclass(frozen=True)
class WeightFileFlags:
    """What a weight file may not say itself."""

    architecture: Path | None = None
    """The Keras architecture JSON beside it, which says whether there is a final ReLU."""
    model: ModelName | None = None
    """The network; None: guessed from the number of tensors."""
    input_scaling: InputScaling | None = None
    """How pixels are scaled; None: as the file says, else as the model's original program does."""

    def load(self, path: Path) -> Weights:
        """See load_weights."""
        return load_weights(path, self.model, self.architecture, self.input_scaling)

    def refuse(self, without: str) -> None:
        """Raises UserError if a flag is given, as it goes with what is not there."""
        for name, value in vars(self).items():
            if value is not None:
                raise UserError(f"--{name.replace('_', '-')} goes with {without} alone")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Evaluates a run's checkpoint, or a weight file of any framework, on the test set."""

    workdir: Path | None = None
    """The run's folder, as given to cifar_jax.train."""
    checkpoint: Literal["best", "latest"] | None = None
    """With --workdir: the latest checkpoint (None), or the best, which was chosen by test accuracy: biased upwards."""
    weights: Path | None = None
    """A weight file: .safetensors, .pth (PyTorch), .h5, .weights.h5 or .keras (Keras)."""
    weight_file: tyro.conf.OmitArgPrefixes[WeightFileFlags] = dataclasses.field(default_factory=WeightFileFlags)
    dataset: Literal["cifar10", "digits"] | None = None
    """With --weights: the data to test on; None: cifar10. A run is tested on its own."""
    pretrained: str | None = None
    """A released network, by the name of its model card in cifar_jax/pretrained."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the computation; None: the run's, else float32."""
    data_dir: str | None = None
    """Where to look for CIFAR-10 first."""
    eval_dropout: bool = False
    """Leave dropout on, as the PyTorch notebook does when it tests."""
    mirror: bool = False
    """Average the logits of each image and its mirror image: test-time augmentation."""
    json: bool = False
    """Print JSON."""


@command
def main() -> int:
    flags = (tyro.conf.FlagCreatePairsOff,)
    arguments = parse_arguments(Arguments, prog="python -m cifar_jax.evaluate", config=flags)
    prepare_cpu()
    source: dict[str, Any]
    if [arguments.workdir, arguments.weights, arguments.pretrained].count(None) != 2:
        raise UserError("name a run with --workdir, a weight file with --weights, or a network with --pretrained")
    if arguments.weights is None:
        arguments.weight_file.refuse(without="--weights")
        if arguments.dataset is not None:
            raise UserError("--dataset goes with --weights alone")
    if arguments.checkpoint is not None and arguments.workdir is None:
        raise UserError("--checkpoint goes with --workdir alone")
    if arguments.workdir is not None:
        checkpoint = arguments.checkpoint or "latest"
        config, state, progress = load_run(arguments.workdir, checkpoint, arguments.dtype)
        steps = f" and {progress.step} steps" if progress.step else ""
        name = f"{checkpoint} checkpoint, epoch {progress.epoch}{steps}"
        source = {"workdir": str(arguments.workdir), "checkpoint": checkpoint}
        source |= {"epoch": progress.epoch, "step": int(state.step), "dtype": config.dtype}
        if config.holdout:
            print("the run tested on held-out training images; this is the test set", file=sys.stderr)
    else:
        path = arguments.weights or pretrained_path(str(arguments.pretrained))
        weights = arguments.weight_file.load(path)
        config, state = load_file(weights, arguments.dtype or "float32")
        name = arguments.pretrained or str(path)
        source = {"weights": name, "model": weights.model, "final_relu": weights.final_relu}
        source |= {"input_scaling": weights.input_scaling, "dtype": config.dtype}
    config = dataclasses.replace(config, dataset=arguments.dataset or config.dataset)
    dataset = load_dataset(config.dataset, arguments.data_dir or config.data_dir)
    images, labels = dataset.test_images, dataset.test_labels
    evaluator = Evaluator(config, state, images, labels, jax.local_devices(), arguments.eval_dropout, arguments.mirror)
    metrics = evaluator(state)
    assert metrics is not None  # nothing stops it
    if not math.isfinite(metrics["loss"]):
        raise UserError(f"{name}: the loss is {metrics['loss']}: the weights are too large for {config.dtype}")
    if arguments.eval_dropout:
        source["dropout_rates"] = config.dropout_rates  # of a weight file, which does not say its own, the original's
        name += f", dropout {' '.join(map(str, config.dropout_rates))}"
    result = source | {
        "dataset": config.dataset,
        "eval_dropout": arguments.eval_dropout,
        "mirror": arguments.mirror,
        "test_loss": metrics["loss"],
        "test_accuracy": metrics["accuracy"],
        "num_examples": len(labels),
        **describe_environment(jax.local_devices()),
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        counted = f"{metrics['accuracy']:.2%} of {len(labels):,} images of {config.dataset}"
        print(f"{name}: test loss {metrics['loss']:.4f} accuracy {counted}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
