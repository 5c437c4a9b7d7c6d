"""Loads the trained network that a command's flags name: a run's checkpoint, a weight file or a released network."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from cifar_jax.batches import InputScaling, pixel_statistics, scale_images, split_seed
from cifar_jax.checkpoint import Checkpoints, Progress
from cifar_jax.configs.base import Config, DatasetName, ModelName
from cifar_jax.datasets import DATASETS, check_images
from cifar_jax.errors import UserError
from cifar_jax.models import get_model
from cifar_jax.ops.blocks import infer
from cifar_jax.parallel import replicate
from cifar_jax.pretrained import pretrained_path
from cifar_jax.runs import read_config, refuse_restarted, resolve_workdir
from cifar_jax.train_step import TrainState, create_train_state
from cifar_jax.weights.files import Weights, load_weights

BATCH_SIZE = 500

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class WeightFileFlags:
    """Facts that a weight file may not store itself."""

    architecture: Path | None = None
    """Keras architecture JSON of the weight file. It tells whether there is a final ReLU."""
    model: ModelName | None = None
    """Network of the weight file; None: found from the tensors' shapes."""
    input_scaling: InputScaling | None = None
    """Scaling of pixels; None: as stored in the weight file, else the original program's."""
    dataset: DatasetName | None = None
    """Dataset of the weight file; None: as stored in it, else cifar10."""

    def load(self, path: Path) -> Weights:
        """Reads a weight file with these flags: see load_weights."""
        return load_weights(path, self.model, self.architecture, self.input_scaling, self.dataset)

    def refuse(self, without: str) -> None:
        """Raises: UserError if any of these flags is given. Args: without: the missing thing that the flags need."""
        for name, value in vars(self).items():
            if value is not None:
                raise UserError(f"--{name.replace('_', '-')} needs {without}")


@dataclasses.dataclass(frozen=True)
class SourceFlags:
    """Flags that name a run, a weight file or a released network."""

    workdir: Path | None = None
    """Run folder, as given to cifar_jax.train."""
    checkpoint: Literal["best", "latest"] | None = None
    """Checkpoint of --workdir; None: latest. The best is chosen by test accuracy, so its accuracy is biased upwards."""
    weights: Path | None = None
    """Weight file: .safetensors, .pth (PyTorch), .h5, .weights.h5 or .keras (Keras)."""
    weight_file: tyro.conf.OmitArgPrefixes[WeightFileFlags] = dataclasses.field(default_factory=WeightFileFlags)
    pretrained: str | None = None
    """Name of a released network (see the model cards in cifar_jax/pretrained)."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A trained network: its config, its state on every local device, its name and its class names.

    `origin` describes the network in results, as JSON values. `temperature`: logits / temperature give calibrated
    probabilities; None: not known.
    """

    config: Config
    state: TrainState
    name: str
    class_names: tuple[str, ...]
    origin: dict[str, Any]
    temperature: float | None = None

    def apply(self, images: jax.Array) -> jax.Array:
        """Returns logits, float32 [N, classes], of scaled images, float [N, 32, 32, 3]."""
        params = jax.device_get(self.state.eval_params)
        return infer(lambda images: self.state.apply_fn({"params": params}, images), images)

    def logits(self, images: jax.Array) -> jax.Array:
        """Returns logits, float32 [N, classes], of images with pixels from 0 to 255, [N, 32, 32, 3]."""
        return self.apply(scale_images(images, *pixel_statistics(self.config.input_scaling, self.config.dataset)))

    def weights(self) -> Weights:
        """Returns what a weight file of this network stores."""
        config, params = self.config, jax.tree.map(np.asarray, self.state.eval_params)
        return Weights(
            config.model,
            params,
            config.input_scaling,
            final_relu=self.origin.get("final_relu", False),
            dataset=config.dataset,
            class_names=self.class_names,
            temperature=self.temperature,
        )

    def check_classes(self) -> None:
        """Raises: UserError if the network has another number of classes than the dataset on which it is tested."""
        count, dataset = len(self.class_names), self.config.dataset
        if count != (classes := DATASETS[dataset].num_classes):
            has = f"{self.name} has {count} outputs and {dataset} has {classes} classes"
            raise UserError(f"{has}: use another --dataset")

    @functools.cached_property
    def _compiled(self) -> Callable[[np.ndarray], jax.Array]:
        return jax.jit(self.logits)

    def create_predictor(self) -> Callable[[np.ndarray], np.ndarray]:
        """Returns logits(images): uint8 [N, 32, 32, 3] → float64 [N, classes], compiled once and run in batches.

        logits raises UserError for images of another type or shape.
        """

        def logits(images: np.ndarray) -> np.ndarray:
            check_images(images)
            starts = range(0, max(len(images), 1), BATCH_SIZE)
            parts = [self._compiled(images[start : start + BATCH_SIZE]) for start in starts]
            return np.concatenate(parts).astype(np.float64)

        return logits


def load_source(flags: SourceFlags, dtype: Dtype | None = None, default: str | None = None) -> Source:
    """Loads the network that the flags name.

    Args: dtype: computation type; None: the run's, or float32; default: the released network to use without flags.
    Raises: UserError if the flags name several networks, or none without a default, or loading fails.
    """
    named = [flags.workdir, flags.weights, flags.pretrained]
    if named.count(None) < 2 or (named.count(None) == 3 and default is None):
        raise UserError("name one network by --workdir (a run), --weights (a file) or --pretrained (a released one)")
    if flags.weights is None:
        flags.weight_file.refuse(without="--weights")
    if flags.workdir is None and flags.checkpoint is not None:
        raise UserError("--checkpoint needs --workdir")
    if flags.workdir is not None:
        checkpoint = flags.checkpoint or "latest"
        config, state, progress = load_run(flags.workdir, checkpoint, dtype)
        steps = f" and {progress.step} steps" if progress.step else ""
        name = f"{checkpoint} checkpoint, epoch {progress.epoch}{steps}"
        origin = {"workdir": resolve_workdir(str(flags.workdir)), "checkpoint": checkpoint, "epoch": progress.epoch}
        class_names = DATASETS[config.dataset].class_names
        return Source(config, state, name, class_names, {**origin, "step": int(state.step), "dtype": config.dtype})
    released = str(default) if flags.pretrained is None else flags.pretrained
    path = flags.weights or pretrained_path(released)
    weights = flags.weight_file.load(path)
    config, state = load_file(weights, dtype or "float32")
    name = str(flags.weights or released)
    origin = {"weights": name, "model": weights.model, "final_relu": weights.final_relu}
    origin |= {"input_scaling": weights.input_scaling, "dtype": config.dtype}
    return Source(config, state, name, _class_names(weights, config.dataset), origin, weights.temperature)


def _class_names(weights: Weights, dataset: str) -> tuple[str, ...]:
    """Returns the file's class names, else the dataset's if their number fits the network, else numbers."""
    names, count = weights.class_names or DATASETS[dataset].class_names, weights.num_classes
    return names if len(names) == count else tuple(map(str, range(count)))


def load_run(
    workdir: Path, checkpoint: Literal["best", "latest"], dtype: Dtype | None = None
) -> tuple[Config, TrainState, Progress]:
    """Returns a run's config, with `dtype` if given, the state of a checkpoint, and its progress.

    Raises: UserError if there is no run or no such checkpoint, it is damaged, or the run was restarted.
    """
    workdir = Path(resolve_workdir(str(workdir)))
    config = read_config(workdir)
    refuse_restarted(workdir)
    config = dataclasses.replace(config, dtype=dtype or config.dtype)
    state = replicate(create_train_state(config, steps_per_epoch=1), jax.local_devices())
    state, progress = Checkpoints(workdir).restore_state(checkpoint, state)
    return config, state, progress


def evaluation_config(weights: Weights, dtype: Dtype) -> Config:
    """Returns a config for evaluating these weights.

    The dataset is the file's, or CIFAR-10 if the file names none. The dropout rates are the network's defaults.
    """
    return Config(
        workdir="runs/none",  # not used without training
        model=weights.model,
        dropout_rates=get_model(weights.model)().dropout_rates,
        input_scaling=weights.input_scaling,
        batch_size=1,
        num_epochs=1,
        learning_rate=1.0,
        dataset=weights.dataset if weights.dataset in DATASETS else "cifar10",
        dtype=dtype,
    )


def load_file(weights: Weights, dtype: Dtype) -> tuple[Config, TrainState]:
    """Returns `evaluation_config`, and a state that holds the weights on every local device."""
    config = evaluation_config(weights, dtype)
    model = weights.create_module(dropout_rates=config.dropout_rates, dtype=jnp.dtype(dtype))
    _, rng, _ = split_seed(config.seed)
    state = TrainState.create(apply_fn=model.apply, params=weights.params, tx=optax.identity(), rng=rng)
    return config, replicate(state, jax.local_devices())
