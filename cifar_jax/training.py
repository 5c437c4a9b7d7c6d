"""TrainState, the loss, train_step and eval_step, and the only place that calls pmap.

A step is a pure function of (state, batch) on one device. `parallelize` runs it on all local devices: the state and
the dataset are replicated, each device takes its slice of every global batch, gradients are averaged with pmean.
pmap is in maintenance mode (JAX runs it as jit + shard_map); leaving it means changing this file alone. Beware:
under shard_map gradients of replicated parameters arrive already summed, and here a forgotten pmean is silent.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from jax import lax

from cifar_jax.augmentation import create_augment, is_mirrored, mix, trivial_augment
from cifar_jax.configs.default import Config
from cifar_jax.errors import UserError
from cifar_jax.input_pipeline import scale_images, split_seed, take_batch
from cifar_jax.models import MODELS, unit_variance
from cifar_jax.symmetry import symmetric_gradients, symmetric_start

AXIS = "devices"
MIN_BATCH_OF_A_CORE = 16  # with fewer, the hand-over between cores costs more than the second core gains
Metrics = dict[str, jax.Array]
Batch = dict[str, jax.Array]


class TrainState(train_state.TrainState):
    """Flax's TrainState (step, params, tx, opt_state), the key from which every step's randomness is folded, and the
    average of the parameters, if the recipe has one, named after its first kind (see `create_averaging_share`)."""

    rng: jax.Array
    ema_params: Any = None

    @property
    def eval_params(self) -> Any:
        """What is evaluated and released: the average, else the parameters."""
        return self.params if self.ema_params is None else self.ema_params


def swa_steps(config: Config, steps_per_epoch: int) -> tuple[int, int]:
    """The step at which the cycles of stochastic weight averaging begin, and the steps of each; the latter 0: none."""
    total_steps = config.num_epochs * steps_per_epoch
    cycle_steps = int(config.swa_fraction * total_steps / config.swa_cycles)
    return total_steps - config.swa_cycles * cycle_steps, cycle_steps


def create_schedule(config: Config, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate by step, float32."""
    start, cycle_steps = swa_steps(config, steps_per_epoch)
    rate, warmup = config.learning_rate, min(round(config.warmup_fraction * start), start - 1)
    corners = jnp.array([0, max(warmup, 1), start], jnp.float32)
    rates = jnp.array([0 if warmup else rate, rate, 0], jnp.float32)
    schedule = {
        "constant": optax.constant_schedule(rate),
        "inverse_time": lambda step: rate / (1.0 + config.lr_decay * step),  # Keras 2's SGD(decay=…), optimizers.py
        "cosine": optax.warmup_cosine_decay_schedule(0.0, rate, warmup, start),
        "one_cycle": lambda step: jnp.interp(step, corners, rates),
    }[config.schedule]
    if cycle_steps:
        cycle = optax.linear_schedule(config.swa_learning_rate, 0.0, cycle_steps)
        starts = [start + number * cycle_steps for number in range(config.swa_cycles)]
        schedule = optax.join_schedules([schedule, *[cycle] * config.swa_cycles], starts)
    return lambda step: schedule(jnp.asarray(step, jnp.float32))  # optax mixes the step's type with float32


def create_averaging_share(config: Config, steps_per_epoch: int) -> Callable[[jax.Array | int], jax.Array]:
    """The share of the parameters in their average, float32, by the number of steps taken, int32.

    It is an exponential moving average until the cycles of stochastic weight averaging; then the mean of what it was
    and of the parameters at the end of each cycle.
    """
    start, cycle_steps = swa_steps(config, steps_per_epoch)

    def share(step: jax.Array | int) -> jax.Array:
        taken = jnp.asarray(step, jnp.float32)
        moving = 1 - jnp.minimum(config.ema_decay, taken / (taken + 10))  # at first it forgets the initial parameters
        if cycle_steps == 0:
            return moving
        ended = jnp.where((step - start) % cycle_steps == 0, 1 / (1 + (taken - start) / cycle_steps), 0.0)
        return jnp.where(step <= start, moving, ended)

    return share


def create_tx(config: Config, steps_per_epoch: int) -> optax.GradientTransformationExtraArgs:
    """The recipe's optimizer. With sam_rho its update takes grad_fn(params, _), under the axis AXIS.

    Keras keeps the rate inside the velocity, v ← μv − lr_t·g; PyTorch (and optax.sgd) outside, p ← p − lr_t·v. With
    a changing rate they are not the same optimizer.
    """
    schedule = create_schedule(config, steps_per_epoch)
    symmetric = [symmetric_gradients()] if config.mirror_symmetry else []
    clip = [optax.clip_by_global_norm(config.gradient_clip)] if config.gradient_clip else []
    first = [*symmetric, *clip]
    if config.optimizer == "muon":
        tx = optax.chain(*first, _create_muon(config, schedule))
    else:
        trace = optax.trace(config.momentum, config.nesterov)
        rate = optax.scale_by_learning_rate(schedule)
        parts = [rate, trace] if config.optimizer == "keras_sgd" else [trace, rate]
        decay = [optax.add_decayed_weights(config.weight_decay)] if config.weight_decay else []
        tx = optax.chain(*first, *decay, *parts)
    if config.sam_rho:
        climb = optax.chain(*symmetric, optax.contrib.normalize(), optax.sgd(config.sam_rho))
        tx = optax.contrib.sam(tx, climb, opaque_mode=True, batch_axis_name=AXIS)
    return optax.with_extra_args_support(tx)


def _create_muon(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon for all kernels but the last layer's, as matrices [inputs, outputs]; Adam for the rest."""

    def dimension_numbers(params: Any) -> Any:
        matrix = lambda x: optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), (x.ndim - 1,))
        adams = lambda path, x: x.ndim == 1 or path[0].key == max(params)  # names sort in the order of the layers
        return jax.tree_util.tree_map_with_path(lambda path, x: None if adams(path, x) else matrix(x), params)

    return optax.contrib.muon(
        schedule,
        beta=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        adam_weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=dimension_numbers,
        consistent_rms=0.2,
    )


def create_train_state(config: Config, steps_per_epoch: int, images: Any = None) -> TrainState:
    """Model, initial parameters and optimizer state, all from config.seed.

    `images`, uint8 [N, 32, 32, 3], are what the lsuv initializer scales its kernels by; without them it does not, which
    is enough where parameters are only restored.
    """
    model = MODELS[config.model](
        dropout_rates=config.dropout_rates, initializer=config.initializer, dtype=jnp.dtype(config.dtype)
    )
    params_key, rng, _ = split_seed(config.seed)
    params = jax.jit(model.init)(params_key, jnp.zeros((1, 32, 32, 3)))["params"]
    if config.mirror_symmetry:
        params = symmetric_start(params)
    if config.initializer == "lsuv" and images is not None:
        params = unit_variance(model, params, scale_images(jnp.asarray(images), config.input_scaling))
    tx = create_tx(config, steps_per_epoch)
    averages = config.ema_decay > 0 or config.swa_fraction > 0
    ema_params = jax.tree.map(jnp.copy, params) if averages else None
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx, rng=rng, ema_params=ema_params)
    return state.replace(step=jnp.zeros((), jnp.int32))  # create's Python 0 would compile the step twice


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy by example. Args: logits float32 [N, C]; labels int32 [N]. Returns: float32 [N], nats."""
    if label_smoothing == 0.0:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def is_correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1 where the largest logit is the label's, else 0: float32 [N]."""
    return (logits.argmax(-1) == labels).astype(jnp.float32)


def step_keys(rng: jax.Array, step: jax.Array | int) -> jax.Array:
    """The two keys of a training step: of augmentation and of dropout."""
    return jax.random.split(jax.random.fold_in(rng, step))


def augmentation_keys(rng: jax.Array, step: jax.Array | int, positions: jax.Array) -> jax.Array:
    """The keys of a step's images, by position in the global batch: the same whatever the number of devices."""
    augment_rng, _ = step_keys(rng, step)
    return jax.vmap(lambda i: jax.random.fold_in(augment_rng, i))(positions)


def create_train_step(
    config: Config, image_size: int = 32
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The recipe's train_step(state, batch) → (state, metrics), to run under the axis AXIS, on images of that size.

    batch is `take_batch`'s; also 'epoch', int32 from 0, for alternating flips, and 'averaging_share', float32, where
    parameters are averaged. metrics are of the global batch before the update: 'loss' float32, the mean over its
    examples (the recipe's loss, dropout on), 'correct' int32, 'count' int32.
    """
    augment = create_augment(config)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        device, num_devices, size = lax.axis_index(AXIS), lax.axis_size(AXIS), batch["label"].shape[0]
        _, dropout_rng = step_keys(state.rng, state.step)
        keys = augmentation_keys(state.rng, state.step, device * size + jnp.arange(size, dtype=jnp.int32))
        images = batch["image"]
        if config.trivial_augment:
            images = jax.vmap(lambda key, image: trivial_augment(jax.random.fold_in(key, 4), image))(keys, images)
        if config.alternating_flip:
            mirrored = is_mirrored(state.rng, batch["index"], batch["epoch"])
            images = jnp.where(mirrored.reshape(-1, 1, 1, 1), images[:, :, ::-1], images)
        images = augment(keys, scale_images(images, config.input_scaling))
        if image_size != images.shape[1]:
            images = jax.image.resize(images, (size, image_size, image_size, 3), "linear")  # antialiased
        if config.mixes:
            mix_rng = jax.random.fold_in(jax.random.fold_in(dropout_rng, device), 1)
            place, real = jnp.arange(size), batch["mask"].sum().astype(jnp.int32)
            partner = jnp.where(place < real, real - 1 - place, place)  # the reversed batch, without its padding
            images, share = mix(mix_rng, images, images[partner], config.mixup_alpha, config.cutmix_alpha)
        count = lax.psum(batch["mask"].sum(), AXIS)

        def loss_fn(params: Any) -> tuple[jax.Array, jax.Array]:
            rngs = {"dropout": jax.random.fold_in(dropout_rng, device)}
            logits = state.apply_fn({"params": params}, images, train=True, rngs=rngs)
            losses = cross_entropy(logits, batch["label"], config.label_smoothing)
            if config.mixes:
                others = cross_entropy(logits, batch["label"][partner], config.label_smoothing)
                losses = share * losses + (1 - share) * others
            # Times num_devices: pmean of these is the mean over the global batch, also of a partial one.
            return (losses * batch["mask"]).sum() * num_devices / count, logits

        (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        grad_fn = lambda params, _: jax.grad(loss_fn, has_aux=True)(params)[0]
        updates, opt_state = state.tx.update(lax.pmean(grads, AXIS), state.opt_state, state.params, grad_fn=grad_fn)
        params = optax.apply_updates(state.params, updates)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        if state.ema_params is not None:
            average = optax.incremental_update(state.params, state.ema_params, batch["averaging_share"])
            state = state.replace(ema_params=average)
        correct = (is_correct(logits, batch["label"]) * batch["mask"]).sum()
        metrics = {
            "loss": lax.pmean(loss, AXIS),
            "correct": lax.psum(correct, AXIS).astype(jnp.int32),
            "count": count.astype(jnp.int32),
        }
        return state, metrics

    return train_step


def create_eval_step(
    config: Config, dropout: bool = False, mirror: bool = False
) -> Callable[[TrainState, Batch], Metrics]:
    """eval_step(state, batch) → sums over the global batch's examples: 'loss' float32, 'correct' and 'count' int32.

    With `dropout` the network runs as in training, as the PyTorch notebook, which never calls .eval(), tests it. With
    `mirror` the logits are the means of those of an image and of its mirror image: test-time augmentation.
    """

    def eval_step(state: TrainState, batch: Batch) -> Metrics:
        rng = jax.random.fold_in(jax.random.fold_in(state.rng, batch["start"]), lax.axis_index(AXIS))
        images = scale_images(batch["image"], config.input_scaling)
        apply = lambda images: state.apply_fn(
            {"params": state.eval_params}, images, train=dropout, rngs={"dropout": rng}
        )
        logits = (apply(images) + apply(images[:, :, ::-1])) / 2 if mirror else apply(images)
        labels, mask = batch["label"], batch["mask"]
        values = cross_entropy(logits, labels), is_correct(logits, labels), jnp.ones_like(mask)
        loss, correct, count = (lax.psum((x * mask).sum(), AXIS) for x in values)
        return {"loss": loss, "correct": correct.astype(jnp.int32), "count": count.astype(jnp.int32)}

    return eval_step


# --- the devices ---


def cpu_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_cpu_cores() -> None:
    """Makes every core of the CPU a device. For commands, before anything asks JAX for its devices.

    XLA runs parts of a step on one core; with its batch divided, LeNet-5's step at 128 is 1.5 times faster on two.
    """
    unset = "JAX_NUM_CPU_DEVICES" not in os.environ and "device_count" not in os.environ.get("XLA_FLAGS", "")
    if unset:
        with contextlib.suppress(RuntimeError):  # the devices are there already
            jax.config.update("jax_num_cpu_devices", cpu_cores())


# mallopt's parameters (malloc.h): free bytes that are given back, bytes asked for ahead, number of blocks mapped.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_HEAP_BYTES = 60 * 2**20  # below the 64 MiB of a heap of the C library
_LARGEST_ARRAY = {"all_cnn": 34 * 36 * 96 * 4, "lenet5": 32 * 32 * 32 * 4}  # bytes of an image's largest, padded


def keep_memory() -> None:
    """Makes the C library (glibc; of others nothing is asked) keep freed memory for the process.

    By default a step's large buffers are given back to the system, and mapped and zeroed again in the next step:
    LeNet-5's step at 256 then takes 1.6 times as long. A thread's memory comes in heaps of 64 MiB: an empty one is kept
    if more than that is asked for ahead; a larger block is mapped each time, see `compiler_options`.
    """
    with contextlib.suppress(OSError, AttributeError):  # no such library or function
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_TOP_PAD, 2**28)


def compiler_options(config: Config, batch_size: int, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """XLA's for a step: on the CPU its temporary arrays in blocks of _HEAP_BYTES, which `keep_memory` can keep.

    Not if a single array were larger: XLA warns of each.
    """
    fits = batch_size // len(devices) * _LARGEST_ARRAY[config.model] <= _HEAP_BYTES
    return {"xla_multiheap_size_constraint_per_heap": _HEAP_BYTES} if devices[0].platform == "cpu" and fits else {}


def prepare_cpu() -> None:
    """What commands do after reading their flags, so that the CPU is used well: see use_cpu_cores and keep_memory.

    Raises: UserError if JAX has no device.
    """
    use_cpu_cores()
    keep_memory()
    check_devices()


def check_devices() -> None:
    """Raises: UserError if JAX has no device, as JAX_PLATFORMS names one that is not there."""
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(f"JAX finds no device: install for it (README), or unset JAX_PLATFORMS={asked}") from error


def dividing_count(batch_size: int, at_most: int) -> int:
    """The largest number of devices that a batch divides over."""
    return max(n for n in range(1, at_most + 1) if batch_size % n == 0)


def select_devices(config: Config) -> list[jax.Device]:
    """The local devices of a run: num_devices, else all; CPU cores only where each gets MIN_BATCH_OF_A_CORE images.

    Raises: UserError if there are too few or the batch does not divide.
    """
    devices = jax.local_devices()
    count = config.num_devices or len(devices)
    if config.num_devices is None and devices[0].platform == "cpu":
        most = max(1, config.batch_size // MIN_BATCH_OF_A_CORE)
        count = dividing_count(config.batch_size, min(count, most))
    if count > len(devices):
        raise UserError(f"--num-devices {count}: this machine has {len(devices)}")
    if config.batch_size % count:
        raise UserError(
            f"--batch-size {config.batch_size} does not divide over {count} devices: "
            f"use a multiple of {count}, or --num-devices {dividing_count(config.batch_size, count - 1)}"
        )
    return devices[:count]


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """A copy of every array on every device."""
    mesh = jax.sharding.Mesh(np.array(devices), (AXIS,))
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def default_steps_per_call(model: str, devices: Sequence[jax.Device]) -> int:
    """Enough to hide the dispatch; 1 for All-CNN on the CPU, whose convolutions are several times slower in a loop.

    LeNet-5's, in the forms of ops.py, are not.
    """
    if devices[0].platform == "cpu":
        return {"all_cnn": 1, "lenet5": 16}[model]
    return 1000


def parallelize(
    function: Callable[..., Any], devices: Sequence[jax.Device], donate: tuple[int, ...], options: dict[str, Any]
) -> Any:
    """pmaps `function(*args, device_index)`; args are replicated, and so are the results; `options` are the compiler's.

    Returns a compiler: called with example arguments it gives the compiled function, which can't compile again.
    """
    index = jnp.arange(len(devices), dtype=jnp.int32)

    def compile_for(*args: Any) -> Callable[..., Any]:
        in_axes = (None,) * len(args) + (0,)
        parallel = jax.pmap(
            function, AXIS, in_axes=in_axes, out_axes=None, donate_argnums=donate, devices=list(devices)
        )
        compiled = parallel.lower(*args, index).compile(options)
        return lambda *args: compiled(*args, index)

    return compile_for


def _repeat(step: Callable[[Any, Any], Any], start: jax.Array, count: jax.Array, carry: Any, at_most: int) -> Any:
    """`step(i, carry)` for i in start … start+count; without a loop if that is one step."""
    return step(start, carry) if at_most == 1 else lax.fori_loop(start, start + count, step, carry)


def _record(history: Metrics, index: jax.Array, metrics: Metrics) -> Metrics:
    return {name: values.at[index].set(metrics[name]) for name, values in history.items()}


def create_history(num_steps: int) -> Metrics:
    """Room on the device for the metrics of `num_steps` steps: they are fetched once, not step by step."""
    zeros = lambda dtype: jnp.zeros((num_steps,), dtype)
    return {"loss": zeros(jnp.float32), "correct": zeros(jnp.int32), "count": zeros(jnp.int32)}


def create_train_steps(config: Config, devices: Sequence[jax.Device], steps_per_call: int, image_size: int = 32) -> Any:
    """Compiler (see `parallelize`) of several training steps in one call:

    (state, history, images, labels, order, start, count) → (state, history, loss of the last step). state and
    history are donated. Steps start … start+count of the epoch are run; count is at most steps_per_call.
    """
    train_step = create_train_step(config, image_size)
    per_device_batch_size = config.batch_size // len(devices)

    def train_steps(state, history, images, labels, order, start, count, device):  # type: ignore[no-untyped-def]
        def one(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, history = carry
            first = i * config.batch_size + device * per_device_batch_size
            batch = take_batch(images, labels, order, first, per_device_batch_size)
            steps_per_epoch = -(-order.shape[0] // config.batch_size)
            share = create_averaging_share(config, steps_per_epoch)(state.step + 1)
            batch |= {"epoch": state.step // steps_per_epoch, "averaging_share": share}
            state, metrics = train_step(state, batch)
            return state, _record(history, i, metrics)

        state, history = _repeat(one, start, count, (state, history), steps_per_call)
        return state, history, history["loss"][start + count - 1]

    return parallelize(train_steps, devices, (0, 1), compiler_options(config, config.batch_size, devices))


def create_eval_steps(
    config: Config, devices: Sequence[jax.Device], steps_per_call: int, dropout: bool = False, mirror: bool = False
) -> Any:
    """Compiler (see `parallelize`) of several evaluation steps in one call:

    (history, state, images, labels, start, count) → history; history is donated.
    """
    eval_step = create_eval_step(config, dropout, mirror)

    def eval_steps(history, state, images, labels, start, count, device):  # type: ignore[no-untyped-def]
        order = jnp.arange(labels.shape[0], dtype=jnp.int32)
        per_device_batch_size = eval_batch_size(config, labels.shape[0], devices) // len(devices)

        def one(i: jax.Array, history: Metrics) -> Metrics:
            first = (i * len(devices) + device) * per_device_batch_size
            batch = take_batch(images, labels, order, first, per_device_batch_size) | {"start": first}
            return _record(history, i, eval_step(state, batch))

        return _repeat(one, start, count, history, steps_per_call)

    return parallelize(eval_steps, devices, (0,), compiler_options(config, config.eval_batch_size, devices))


def eval_batch_size(config: Config, num_examples: int, devices: Sequence[jax.Device]) -> int:
    """config.eval_batch_size or all examples if those are fewer, raised to a multiple of the number of devices."""
    return -(-min(config.eval_batch_size, num_examples) // len(devices)) * len(devices)
