"""Compares the first steps of all_cnn_reference in JAX and PyTorch, with the same initial weights and images.

python -m benchmarks.early_training --out DIR [--seeds 0 1] [--num-steps 260]

After a plateau at ln 10 the loss falls. In some runs it jumps back near step 200. This comparison shows whether the
recipe or the program causes the jump: both frameworks get the same initial weights and the same augmented batches in
the same order, and PyTorch draws its own dropout. The loss of every step goes to DIR/early_training.json.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import output_file, write_result
from benchmarks.pytorch_training import with_pytorch_on_cpu
from cifar_jax.augment import augmentation_keys, create_augment
from cifar_jax.batches import epoch_order, pixel_statistics, scale_images
from cifar_jax.cli import command, parse_arguments
from cifar_jax.configs import RECIPES
from cifar_jax.configs.base import Config, DatasetName
from cifar_jax.datasets import Dataset, get_dataset, load_dataset
from cifar_jax.environment import PACKAGES, describe_command, describe_environment
from cifar_jax.errors import UserError
from cifar_jax.host import check_devices
from cifar_jax.optimizer import create_schedule
from cifar_jax.parallel import select_devices
from cifar_jax.train_step import create_train_state
from cifar_jax.trainer import Trainer
from cifar_jax.weights import pytorch

RECIPE = "all_cnn_reference"


def losses_in_jax(config: Config, dataset: Dataset, num_steps: int) -> list[float]:
    """Returns the batch losses of cifar_jax.train's first steps."""
    trainer = Trainer(config, dataset.train_images, dataset.train_labels, select_devices(config))
    order = trainer.order(0)
    for step in range(0, num_steps, trainer.steps_per_call):
        trainer.run_steps(order, step, min(trainer.steps_per_call, num_steps - step))
    return [float(loss) for loss in trainer.epoch_metrics()["batch_loss"][:num_steps]]


def losses_in_pytorch(config: Config, dataset: Dataset, num_steps: int) -> list[float]:
    """Returns batch losses with the same initial weights, images, order and augmentation, and with Keras' update."""
    torch = pytorch.import_torch()
    state = create_train_state(config, 1)
    augment = jax.jit(create_augment(config))
    keys_of = jax.jit(lambda step: augmentation_keys(state.rng, step, jnp.arange(config.batch_size)))
    order = np.asarray(epoch_order(config.seed, 0, len(dataset.train_labels)))
    schedule = create_schedule(config, 1)
    statistics = pixel_statistics(config.input_scaling, config.dataset)
    torch.manual_seed(config.seed)
    num_classes = get_dataset(config.dataset).num_classes
    network = pytorch.create_model(config.model, config.dropout_rates, num_classes=num_classes)
    pytorch.load_params(network, state.params)
    network = network.to(memory_format=torch.channels_last).train()
    parameters = list(network.parameters())
    velocities = [torch.zeros_like(parameter) for parameter in parameters]
    losses = []
    for step in range(num_steps):
        batch = order[step * config.batch_size : (step + 1) * config.batch_size]
        images = scale_images(jnp.asarray(dataset.train_images[batch]), *statistics)
        images = np.array(augment(keys_of(step), images))
        labels = torch.tensor(dataset.train_labels[batch], dtype=torch.int64)
        loss = torch.nn.functional.cross_entropy(network(torch.tensor(images).permute(0, 3, 1, 2)), labels)
        gradients = torch.autograd.grad(loss, parameters)
        rate = float(schedule(step))
        with torch.no_grad():
            for parameter, velocity, gradient in zip(parameters, velocities, gradients):
                velocity.mul_(config.momentum).sub_(rate * gradient)
                parameter.add_(config.momentum * velocity - rate * gradient)
        losses.append(loss.item())
    return losses


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compares the batch losses of the first steps of all_cnn_reference in JAX and PyTorch."""

    out: Path
    """Folder for early_training.json."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of initial weights, order and augmentation."""
    num_steps: int = 260
    """Number of steps of 64 images."""
    dataset: DatasetName = RECIPES[RECIPE].dataset
    """Dataset."""
    data_dir: str | None = None
    """Folder of the dataset; None: the standard places (docs/data.md)."""


@command
def main() -> int:
    arguments = parse_arguments(Arguments, prog="python -m benchmarks.early_training")
    check_devices()
    pytorch.import_torch()  # fails now and not after JAX's part
    file = output_file(arguments.out, "early_training")
    dataset = load_dataset(arguments.dataset, arguments.data_dir)
    most = len(dataset.train_labels) // RECIPES[RECIPE].batch_size
    if not 5 <= arguments.num_steps <= most:
        raise UserError(f"--num-steps {arguments.num_steps}: must be from 5 to {most}, the full batches of an epoch")
    if not arguments.seeds:
        raise UserError("--seeds: name one or more")
    runs: list[dict[str, Any]] = []
    with jax.default_matmul_precision("highest"):  # otherwise NVIDIA GPUs use TensorFloat-32
        for seed in arguments.seeds:
            config = dataclasses.replace(RECIPES[RECIPE], dataset=arguments.dataset, seed=seed, num_devices=1)
            for framework, losses_of in (("jax", losses_in_jax), ("pytorch", losses_in_pytorch)):
                losses = losses_of(config, dataset, arguments.num_steps)
                runs.append({"framework": framework, "seed": seed, "batch_loss": [round(loss, 5) for loss in losses]})
                smooth = np.convolve(losses, np.ones(5) / 5, "valid")
                low = int(smooth.argmin())
                after = f"afterwards up to {smooth[low:].max():.3f}"
                print(
                    f"seed {seed} {framework:8} lowest 5-step mean {smooth[low]:.3f} near step {low + 2}, {after}",
                    flush=True,
                )
            measured = describe_environment(jax.local_devices()[:1], (*PACKAGES, "torch"))
            content = {
                "command": describe_command("-m benchmarks.early_training", sys.argv[1:]),
                **with_pytorch_on_cpu(measured),
                "dataset": arguments.dataset,
                "runs": runs,
            }
            write_result(file, content, complete=seed == arguments.seeds[-1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
