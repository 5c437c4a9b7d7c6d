"""Checks of trained weights on the test set: predictions, losses, and accuracy with dropout on."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax.batches import pixel_statistics, scale_images
from cifar_jax.configs.base import Config
from cifar_jax.parallel import replicate
from cifar_jax.sources import load_file
from cifar_jax.train_step import cross_entropy
from cifar_jax.trainer import Evaluator
from cifar_jax.weights.files import load_weights
from parity.check import Check
from parity.ours import divided, jax_logits
from parity.reference import Reference, torch, torch_loss

DRAWS = 5  # draws of dropout masks in tests


def scaled_for(config: Config, images: np.ndarray) -> np.ndarray:
    """Scales uint8 images as this config requires."""
    statistics = pixel_statistics(config.input_scaling, config.dataset)
    return np.asarray(scale_images(jnp.asarray(images), *statistics))


def check_predictions(reference: type[Reference], path: Path, images: np.ndarray, labels: np.ndarray) -> list[Check]:
    """Compares trained weights in both frameworks on the test set: arg-max, mean loss, the notebook's smaller loss."""
    weights = load_weights(path)
    config, _ = load_file(weights, "float32")
    network = reference(weights.model, weights.params, final_relu=weights.final_relu)
    inputs = scaled_for(config, images)
    ours, theirs = [], []
    for i in range(0, len(labels), 500):
        batch = inputs[i : i + 500]
        ours.append(np.asarray(jax_logits(weights.model, weights.params, divided(batch), weights.final_relu)))
        with torch.no_grad():
            theirs.append(network.logits(batch))
    our_logits, their_logits = np.concatenate(ours), torch.cat(theirs)
    our_top, differ = our_logits.argmax(-1), our_logits.argmax(-1) != their_logits.argmax(-1).numpy()
    largest = np.sort(our_logits, axis=-1)
    ties = largest[:, -1] - largest[:, -2] < 1e-4
    our_losses = np.asarray(cross_entropy(jnp.asarray(our_logits), jnp.asarray(labels)), np.float64)
    their_loss = torch_loss(their_logits.double(), labels).item()
    # The notebook adds up the mean losses of batches of 4 and divides by the number of images.
    batches = [slice(i, i + 4) for i in range(0, len(labels), 4)]
    small = sum(our_losses[batch].mean() for batch in batches) / len(labels)
    their_small = sum(torch_loss(their_logits[batch], labels[batch]).item() for batch in batches) / len(labels)
    name = f"{path.stem} ({weights.model}, test accuracy {(our_top == labels).mean():.2%})"
    return [
        Check(f"{name}: differing arg-max of {len(labels):,}", float(differ.sum()), float((differ & ties).sum()),
              f"only the {ties.sum()} images whose two largest logits are within 1e-4 may differ"),
        Check(f"{name}: mean loss", abs(our_losses.mean() - their_loss), 1e-6,
              "float32 rounding of the logits: floor 6e-8"),
        Check(f"{name}: the notebook's 4× too small loss, ours {small:.4f}", abs(small - their_small), 2.5e-7,
              "a quarter of the mean loss's"),
    ]  # fmt: skip


def check_dropout_at_test(
    reference: type[Reference], path: Path, images: np.ndarray, labels: np.ndarray
) -> list[Check]:
    """Compares mean accuracies with dropout on, as the notebook tests. Each framework draws its masks DRAWS times."""
    weights = load_weights(path)
    config, state = load_file(weights, "float32")
    evaluator = Evaluator(config, state, images, labels, jax.local_devices(), dropout=True)
    ours = []
    for draw in range(DRAWS):
        metrics = evaluator(state.replace(rng=replicate(jax.random.key(draw), jax.local_devices())))
        assert metrics is not None  # nothing stops it
        ours.append(metrics["accuracy"])
    network = reference(weights.model, weights.params, final_relu=weights.final_relu)
    torch.manual_seed(0)
    inputs = scaled_for(config, images)
    with torch.no_grad():
        logits = [
            torch.cat([network.logits(inputs[i : i + 500], dropout=True) for i in range(0, len(labels), 500)])
            for _ in range(DRAWS)
        ]
    correct = np.stack([draw.argmax(-1).numpy() == labels for draw in logits])
    rates = correct.mean(axis=0)  # per image
    deviation = np.sqrt(2 * (rates * (1 - rates)).sum() / (DRAWS - 1)) / len(labels)
    a, b = np.mean(ours), correct.mean()
    name = f"{path.stem}: mean accuracy of {DRAWS} draws with dropout on, ours {a:.2%}, theirs {b:.2%}"
    return [Check(name, abs(a - b), 4 * deviation, "four deviations of the draws' difference")]
