"""Checks of one batch: logits, activations layer by layer, loss and gradients."""

from __future__ import annotations

from unittest import mock

import jax
import numpy as np

from cifar_jax.models import get_model
from cifar_jax.ops import winograd
from cifar_jax.weights.params import expected_shapes
from parity import ours
from parity.check import WHY_FLOAT64, Check, difference, relative_difference
from parity.ours import as_dtype, initial_params, scaled
from parity.reference import Reference, torch, torch_loss

WHY_RELU = "near-ties of ReLU and max pool fall to either side in float32, float64 shows the semantics"
# Float32 gradients by network: (tolerance, floor measured on CIFAR-10). A flipped tie makes the same difference between
# PyTorch's own float32 and float64 gradients.
FLOAT32_GRADIENTS = {"all_cnn": (2e-2, "3e-3"), "lenet5": (1.5e-3, "6e-6, with a flip 1e-3")}
NOT_MEASURED = (1.5e-3, "not measured")
FLOAT64 = 1e-12  # tolerance of losses and gradients


def check_logits(reference: type[Reference], model: str, images: np.ndarray) -> list[Check]:
    params, inputs = initial_params(model), scaled(images, model)
    with torch.no_grad():
        theirs = reference(model, params).logits(inputs)
    error = relative_difference(ours.jax_logits(model, params, inputs), theirs.numpy())
    name = f"{model}: logits of {len(images)} images, relative to the largest"
    return [Check(name, error, 5e-6, "float32 sums in another order: floor 5e-7")]


def check_activations(reference: type[Reference], model: str, images: np.ndarray) -> list[Check]:
    """Compares activations layer by layer, to locate an error of a port."""
    params, inputs = initial_params(model), scaled(images, model)
    capture = lambda params: get_model(model)().apply({"params": params}, inputs, capture_intermediates=True)[1]
    layers = jax.jit(capture)(params)["intermediates"]
    theirs = reference(model, params).activations(inputs)
    checks = []
    for (name, _, _), other in zip(expected_shapes(model), theirs, strict=True):
        outputs = layers[name]["__call__"][0]
        last = name == get_model(model).LAYERS[-1]  # has no ReLU
        error = difference(outputs if last else jax.nn.relu(outputs), other)
        checks.append(Check(f"{model}: activations of {name}", error, 1e-5, "float32 sums in another order"))
    return checks


def without_ties(images: np.ndarray) -> np.ndarray:
    """Replaces the lowest three bits of uint8 images by noise.

    In flat parts of an image the values in a max pool's window differ only by rounding, which then decides where the
    gradient goes. Winograd's form and PyTorch's sums round differently.
    """
    return images & 0xF8 | np.random.default_rng(0).integers(0, 8, images.shape, dtype=np.uint8)


def check_gradients(reference: type[Reference], model: str, images: np.ndarray, labels: np.ndarray) -> list[Check]:
    """Compares loss and gradients of a batch in float32 and float64, without dropout, and float64 gradients on the
    unchanged images without Winograd's form."""
    checks, start = [], initial_params(model)
    tolerance32, floor = FLOAT32_GRADIENTS.get(model, NOT_MEASURED)
    tolerance = {"float32": tolerance32, "float64": FLOAT64}

    def errors(images: np.ndarray, dtype: str) -> tuple[float, float]:
        with jax.enable_x64(dtype == "float64"):
            params, inputs = as_dtype(start, dtype), scaled(images, model, dtype)
            our_loss, gradients = ours.jax_loss_and_gradients(model, params, inputs, labels)
            network = reference(model, params, dtype)
            loss = torch_loss(network.logits(inputs), labels)
            return abs(float(our_loss) - loss.item()), relative_difference(gradients, network.gradients(loss))

    for dtype in ("float32", "float64"):
        loss_error, error = errors(without_ties(images), dtype)
        why = "float32 rounding: floor 2e-7" if dtype == "float32" else WHY_FLOAT64
        checks.append(Check(f"{model}: loss, {dtype}", loss_error, 1e-6 if dtype == "float32" else FLOAT64, why))
        why = f"{WHY_RELU}: floor {floor}" if dtype == "float32" else WHY_FLOAT64
        name = f"{model}: gradients, {dtype}, low 3 bits of pixels random, relative to each tensor's largest"
        checks.append(Check(name, error, tolerance[dtype], why))
    with mock.patch.object(winograd, "pays", return_value=False):
        _, error = errors(images, "float64")
    name = (
        f"{model}: gradients, float64, images as they are, without Winograd's form, relative to each tensor's largest"
    )
    return [*checks, Check(name, error, tolerance["float64"], WHY_FLOAT64)]
