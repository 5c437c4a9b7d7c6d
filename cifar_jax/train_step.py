"""TrainState, the loss, and pure training and evaluation steps for one device of the mapped axis AXIS."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state
from jax import lax

from cifar_jax import ops
from cifar_jax.augment import create_input_transform, step_keys
from cifar_jax.batches import pixel_statistics, scale_images, split_seed
from cifar_jax.configs.base import Config
from cifar_jax.datasets import DATASETS
from cifar_jax.distillation import create_view_numbers, distillation_loss
from cifar_jax.models import get_model, unit_variance, whitening_kernel
from cifar_jax.normalization import Moments, Statistics, add_scales, apply_normalized
from cifar_jax.ops.blocks import infer
from cifar_jax.optimizer import create_tx
from cifar_jax.parallel import AXIS
from cifar_jax.symmetry import symmetric_start

Metrics = dict[str, jax.Array]
Batch = dict[str, jax.Array]


class TrainState(train_state.TrainState):
    """Flax's TrainState (step, params, tx, opt_state) with three more fields.

    rng is the key from which the keys of all steps are derived. ema_params is the average of the parameters, None if
    the recipe does not average (see `optimizer.create_averaging_share`). folded_params are the parameters of the plain
    network, None without normalisation: the initial ones until `trainer.Trainer.fold` computes them, before each test
    and each checkpoint.
    """

    rng: jax.Array
    ema_params: Any = None
    folded_params: Any = None

    @property
    def averaged_params(self) -> Any:
        """The averaged parameters, or the parameters if the recipe does not average."""
        return self.params if self.ema_params is None else self.ema_params

    @property
    def eval_params(self) -> Any:
        """The plain network's parameters, which are evaluated and released."""
        return self.averaged_params if self.folded_params is None else self.folded_params


def create_model(config: Config) -> Any:
    """Returns the recipe's network, a Flax module."""
    return get_model(config.model)(
        num_classes=DATASETS[config.dataset].num_classes,
        dropout_rates=config.dropout_rates,
        initializer=config.initializer,
        dtype=jnp.dtype(config.dtype),
    )


def create_train_state(config: Config, steps_per_epoch: int, images: Any = None) -> TrainState:
    """Creates the model, initial parameters and optimizer state from config.seed.

    Args: images: uint8 [N, 32, 32, 3], needed by the lsuv initializer and by whitening; None skips both, which is
    enough if parameters are restored afterwards.
    """
    model, pixels = create_model(config), pixel_statistics(config.input_scaling, config.dataset)
    params_key, rng, _ = split_seed(config.seed)
    params = _init(model, params_key)
    if config.mirror_symmetry:
        params = symmetric_start(params, model.LAYERS)
    if config.initializer == "lsuv" and images is not None:
        params = unit_variance(model, params, scale_images(jnp.asarray(images), *pixels))
    if config.whitening and images is not None:
        params = _whiten(params, model.LAYERS[0], scale_images(jnp.asarray(images), *pixels))
    folded_params = None
    if config.normalization == "batch":
        folded_params = jax.tree.map(jnp.copy, params)
        params = add_scales(model, params)
    tx = create_tx(config, steps_per_epoch)
    averages = config.ema_decay > 0 or config.swa_fraction > 0
    ema_params = jax.tree.map(jnp.copy, params) if averages else None
    fields = {"rng": rng, "ema_params": ema_params, "folded_params": folded_params}
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx, **fields)
    return state.replace(step=jnp.zeros((), jnp.int32))  # create's Python 0 would compile the step twice


# XLA's full optimisation would take 3 s longer for the same bits.
@partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 1})
def _init(model: Any, key: jax.Array) -> Any:
    """Draws initial parameters. Networks that are equal compile once."""
    return model.init(key, jnp.zeros((1, 32, 32, 3)))["params"]


def _whiten(params: Any, first_layer: str, images: jax.Array) -> Any:
    """Replaces the first layer's first filters by whitening filters, as many as fit."""
    kernel = params[first_layer]["kernel"]
    filters = whitening_kernel(images, kernel.shape[0])[..., : kernel.shape[-1]]
    kernel = kernel.at[..., : filters.shape[-1]].set(filters)
    return {**params, first_layer: {**params[first_layer], "kernel": kernel}}


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy per example: logits float32 [N, C], labels int32 [N] → float32 [N], nats."""
    if label_smoothing == 0.0:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def is_correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns 1 where the largest logit is the label's, else 0: float32 [N]."""
    return (logits.argmax(-1) == labels).astype(jnp.float32)


def create_train_step(
    config: Config, image_size: int = 32
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the recipe's train_step(state, batch) → (state, metrics) for images resized to image_size.

    It runs under the mapped axis AXIS. batch: the result of `take_batch`, 'epoch' (int32 from 0, for alternating
    flips), 'averaging_share' (float32, if parameters are averaged) and 'teacher_logits' (float16 [N, views, C] of all
    training images, if there is a teacher). metrics: of the global batch before the update: 'loss' (float32, the
    recipe's mean loss with dropout on, without the teacher's part), 'correct' (int32) and 'count' (int32).
    """
    transform, view_numbers = create_input_transform(config, image_size), create_view_numbers(config)
    model, normalized = create_model(config), config.normalization == "batch"

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        device, num_devices = lax.axis_index(AXIS), lax.axis_size(AXIS)
        images, mixture = transform(state.rng, state.step, device, batch)
        _, dropout_rng = step_keys(state.rng, state.step)
        count = lax.psum(batch["mask"].sum(), AXIS)
        if config.teacher is not None:
            views = view_numbers(state.rng, state.step, device, batch)
            teacher_logits = batch["teacher_logits"][batch["index"], views].astype(jnp.float32)

        # The factor num_devices makes pmean give the mean over the global batch, even if it is partly padding.
        mean = lambda losses: (losses * batch["mask"]).sum() * num_devices / count

        def loss_fn(params: Any) -> tuple[jax.Array, jax.Array]:
            options: dict[str, Any] = {"train": True, "rngs": {"dropout": jax.random.fold_in(dropout_rng, 0)}}
            with ops.number_images(device * images.shape[0]):
                if normalized:
                    logits, _ = apply_normalized(model, params, images, symmetric=config.mirror_symmetry, **options)
                else:
                    logits = state.apply_fn({"params": params}, images, **options)
            losses = cross_entropy(logits, batch["label"], config.label_smoothing)
            if mixture is not None:
                others = cross_entropy(logits, batch["label"][mixture.partner], config.label_smoothing)
                losses = mixture.share * losses + (1 - mixture.share) * others
            if config.teacher is not None:
                taught = distillation_loss(logits, teacher_logits, config.teacher_temperature)
                losses = config.teacher_share * taught + (1 - config.teacher_share) * losses
            return mean(losses), logits

        (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        grad_fn = lambda params, _: jax.grad(loss_fn, has_aux=True)(params)[0]
        updates, opt_state = state.tx.update(lax.pmean(grads, AXIS), state.opt_state, state.params, grad_fn=grad_fn)
        params = optax.apply_updates(state.params, updates)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        if state.ema_params is not None:
            average = optax.incremental_update(state.params, state.ema_params, batch["averaging_share"])
            state = state.replace(ema_params=average)
        if config.teacher is not None:  # the labels' loss tells whether a training has stalled
            loss = mean(cross_entropy(logits, batch["label"], config.label_smoothing))
        correct = (is_correct(logits, batch["label"]) * batch["mask"]).sum()
        metrics = {
            "loss": lax.pmean(loss, AXIS),
            "correct": lax.psum(correct, AXIS).astype(jnp.int32),
            "count": count.astype(jnp.int32),
        }
        return state, metrics

    return train_step


def create_statistics_step(config: Config) -> Callable[[Any, Batch], Statistics]:
    """Returns statistics_step(params, batch) → moments of the hidden layers over the global batch, without dropout."""
    model, pixels = create_model(config), pixel_statistics(config.input_scaling, config.dataset)

    def statistics_step(params: Any, batch: Batch) -> Statistics:
        images = scale_images(batch["image"], *pixels)
        _, found = apply_normalized(model, params, images, symmetric=config.mirror_symmetry)
        mean = {name: lax.pmean(moments.mean, AXIS) for name, moments in found.items()}
        spread = lambda moments, mean: moments.variance + (moments.mean - mean) ** 2
        return {name: Moments(mean[name], lax.pmean(spread(found[name], mean[name]), AXIS)) for name in found}

    return statistics_step


def create_eval_step(
    config: Config, dropout: bool = False, flip_tta: bool = False
) -> Callable[[TrainState, Batch], Metrics]:
    """Returns eval_step(state, batch) → sums over the global batch: 'loss' float32, 'correct' and 'count' int32.

    `dropout` keeps dropout on, like the PyTorch notebook, which never calls .eval(). `flip_tta` averages the logits of
    each image and its mirror image (test-time augmentation).
    """
    statistics = pixel_statistics(config.input_scaling, config.dataset)

    def eval_step(state: TrainState, batch: Batch) -> Metrics:
        rngs = {"dropout": jax.random.fold_in(state.rng, 2**32 - 1)}

        def logits_of(images: jax.Array) -> jax.Array:
            images = scale_images(images, *statistics)
            apply = lambda images: state.apply_fn({"params": state.eval_params}, images, train=dropout, rngs=rngs)
            return (apply(images) + apply(images[:, :, ::-1])) / 2 if flip_tta else apply(images)

        with ops.number_images(batch["start"]):  # with dropout, an image's mask depends on its number
            logits = logits_of(batch["image"]) if dropout else infer(logits_of, batch["image"])
        labels, mask = batch["label"], batch["mask"]
        values = cross_entropy(logits, labels), is_correct(logits, labels), jnp.ones_like(mask)
        loss, correct, count = (lax.psum((x * mask).sum(), AXIS) for x in values)
        return {"loss": loss, "correct": correct.astype(jnp.int32), "count": count.astype(jnp.int32)}

    return eval_step
