"""What parity_keras.py and parity_pytorch.py share: the checks that compare cifar_jax with a reference network.

A reference is one of the two networks in Keras (on its PyTorch backend) or PyTorch, seen through the class Reference,
in Flax' layouts. Every check returns rows of (name, error, tolerance, why that tolerance).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
import torch
import tyro

from cifar_jax.configs import RECIPES
from cifar_jax.configs.default import Config
from cifar_jax.environment import PACKAGES, describe_environment
from cifar_jax.errors import command, parse_arguments
from cifar_jax.input_pipeline import Dataset, load_dataset, scale_images, split_seed
from cifar_jax.interop.files import load_weights
from cifar_jax.interop.layers import Params, expected_shapes, layers_from_params
from cifar_jax.metrics import write_json
from cifar_jax.models import MODELS
from cifar_jax.training import create_tx, cross_entropy

WHY_RELU = "ReLU and arg-max near-ties fall to either side in float32; float64 shows that the semantics agree"


@dataclasses.dataclass(frozen=True)
class Check:
    """A row of the table: `error` is the maximum absolute difference unless `name` says otherwise."""

    name: str
    error: float
    tolerance: float
    why: str

    @property
    def passed(self) -> bool:
        return bool(self.error <= self.tolerance)  # a NaN fails


class Reference(Protocol):
    """One of the two networks in another framework. Images are float NHWC arrays; params are Flax'."""

    def __init__(self, model: str, params: Params | None = None, dtype: str = "float32") -> None:
        """Without params: initialised by the framework, from torch.manual_seed's state."""

    def params(self) -> Params:
        """Its weights."""

    def logits(self, images: np.ndarray, dropout: bool = False) -> torch.Tensor:
        """[N, 10], differentiable."""

    def gradients(self, loss: torch.Tensor) -> Params:
        """Of a loss made from `logits`."""

    def activations(self, images: np.ndarray) -> list[np.ndarray]:
        """The output of every layer with weights after its ReLU, in order, NHWC."""

    def train(self, config: Config, batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> Params:
        """The weights after a step of the recipe's optimizer on every (images, labels), dropout off."""


def precision(dtype: str) -> contextlib.AbstractContextManager[Any]:
    """While entered, JAX has float64 if that is `dtype`."""
    return jax.enable_x64(dtype == "float64")


def difference(ours: Any, theirs: Any) -> float:
    """The maximum absolute difference of two arrays or trees of one structure."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    errors = [np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max() for a, b in pairs]
    return float(np.max(errors))  # max() would pass over a NaN


def as_dtype(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), tree)


@functools.cache
def jitted_init(model: str) -> Callable[..., Any]:
    return jax.jit(MODELS[model]().init)


@functools.cache
def initial_params(model: str, seed: int = 0) -> Params:
    """What create_train_state makes of a seed, compiled once."""
    params_key, *_ = split_seed(seed)
    return as_dtype(jitted_init(model)(params_key, jnp.zeros((1, 32, 32, 3)))["params"], "float32")


def scaled(images: np.ndarray, model: str, dtype: str = "float32") -> np.ndarray:
    """uint8 images as the model's original program feeds them."""
    return np.asarray(scale_images(jnp.asarray(images), RECIPES[f"{model}_reference"].input_scaling), dtype)


@functools.cache
def jitted_apply(model: str, dtype: np.dtype, final_relu: bool) -> Callable[..., Any]:
    network = MODELS[model](dtype=dtype, **({"final_relu": True} if final_relu else {}))
    return jax.jit(lambda params, images: network.apply({"params": params}, images))


def jax_logits(model: str, params: Params, images: np.ndarray, final_relu: bool = False) -> jax.Array:
    return jitted_apply(model, images.dtype, final_relu)(params, images)


def jax_loss_and_gradients(model: str, params: Params, images: np.ndarray, labels: np.ndarray) -> tuple[Any, Params]:
    network = MODELS[model](dtype=images.dtype)
    loss = lambda params: cross_entropy(network.apply({"params": params}, images), jnp.asarray(labels)).mean()
    return jax.jit(jax.value_and_grad(loss))(params)


def torch_loss(logits: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, torch.tensor(labels, dtype=torch.int64))


# --- the checks ---


def check_logits(reference: type[Reference], model: str, images: np.ndarray) -> list[Check]:
    params, inputs = initial_params(model), scaled(images, model)
    with torch.no_grad():
        theirs = reference(model, params).logits(inputs)
    error = difference(jax_logits(model, params, inputs), theirs)
    return [Check(f"{model}: logits of {len(images)} images", error, 2e-6, "float32 sums in another order: floor 4e-7")]


def check_activations(reference: type[Reference], model: str, images: np.ndarray) -> list[Check]:
    """Layer by layer, to find where a port goes wrong."""
    params, inputs = initial_params(model), scaled(images, model)
    network = MODELS[model]()
    _, captured = network.apply({"params": params}, inputs, capture_intermediates=True)
    layers = captured["intermediates"]
    theirs = reference(model, params).activations(inputs)
    checks = []
    for (name, _, _), other in zip(expected_shapes(model), theirs):
        ours = layers[name]["__call__"][0]
        last = other.shape[-1] == 10  # has no ReLU
        error = difference(ours if last else jax.nn.relu(ours), other)
        checks.append(Check(f"{model}: activations of {name}", error, 1e-5, "float32 sums in another order"))
    return checks


def check_gradients(reference: type[Reference], model: str, images: np.ndarray, labels: np.ndarray) -> list[Check]:
    """Loss and gradients of a batch, float32 and float64, dropout off."""
    checks, start = [], initial_params(model)
    tolerance = {"float32": {"all_cnn": 1e-3, "lenet5": 1e-6}[model], "float64": 1e-12}
    for dtype in ("float32", "float64"):
        with precision(dtype):
            params, inputs = as_dtype(start, dtype), scaled(images, model, dtype)
            ours_loss, ours = jax_loss_and_gradients(model, params, inputs, labels)
            network = reference(model, params, dtype)
            loss = torch_loss(network.logits(inputs), labels)
            theirs = network.gradients(loss)
            why = "float32 rounding" if dtype == "float32" else "the same formula: float64 rounding alone"
            loss_tolerance = 1e-6 if dtype == "float32" else 1e-12
            checks.append(Check(f"{model}: loss, {dtype}", abs(float(ours_loss) - loss.item()), loss_tolerance, why))
            why = WHY_RELU if (model, dtype) == ("all_cnn", "float32") else why
            checks.append(Check(f"{model}: gradients, {dtype}", difference(ours, theirs), tolerance[dtype], why))
    return checks


def jax_optimizer(config: Config, params: Params, gradients: Sequence[Params]) -> Params:
    """The recipe's optimizer fed with these gradients."""
    tx = create_tx(config, steps_per_epoch=782)

    def step(carry: tuple[Any, Any], gradient: Any) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        return (jax.tree.map(jnp.add, params, updates), state), None

    carry = jax.tree.map(jnp.asarray, params), tx.init(params)
    (params, _), _ = jax.jit(lambda carry, xs: jax.lax.scan(step, carry, xs))(
        carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)
    )
    return params


def check_optimizer(config: Config, fed: Callable[[Config, Params, Sequence[Params]], Params]) -> list[Check]:
    """`fed` is the other framework's optimizer over the same 100 gradients; a tensor of 1,000 values stands for all."""
    checks = []
    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=1000) * 0.05}
    gradients = [{"kernel": rng.normal(size=1000) * 0.1} for _ in range(100)]
    # The schedule is computed in float32 by both, so float64 can't go below the rounding of the rate.
    for dtype, tolerance in (("float32", 5e-7), ("float64", 2e-8)):
        with precision(dtype):
            ours = jax_optimizer(config, as_dtype(start, dtype), as_dtype(gradients, dtype))
            theirs = fed(config, as_dtype(start, dtype), as_dtype(gradients, dtype))
        name = f"optimizer of {config.model}_reference, 100 fed gradients, {dtype}"
        why = "the rate is float32 in either type; with the rate outside the velocity the error is 100 times this"
        checks.append(
            Check(name, difference(ours, theirs), tolerance, why if dtype == "float64" else "float32 rounding")
        )
    return checks


def jax_trajectory(config: Config, params: Params, batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> Params:
    network, tx = MODELS[config.model](), create_tx(config, steps_per_epoch=782)

    @jax.jit
    def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        loss = lambda params: cross_entropy(network.apply({"params": params}, images), labels).mean()
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return jax.tree.map(jnp.add, params, updates), state

    state = tx.init(params)
    for images, labels in batches:
        params, state = step(params, state, images, labels)
    return params


def check_trajectory(
    reference: type[Reference], config: Config, images: np.ndarray, labels: np.ndarray, batch_size: int
) -> list[Check]:
    """Free steps of the recipe on the same batches, dropout and augmentation off, beside a control moved by one ulp."""
    params, inputs = initial_params(config.model), scaled(images, config.model)
    batches = [(inputs[i : i + batch_size], labels[i : i + batch_size]) for i in range(0, len(labels), batch_size)]
    ours = jax_trajectory(config, params, batches)
    moved = jax.tree.map(lambda leaf: np.nextafter(leaf, np.float32(np.inf), dtype=np.float32), params)
    floor = difference(ours, jax_trajectory(config, moved, batches))
    error = difference(ours, reference(config.model, params).train(config, batches))
    why = f"10 times the distance, {floor:.1e}, of a control whose initial weights are one ulp larger"
    name = f"{config.model}_reference: {len(batches)} free steps of {batch_size}"
    return [Check(name, error, max(10 * floor, 1e-7), why)]


def distribution_checks(name: str, ours: np.ndarray, theirs: np.ndarray) -> list[Check]:
    """Two samples of n values each: Kolmogorov–Smirnov distance, ratio of deviations, and the tails."""
    if not ours.any() and not theirs.any():
        return [Check(f"{name}, zero in both", 0.0, 0.0, "exact")]
    n = len(ours)
    distance = float(scipy.stats.ks_2samp(ours, theirs).statistic)
    critical = float(np.sqrt(-np.log(1e-5 / 2) / n))
    ratio = abs(ours.std() / theirs.std() - 1)
    checks = [
        Check(f"{name}, Kolmogorov–Smirnov of {n:,}", distance, critical, "chance exceeds it once in 1e5"),
        Check(f"{name}, ratio of deviations - 1", ratio, 5 / np.sqrt(n), "five deviations of a normal sample's"),
    ]
    if scipy.stats.kurtosis(theirs) < -0.6:  # uniform: the largest value tells the bound, to about its n-th part
        error = abs(np.abs(ours).max() / np.abs(theirs).max() - 1)
        checks.append(Check(f"{name}, ratio of bounds - 1", error, 15 / n, "the largest of n uniform draws"))
    else:  # normal: truncated at two deviations it would have no such share
        share = abs((np.abs(ours) > 2 * ours.std()).mean() - (np.abs(theirs) > 2 * theirs.std()).mean())
        checks.append(Check(f"{name}, share beyond 2σ, difference", share, 1.5 / np.sqrt(n), "five deviations"))
    return checks


def check_initial(reference: type[Reference], model: str, seeds: int) -> list[Check]:
    """Every initial tensor's distribution, the values of all seeds together."""
    ours, theirs = [], []
    for seed in range(seeds):
        torch.manual_seed(seed)
        ours.append(layers_from_params(initial_params(model, seed))[0])
        theirs.append(layers_from_params(reference(model).params())[0])
    pool = lambda networks, layer, part: np.concatenate([network[layer][part].ravel() for network in networks])
    checks = []
    for layer in range(len(ours[0])):
        for part, kind in enumerate(("kernel", "bias")):
            name = f"{model}: initial {kind} {layer + 1}"
            checks += distribution_checks(name, pool(ours, layer, part), pool(theirs, layer, part))
    return checks


def check_predictions(reference: type[Reference], path: Path, images: np.ndarray, labels: np.ndarray) -> list[Check]:
    """The same trained weights in both, over the test set: arg-max and mean loss, and the notebook's 4× smaller one."""
    weights = load_weights(path)
    network = reference(weights.model, weights.params)
    inputs = np.asarray(scale_images(jnp.asarray(images), weights.input_scaling))
    ours, theirs = [], []
    for i in range(0, len(labels), 500):
        batch = inputs[i : i + 500]
        ours.append(np.asarray(jax_logits(weights.model, weights.params, batch, weights.final_relu)))
        with torch.no_grad():
            theirs.append(network.logits(batch))
    our_logits, their_logits = np.concatenate(ours), torch.cat(theirs)
    ours_top, theirs_top = our_logits.argmax(-1), their_logits.argmax(-1).numpy()
    our_losses = np.asarray(cross_entropy(jnp.asarray(our_logits), jnp.asarray(labels)), np.float64)
    name = f"{path.stem} ({weights.model}, test accuracy {(ours_top == labels).mean():.2%})"
    margin = np.sort(our_logits, axis=-1)
    ties = int((margin[:, -1] - margin[:, -2] < 1e-4).sum())
    loss = torch_loss(their_logits, labels).item()
    # The notebook adds the means of 2,500 batches of 4 and divides by 10,000 images.
    batch_means = [torch_loss(their_logits[i : i + 4], labels[i : i + 4]).item() for i in range(0, len(labels), 4)]
    quirk = abs(our_losses.mean() / 4 - sum(batch_means) / len(labels))
    return [
        Check(f"{name}: differing arg-max of {len(labels):,}", float((ours_top != theirs_top).sum()), ties,
              "images whose two largest logits are within 1e-4"),
        Check(f"{name}: mean loss", abs(our_losses.mean() - loss), 1e-6, "float32 rounding"),
        Check(f"{name}: the notebook's 4× too small loss", quirk, 1e-6, "float32 rounding"),
    ]  # fmt: skip


def check_dropout_at_test(
    reference: type[Reference], path: Path, images: np.ndarray, labels: np.ndarray
) -> list[Check]:
    """Accuracy with dropout left on, as the notebook tests: the masks differ, so up to their noise."""
    weights = load_weights(path)
    config = RECIPES[f"{weights.model}_reference"]
    flax_network = MODELS[weights.model](dropout_rates=config.dropout_rates)
    network = reference(weights.model, weights.params)
    torch.manual_seed(0)
    ours, theirs = [], []
    apply = jax.jit(
        lambda key, batch: flax_network.apply({"params": weights.params}, batch, train=True, rngs={"dropout": key})
    )
    for i in range(0, len(labels), 500):
        batch = np.asarray(scale_images(jnp.asarray(images[i : i + 500]), weights.input_scaling))
        ours.append(np.asarray(apply(jax.random.key(i), batch)).argmax(-1) == labels[i : i + 500])
        with torch.no_grad():
            theirs.append(network.logits(batch, dropout=True).argmax(-1).numpy() == labels[i : i + 500])
    a, b = np.concatenate(ours), np.concatenate(theirs)
    noise = 4 * np.sqrt((a != b).sum()) / len(labels)
    name = f"{path.stem}: accuracy with dropout on, ours {a.mean():.2%}, theirs {b.mean():.2%}"
    return [Check(name, abs(a.mean() - b.mean()), noise, "four deviations of the images on which two draws differ")]


# --- the command ---


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compares cifar_jax with the reference networks; exit status 1 if a check fails."""

    layers: bool = False
    """Compare every layer's activations as well."""
    json: bool = False
    """Print JSON."""
    out: Path | None = None
    """Write the JSON to this file, too."""
    dataset: Literal["cifar10", "digits"] = "cifar10"
    """The data; digits is embedded."""
    data_dir: str | None = None
    """Where to look for CIFAR-10 first."""
    weights: tuple[Path, ...] = ()
    """Trained weights to compare predictions with; without: those in cifar_jax/pretrained."""
    images: int = 256
    """Test images for the logits."""
    steps: int = 20
    """Free steps of the trajectories."""
    batch_size: int = 64
    """Of gradients and of the All-CNN's trajectory."""
    seeds: int = 8
    """Initialisations whose values are pooled."""
    test_images: int = 10_000
    """Test images for the predictions."""


def common_checks(reference: type[Reference], arguments: Arguments, dataset: Dataset) -> list[Check]:
    """All checks that both scripts make, on both networks."""
    checks: list[Check] = []
    images, labels = dataset.test_images, dataset.test_labels
    for model in MODELS:
        checks += check_logits(reference, model, images[: arguments.images])
        if arguments.layers:
            checks += check_activations(reference, model, images[: arguments.batch_size])
        checks += check_gradients(reference, model, images[: arguments.batch_size], labels[: arguments.batch_size])
        checks += check_initial(reference, model, arguments.seeds)
    for path in arguments.weights:
        checks += check_predictions(reference, path, images[: arguments.test_images], labels[: arguments.test_images])
    return checks


def run(prog: str, packages: Sequence[str], checks_of: Callable[[Arguments, Dataset], list[Check]]) -> int:
    """Parses the command line, makes the checks, prints the table; 0 if all passed, 1 if not, 2 for bad input."""

    @command
    def main() -> int:
        flags = (tyro.conf.FlagCreatePairsOff,)
        arguments = parse_arguments(lambda: tyro.cli(Arguments, prog=prog, config=flags))
        if not arguments.weights:
            pretrained = Path(__file__).resolve().parent.parent / "cifar_jax" / "pretrained"
            arguments = dataclasses.replace(arguments, weights=tuple(sorted(pretrained.glob("*.safetensors"))))
        for path in arguments.weights:
            load_weights(path)  # a bad file is refused now and not after the other checks
        dataset = load_dataset(arguments.dataset, arguments.data_dir)
        checks = [
            dataclasses.replace(check, error=float(check.error), tolerance=float(check.tolerance))
            for check in checks_of(arguments, dataset)
        ]
        failed = [check for check in checks if not check.passed]
        content = {
            "command": f"python {prog}",
            **describe_environment(jax.local_devices()[:1], (*PACKAGES, *packages)),
            "dataset": arguments.dataset,
            "passed": not failed,
            "checks": [dataclasses.asdict(check) | {"passed": check.passed} for check in checks],
        }
        if arguments.out is not None:
            write_json(arguments.out, content)
        if arguments.json:
            print(json.dumps(content, indent=2))
        else:
            width = max(len(check.name) for check in checks)
            print(f"{'check':{width}} {'error':>9} {'tolerance':>9}")
            for check in checks:
                verdict = "pass" if check.passed else "FAIL"
                print(f"{check.name:{width}} {check.error:9.1e} {check.tolerance:9.1e} {verdict}")
            print(f"{len(checks) - len(failed)} of {len(checks)} checks passed")
        return int(bool(failed))

    return main()


if __name__ == "__main__":
    print("run parity_keras.py or parity_pytorch.py", file=sys.stderr)
    sys.exit(2)
