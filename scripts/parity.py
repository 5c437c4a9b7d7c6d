"""What parity_keras.py and parity_pytorch.py share: the checks that compare cifar_jax with a reference network.

A reference is one of the two networks in Keras (on its PyTorch backend) or PyTorch, seen through the class Reference,
in Flax' layouts. Every check returns rows of (name, error, tolerance, why that tolerance).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from cifar_jax.batches import scale_images, split_seed
from cifar_jax.cli import command, parse_arguments
from cifar_jax.configs import RECIPES
from cifar_jax.configs.base import Config
from cifar_jax.datasets import Dataset, load_dataset
from cifar_jax.environment import PACKAGES, describe_command, describe_environment
from cifar_jax.errors import UserError
from cifar_jax.evaluate import Evaluator, load_file
from cifar_jax.host import compiler_options, prepare_cpu
from cifar_jax.io import write_json
from cifar_jax.models import MODELS
from cifar_jax.ops import winograd
from cifar_jax.optimizer import create_tx
from cifar_jax.parallel import dividing_count, parallelize, replicate
from cifar_jax.pretrained import pretrained_names, pretrained_path
from cifar_jax.train_step import TrainState, create_train_state, create_train_step, cross_entropy
from cifar_jax.weights.files import load_weights
from cifar_jax.weights.params import Params, expected_shapes, layers_from_params


def not_installed(error: ImportError) -> NoReturn:
    what = f"{error.name} is not installed" if isinstance(error, ModuleNotFoundError) else f"can't import: {error}"
    print(f"error: {what}: pip install -e '.[parity]'", file=sys.stderr)
    sys.exit(2)


try:
    import scipy.stats
    import torch
except ImportError as error:
    not_installed(error)

DRAWS = 5  # of the dropout masks at test
FedOptimizer = Callable[[Config, Params, Sequence[Params]], Params]
WHY_RELU = "near-ties of ReLU and max pool fall to either side in float32, float64 shows the semantics"
WHY_FLOAT64 = "the same formula: float64 rounding alone"
# Of gradients in float32, measured on CIFAR-10. A flip is as large between PyTorch's own float32 and float64 gradients.
FLOORS = {"all_cnn": "3e-3", "lenet5": "6e-6, with a flip 1e-3"}


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

    def as_json(self) -> dict[str, Any]:
        """Its fields and 'passed'; an error that is no number, which JSON has not, is None."""
        error = float(self.error) if np.isfinite(self.error) else None
        return dataclasses.asdict(self) | {"error": error, "tolerance": float(self.tolerance), "passed": self.passed}


class Reference(Protocol):
    """One of the two networks in another framework. Images are float NHWC arrays; params are Flax'."""

    def __init__(
        self, model: str, params: Params | None = None, dtype: str = "float32", final_relu: bool = False
    ) -> None:
        """Without params: initialised by the framework, from torch.manual_seed's state. final_relu: see AllCNN."""

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


def difference(ours: Any, theirs: Any) -> float:
    """The maximum absolute difference of two arrays or trees of one structure."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    errors = [np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max() for a, b in pairs]
    return float(np.max(errors))  # max() would pass over a NaN


def relative_difference(ours: Any, theirs: Any) -> float:
    """The largest, over the tensors, of the maximum absolute difference by the largest value of theirs."""
    tensors = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return float(np.max([difference(a, b) / np.abs(b).max() for a, b in tensors]))


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


def dividing_devices(count: int) -> list[jax.Device]:
    """As many of the devices as `count` divides by."""
    devices = jax.local_devices()
    return devices[: dividing_count(count, len(devices))]


def divided(images: np.ndarray) -> jax.Array:
    """A batch over as many devices as it divides by, so that what is computed of it is, too."""
    mesh = jax.sharding.Mesh(np.array(dividing_devices(len(images))), ("batch",))
    return jax.device_put(images, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch")))


def jax_logits(model: str, params: Params, images: np.ndarray | jax.Array, final_relu: bool = False) -> jax.Array:
    return jitted_apply(model, images.dtype, final_relu)(params, images)


def jax_loss_and_gradients(model: str, params: Params, images: np.ndarray, labels: np.ndarray) -> tuple[Any, Params]:
    network = MODELS[model](dtype=images.dtype)
    loss = lambda params, images, labels: cross_entropy(network.apply({"params": params}, images), labels).mean()
    return jax.jit(jax.value_and_grad(loss))(params, images, labels)


def torch_loss(logits: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, torch.tensor(labels, dtype=torch.int64))


# --- the checks ---


def check_logits(reference: type[Reference], model: str, images: np.ndarray) -> list[Check]:
    params, inputs = initial_params(model), scaled(images, model)
    with torch.no_grad():
        theirs = reference(model, params).logits(inputs)
    error = relative_difference(jax_logits(model, params, inputs), theirs.numpy())
    name = f"{model}: logits of {len(images)} images, relative to the largest"
    return [Check(name, error, 5e-6, "float32 sums in another order: floor 5e-7")]


def check_activations(reference: type[Reference], model: str, images: np.ndarray) -> list[Check]:
    """Layer by layer, to find where a port goes wrong."""
    params, inputs = initial_params(model), scaled(images, model)
    capture = lambda params: MODELS[model]().apply({"params": params}, inputs, capture_intermediates=True)[1]
    layers = jax.jit(capture)(params)["intermediates"]
    theirs = reference(model, params).activations(inputs)
    checks = []
    for (name, _, _), other in zip(expected_shapes(model), theirs, strict=True):
        ours = layers[name]["__call__"][0]
        last = other.shape[-1] == 10  # has no ReLU
        error = difference(ours if last else jax.nn.relu(ours), other)
        checks.append(Check(f"{model}: activations of {name}", error, 1e-5, "float32 sums in another order"))
    return checks


def without_ties(images: np.ndarray) -> np.ndarray:
    """uint8 images whose lowest three bits are noise.

    Where an image is flat, the values of a max pool's window are equal but for rounding, which then decides where the
    gradient goes: in Winograd's form otherwise than in PyTorch's sums.
    """
    return images & 0xF8 | np.random.default_rng(0).integers(0, 8, images.shape, dtype=np.uint8)


def check_gradients(reference: type[Reference], model: str, images: np.ndarray, labels: np.ndarray) -> list[Check]:
    """Loss and gradients of a batch, float32 and float64, dropout off; and on the images as they are, without
    Winograd's form, in float64."""
    checks, start = [], initial_params(model)
    tolerance = {"float32": {"all_cnn": 2e-2, "lenet5": 1.5e-3}[model], "float64": 1e-12}

    def errors(images: np.ndarray, dtype: str) -> tuple[float, float]:
        with jax.enable_x64(dtype == "float64"):
            params, inputs = as_dtype(start, dtype), scaled(images, model, dtype)
            ours_loss, ours = jax_loss_and_gradients(model, params, inputs, labels)
            network = reference(model, params, dtype)
            loss = torch_loss(network.logits(inputs), labels)
            return abs(float(ours_loss) - loss.item()), relative_difference(ours, network.gradients(loss))

    for dtype in ("float32", "float64"):
        loss_error, error = errors(without_ties(images), dtype)
        why = "float32 rounding: floor 2e-7" if dtype == "float32" else WHY_FLOAT64
        checks.append(Check(f"{model}: loss, {dtype}", loss_error, 1e-6 if dtype == "float32" else 1e-12, why))
        why = f"{WHY_RELU}: floor {FLOORS[model]}" if dtype == "float32" else WHY_FLOAT64
        name = f"{model}: gradients, {dtype}, low 3 bits of pixels random, relative to each tensor's largest"
        checks.append(Check(name, error, tolerance[dtype], why))
    with mock.patch.object(winograd, "pays", return_value=False):
        _, error = errors(images, "float64")
    name = (
        f"{model}: gradients, float64, images as they are, without Winograd's form, relative to each tensor's largest"
    )
    return [*checks, Check(name, error, tolerance["float64"], WHY_FLOAT64)]


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


def check_optimizer(config: Config, fed: FedOptimizer) -> list[Check]:
    """`fed` is the other framework's optimizer over the same 100 gradients; a tensor of 1,000 values stands for all."""
    checks = []
    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=1000) * 0.05}
    gradients = [{"kernel": rng.normal(size=1000) * 0.1} for _ in range(100)]
    why = "float32 rounding of 100 steps: floor 4e-9, Keras 2e-7; with the rate outside the velocity 1e-4"
    rows = (("float32", 5e-7, why), ("float64", 1e-14, WHY_FLOAT64))
    for dtype, tolerance, why in rows:
        with jax.enable_x64(dtype == "float64"):
            ours = jax_optimizer(config, as_dtype(start, dtype), as_dtype(gradients, dtype))
            theirs = fed(config, as_dtype(start, dtype), as_dtype(gradients, dtype))
        name = f"optimizer of {config.model}_reference, 100 fed gradients, {dtype}"
        checks.append(Check(name, difference(ours, theirs), tolerance, why))
    return checks


def without_randomness(config: Config) -> Config:
    """The recipe without dropout and augmentation."""
    return dataclasses.replace(
        config, dropout_rates=(0.0,) * len(config.dropout_rates), rotation_degrees=0.0, shift_fraction=0.0,
        crop_padding=0, random_flip=False, alternating_flip=False, cutout_size=0,
    )  # fmt: skip


def jax_trajectories(
    config: Config, starts: Sequence[Params], batches: Sequence[tuple[np.ndarray, np.ndarray]]
) -> list[Params]:
    """From each start, the weights after a train_step of the recipe on every (uint8 images, labels), over as many
    devices as those divide by."""
    config, count = without_randomness(config), len(batches[0][1])
    train_step, devices = create_train_step(config), dividing_devices(count)
    part = count // len(devices)

    def step_of(state: TrainState, batch: Any, device: jax.Array) -> Any:
        return train_step(state, jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, device * part, part), batch))

    compile_for = parallelize(step_of, devices, (), compiler_options(config, count, devices))
    fresh, ends, step = create_train_state(config, steps_per_epoch=782), [], None
    for params in starts:
        state = replicate(fresh.replace(params=params, opt_state=fresh.tx.init(params)), devices)
        for images, labels in batches:
            batch = {"image": images, "label": labels, "mask": np.ones(len(labels), np.float32)}
            batch = replicate(batch, devices)
            step = step or compile_for(state, batch)
            state, _ = step(state, batch)
        ends.append(jax.device_get(state.params))
    return ends


def check_trajectory(
    reference: type[Reference], config: Config, images: np.ndarray, labels: np.ndarray, batch_size: int
) -> list[Check]:
    """Free steps of the recipe on the same batches, dropout and augmentation off, beside a control moved by one ulp."""
    params = initial_params(config.model)
    parts = [slice(i, i + batch_size) for i in range(0, len(labels), batch_size)]
    batches = [(images[part], labels[part]) for part in parts]
    moved = jax.tree.map(lambda leaf: np.nextafter(leaf, np.float32(np.inf), dtype=np.float32), params)
    ours, control = jax_trajectories(config, (params, moved), batches)
    floor = difference(ours, control)
    their_batches = [(scaled(images[part], config.model), labels[part]) for part in parts]
    error = difference(ours, reference(config.model, params).train(config, their_batches))
    why = f"10 times the distance, {floor:.1e}, of a control whose initial weights are one ulp larger; at least 1e-7"
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
    network = reference(weights.model, weights.params, final_relu=weights.final_relu)
    inputs = np.asarray(scale_images(jnp.asarray(images), weights.input_scaling))
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
    # The notebook adds the mean losses of batches of 4, and divides by the number of images.
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
    """Mean accuracy with dropout left on, as the notebook tests: each framework draws its masks, DRAWS times."""
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
    inputs = np.asarray(scale_images(jnp.asarray(images), weights.input_scaling))
    with torch.no_grad():
        logits = [
            torch.cat([network.logits(inputs[i : i + 500], dropout=True) for i in range(0, len(labels), 500)])
            for _ in range(DRAWS)
        ]
    correct = np.stack([draw.argmax(-1).numpy() == labels for draw in logits])
    rates = correct.mean(axis=0)  # of each image
    deviation = np.sqrt(2 * (rates * (1 - rates)).sum() / (DRAWS - 1)) / len(labels)
    a, b = np.mean(ours), correct.mean()
    name = f"{path.stem}: mean accuracy of {DRAWS} draws with dropout on, ours {a:.2%}, theirs {b:.2%}"
    return [Check(name, abs(a - b), 4 * deviation, "four deviations of the draws' difference")]


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


def common_checks(
    reference: type[Reference], config: Config, fed_optimizer: FedOptimizer, arguments: Arguments, dataset: Dataset
) -> list[Check]:
    """All checks that both scripts make: on both networks, and of the original's own recipe."""
    checks: list[Check] = []
    batch_size = arguments.batch_size if config.model == "all_cnn" else config.batch_size
    start, count = (dataset.train_images, dataset.train_labels), arguments.steps * batch_size
    if count > len(dataset.train_labels):
        raise UserError(f"--steps {arguments.steps}: {batch_size} images each are more than the training set has")
    images, labels = dataset.test_images, dataset.test_labels
    for model in MODELS:
        checks += check_logits(reference, model, images[: arguments.images])
        if arguments.layers:
            checks += check_activations(reference, model, images[: arguments.batch_size])
        checks += check_gradients(reference, model, images[: arguments.batch_size], labels[: arguments.batch_size])
        checks += check_initial(reference, model, arguments.seeds)
    for path in arguments.weights:
        checks += check_predictions(reference, path, images[: arguments.test_images], labels[: arguments.test_images])
    checks += check_optimizer(config, fed_optimizer)
    return checks + check_trajectory(reference, config, *(array[:count] for array in start), batch_size)


def run(prog: str, packages: Sequence[str], checks_of: Callable[[Arguments, Dataset], list[Check]]) -> int:
    """Parses the command line, makes the checks, prints the table; 0 if all passed, 1 if not, 2 for bad input."""

    @command
    def main() -> int:
        flags = (tyro.conf.FlagCreatePairsOff,)
        arguments = parse_arguments(Arguments, prog=prog, config=flags)
        if not arguments.weights:
            arguments = dataclasses.replace(arguments, weights=tuple(map(pretrained_path, pretrained_names())))
        for name in ("images", "steps", "batch_size", "seeds", "test_images"):
            if getattr(arguments, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be 1 or more")
        out = arguments.out
        if out is not None and not out.parent.is_dir():
            raise UserError(f"--out {out}: there is no folder {out.parent}")
        if out is not None and (out.is_dir() or not os.access(out.parent, os.W_OK)):
            raise UserError(f"--out {out}: can't be written: name a file")
        prepare_cpu()
        if not arguments.weights:
            raise UserError("there are no weight files in cifar_jax/pretrained: name some with --weights")
        for path in arguments.weights:
            load_weights(path)  # a bad file is refused now and not after the other checks
        dataset = load_dataset(arguments.dataset, arguments.data_dir)
        with jax.default_matmul_precision("highest"):  # else TensorFloat-32 on NVIDIA's GPUs
            checks = checks_of(arguments, dataset)
        failed = [check for check in checks if not check.passed]
        content = {
            "command": describe_command(prog, sys.argv[1:]),
            **describe_environment(jax.local_devices(), (*PACKAGES, *packages)),
            "dataset": arguments.dataset,
            "passed": not failed,
            "checks": [check.as_json() for check in checks],
        }
        try:
            if arguments.json:
                print(json.dumps(content, indent=2))
            else:
                width = max(len(check.name) for check in checks)
                print(f"{'check':{width}} {'error':>9} {'tolerance':>9}")
                for check in checks:
                    verdict = "pass" if check.passed else "FAIL"
                    print(f"{check.name:{width}} {check.error:9.1e} {check.tolerance:9.1e} {verdict}")
                print(f"{len(checks) - len(failed)} of {len(checks)} checks passed")
        finally:  # whichever fails, the other is there
            if out is not None:
                write_json(out, content)
        return int(bool(failed))

    return main()


if __name__ == "__main__":
    print("run parity_keras.py or parity_pytorch.py", file=sys.stderr)
    sys.exit(2)
