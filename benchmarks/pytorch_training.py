"""Trains a recipe in PyTorch like the notebook: SGD with momentum at a constant rate, without augmentation."""

from __future__ import annotations

import dataclasses
import io
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.seeds import Stop
from cifar_jax.batches import pixel_statistics, scale_images
from cifar_jax.checkpoint import Progress
from cifar_jax.configs.base import EXECUTION_FIELDS, Config
from cifar_jax.datasets import Dataset, get_dataset
from cifar_jax.errors import UserError
from cifar_jax.io import write_atomically
from cifar_jax.outcomes import Interrupted
from cifar_jax.weights import pytorch

EVALUATION_BATCH = 500
_FIELDS = (  # fields of a recipe that this training supports; other fields must have their defaults
    *("workdir", "model", "dropout_rates", "input_scaling", "batch_size", "num_epochs", "learning_rate"),
    *("momentum", "dataset", "seed", *EXECUTION_FIELDS),
)


def unsupported_fields(config: Config) -> list[str]:
    """Returns the fields that a recipe sets and `train_in_pytorch` does not support."""
    respected = Config(**{name: getattr(config, name) for name in _FIELDS})
    names = [field.name for field in dataclasses.fields(Config)]
    return [name for name in names if getattr(respected, name) != getattr(config, name)]


@dataclasses.dataclass
class Run:
    """Network, optimizer and epoch metrics of one run. A checkpoint stores them after each epoch."""

    config: Config
    network: Any
    optimizer: Any
    metrics: list[dict[str, float]]

    @classmethod
    def create(cls, config: Config) -> Run:
        """Starts from PyTorch's initial weights, or from the checkpoint. Raises: UserError if it can't be used."""
        torch = pytorch.import_torch()
        torch.manual_seed(config.seed)
        num_classes = get_dataset(config.dataset).num_classes
        network = pytorch.create_model(config.model, config.dropout_rates, num_classes=num_classes)
        optimizer = torch.optim.SGD(network.parameters(), config.learning_rate, config.momentum)
        run = cls(config, network, optimizer, [])
        run._restore()
        return run

    @property
    def path(self) -> Path:
        return Path(self.config.workdir) / "checkpoint.pth"

    @property
    def _recipe(self) -> str:
        fields = dataclasses.asdict(self.config)
        return json.dumps({name: fields[name] for name in fields if name not in (*EXECUTION_FIELDS, "num_epochs")})

    def _restore(self) -> None:
        torch = pytorch.import_torch()
        if not self.path.exists():
            return
        try:
            saved = torch.load(self.path, weights_only=True)
        except OSError:
            raise
        except Exception as error:  # a truncated pickle can raise anything
            raise UserError(f"{self.path}: damaged: remove it to train from the start, or name other --runs") from error
        if saved.get("recipe") != self._recipe:
            raise UserError(f"{self.path}: saved by another recipe or version: remove it, or name other --runs")
        self.network.load_state_dict(saved["network"])
        self.optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        self.metrics = saved["metrics"]

    def save(self) -> None:
        """Writes everything that the next epoch needs."""
        torch = pytorch.import_torch()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "metrics": self.metrics,
            "recipe": self._recipe,
            "rng": torch.get_rng_state(),
        }
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(self.path, buffer.getvalue())

    def train_epoch(self, images: Any, labels: Any, stop: Stop) -> float:
        """Trains an epoch. Returns: the mean training loss, nats. Raises: Interrupted; the last checkpoint stays."""
        torch, total = pytorch.import_torch(), 0.0
        batches = torch.randperm(len(labels)).split(self.config.batch_size)
        self.network.train()
        for batch in batches:
            if stop():
                raise Interrupted(Progress(len(self.metrics)), len(batches))
            loss = torch.nn.functional.cross_entropy(self.network(images[batch]), labels[batch])
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(batch)
        return total / len(labels)

    def evaluate(self, images: Any, labels: Any) -> tuple[float, float]:
        """Returns (loss in nats, accuracy from 0 to 1), without dropout."""
        torch = pytorch.import_torch()
        with torch.no_grad():
            logits = torch.cat([self.network.eval()(part) for part in images.split(EVALUATION_BATCH)])
        accuracy = (logits.argmax(-1) == labels).double().mean().item()
        return torch.nn.functional.cross_entropy(logits, labels).item(), accuracy


def train_in_pytorch(config: Config, dataset: Dataset, stop: Stop) -> dict[str, Any]:
    """Trains a recipe like the notebook, from PyTorch's initial weights. Evaluation is without dropout.

    Returns: {'metrics': [{'epoch', 'train_loss', 'test_accuracy', …} of each epoch]}, like `train_and_evaluate`.
    Raises: UserError for a checkpoint that can't be used; Interrupted.
    """
    torch = pytorch.import_torch()
    statistics = pixel_statistics(config.input_scaling, config.dataset)
    scaled = lambda images: np.array(scale_images(jnp.asarray(images), *statistics))
    as_tensor = lambda images: torch.from_numpy(scaled(images)).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor(dataset.train_labels, dtype=torch.int64)
    test_labels = torch.tensor(dataset.test_labels, dtype=torch.int64)
    images, test_images = as_tensor(dataset.train_images), as_tensor(dataset.test_images)
    run = Run.create(config)
    for epoch in range(len(run.metrics) + 1, config.num_epochs + 1):
        start = time.perf_counter()
        train_loss = run.train_epoch(images, labels, stop)
        seconds = time.perf_counter() - start
        test_loss, accuracy = run.evaluate(test_images, test_labels)
        run.metrics.append(
            {
                "epoch": epoch,
                "train_loss": train_loss,
                "test_loss": test_loss,
                "test_accuracy": accuracy,
                "seconds": round(seconds, 3),
            }
        )
        print(f"pytorch seed {config.seed} epoch {epoch:2} test accuracy {accuracy:.2%} {seconds:.0f} s", flush=True)
        run.save()
    return {"metrics": run.metrics[: config.num_epochs]}  # an earlier call may have trained more epochs


def with_pytorch_on_cpu(environment: dict[str, Any]) -> dict[str, Any]:
    """Returns an environment whose hardware names PyTorch's part, which ran on the CPU, if JAX's part did not."""
    if jax.default_backend() == "cpu":
        return environment
    return {**environment, "hardware": f"{environment['hardware']}; PyTorch on the CPU"}
