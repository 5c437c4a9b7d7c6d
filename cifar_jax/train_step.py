"""TrainState, the loss, train_step and eval_step, and the only place that calls pmap.

A step is a pure function of (state, batch) on one device. `parallelize` runs it on all local devices: the state and
the dataset are replicated, each device takes its slice of every global batch, gradients are averaged with pmean.
pmap is in maintenance mode (JAX runs it as jit + shard_map); leaving it means changing this file alone. Beware:
under shard_map gradients of replicated parameters arrive already summed, and here a forgotten pmean is silent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state
from jax import lax

from cifar_jax.augment import create_augment, is_mirrored, mix, trivial_augment
from cifar_jax.batches import augmentation_keys, scale_images, split_seed, step_keys, take_batch
from cifar_jax.configs.base import Config
from cifar_jax.host import compiler_options
from cifar_jax.models import MODELS, unit_variance
from cifar_jax.optimizer import create_averaging_share, create_tx
from cifar_jax.parallel import AXIS, parallelize, repeat
from cifar_jax.symmetry import symmetric_start

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

        state, history = repeat(one, start, count, (state, history), steps_per_call)
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

        return repeat(one, start, count, history, steps_per_call)

    return parallelize(eval_steps, devices, (0,), compiler_options(config, config.eval_batch_size, devices))


def eval_batch_size(config: Config, num_examples: int, devices: Sequence[jax.Device]) -> int:
    """config.eval_batch_size or all examples if those are fewer, raised to a multiple of the number of devices."""
    return -(-min(config.eval_batch_size, num_examples) // len(devices)) * len(devices)
