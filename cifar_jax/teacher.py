"""Loads a teacher and computes its logits for every view of every training image, once for all runs.

The logits of each view are a file in the user's cache folder, so that a stopped computation goes on where it was, and
a recipe with larger crops computes only the views that are new.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cifar_jax.batches import pixel_statistics, scale_images, take_batch
from cifar_jax.configs.base import Config
from cifar_jax.console import progress_bar, say
from cifar_jax.datasets import Dataset
from cifar_jax.datasets.files import cache_folder
from cifar_jax.distillation import View, list_views
from cifar_jax.errors import UserError
from cifar_jax.host import compiler_options
from cifar_jax.io import user_path, write_atomically
from cifar_jax.multi_step import round_eval_batch_size
from cifar_jax.parallel import AXIS, Parallel, local, replicate
from cifar_jax.pretrained import pretrained_names
from cifar_jax.processes import agree, check_same, on_main
from cifar_jax.sources import Source, SourceFlags, load_source

_DIGEST_BYTES = hashlib.sha256().digest_size


def load_teacher(name: str, num_classes: int) -> Source:
    """Loads a released network, a run's latest checkpoint (a folder) or a weight file.

    Raises: UserError in all processes if there is none of this name, it can't be loaded, it has another number of
    classes, or processes have different ones.
    """
    teacher = agree(lambda: _load(name, num_classes))
    check_same("teacher", {"SHA-256": identify_teacher(teacher)})
    return teacher


def _load(name: str, num_classes: int) -> Source:
    path = user_path(name, "--teacher")
    if name in pretrained_names():
        flags = SourceFlags(pretrained=name)
    elif path.exists():
        flags = SourceFlags(workdir=path) if path.is_dir() else SourceFlags(weights=path)
    else:
        names = ", ".join(pretrained_names())
        raise UserError(f"--teacher {name}: must be a released network ({names}), a run's folder or a weight file")
    try:
        source = load_source(flags)
    except OSError as error:
        raise UserError(f"--teacher {name}: {error.strerror}") from error
    if (outputs := len(source.class_names)) != num_classes:
        raise UserError(f"--teacher {name}: has {outputs} outputs, and the dataset has {num_classes} classes")
    return source


def identify_teacher(teacher: Source | None) -> str | None:
    """Returns the SHA-256 of a network's parameters and of what it computes from them; None without a network."""
    if teacher is None:
        return None
    facts = (teacher.config.model, teacher.config.input_scaling, teacher.origin.get("final_relu", False))
    stamp = hashlib.sha256(repr(facts).encode())
    for path, leaf in jax.tree.leaves_with_path(jax.device_get(local(teacher.state.eval_params))):
        stamp.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return stamp.hexdigest()


def compute_teacher_logits(
    config: Config, teacher: Source, dataset: Dataset, devices: Sequence[jax.Device], stop: Callable[[], bool]
) -> np.ndarray | None:
    """Returns the teacher's logits of all views of the training images: float16 [N, views, C]; None if stopped.

    Each view's logits are read from the cache or computed on the devices, by all processes together, and cached.
    Raises: UserError if a logit is not finite in float16.
    """
    images, views = dataset.train_images, list_views(config)
    folder = on_main(lambda: _folder(teacher, images))
    table = np.empty((len(images), len(views), len(teacher.class_names)), np.float16)
    compute = None
    with progress_bar(f"logits of {config.teacher}", len(views), 0) as bar:
        for number, view in enumerate(views):
            if stop():
                return None
            logits = on_main(lambda view=view: _read(folder, view, table[:, 0].shape))  # type: ignore[misc]
            if logits is None:
                if compute is None:
                    say(f"computing the logits of {config.teacher} for {len(views) - number} views of the images")
                    compute = _create_compute(config, teacher, dataset, devices)
                if (logits := compute(view, stop)) is None:
                    return None
                if not np.isfinite(logits).all():
                    raise UserError(f"--teacher {config.teacher}: its logits are not finite numbers in float16")
                on_main(lambda view=view, logits=logits: _write(folder, view, logits))  # type: ignore[misc]
            table[:, number] = logits
            bar.update(1, None)
    return table


def _create_compute(
    config: Config, teacher: Source, dataset: Dataset, devices: Sequence[jax.Device]
) -> Callable[[View, Callable[[], bool]], np.ndarray | None]:
    """Returns compute(view, stop) → float16 [N, C], compiled once; None if stopped."""
    count, padding = len(dataset.train_labels), config.crop_padding
    statistics = pixel_statistics(teacher.config.input_scaling, teacher.config.dataset)
    size = round_eval_batch_size(config, devices, count) // len(devices)

    def step(params, images, labels, start, view, device):  # type: ignore[no-untyped-def]
        order = jnp.arange(labels.shape[0], dtype=jnp.int32)
        seen = take_batch(images, labels, order, start + device * size, size)["image"]
        mirrored, y, x = view
        seen = jnp.where(mirrored == 1, seen[:, :, ::-1], seen)
        seen = jnp.pad(seen, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode="reflect")
        zero = jnp.zeros_like(y)
        seen = lax.dynamic_slice(seen, (zero, y + padding, x + padding, zero), (size, *images.shape[1:]))
        logits = teacher.state.apply_fn({"params": params}, scale_images(seen, *statistics)).astype(jnp.float16)
        return lax.all_gather(logits, AXIS, tiled=True)

    params, *data = replicate(
        (jax.device_get(local(teacher.state.eval_params)), dataset.train_images, dataset.train_labels), devices
    )
    arguments = lambda start, view: (params, *data, np.int32(start), tuple(map(np.int32, view)))
    options = compiler_options(teacher.config, size * len(devices), devices)
    run = Parallel(step, devices, (), options).compile(*arguments(0, View(0, 0, 0)))

    def compute(view: View, stop: Callable[[], bool]) -> np.ndarray | None:
        parts = []
        for start in range(0, count, size * len(devices)):
            parts.append(np.asarray(local(run(*arguments(start, view)))))
            if stop():
                return None
        return np.concatenate(parts)[:count]

    return compute


def _folder(teacher: Source, images: np.ndarray) -> Path | None:
    """Returns the folder of the logits of these images; None, with a note, if there is no cache."""
    if (cache := cache_folder()) is None:
        say("no home folder, so the teacher's logits are not cached: set CIFAR_JAX_CACHE to a folder", error=True)
        return None
    stamp = hashlib.sha256(str(identify_teacher(teacher)).encode() + np.ascontiguousarray(images).tobytes())
    return cache / f"teacher-{stamp.hexdigest()[:16]}"


def _file(folder: Path, view: View) -> Path:
    return folder / f"mirrored{view.mirrored}_y{view.shift_y:+d}_x{view.shift_x:+d}"


def _read(folder: Path | None, view: View, shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns a view's logits; None if they are not in the cache. Damaged files count as missing."""
    try:
        content = _file(folder, view).read_bytes() if folder else b""
    except OSError:
        return None
    data = content[_DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != content[:_DIGEST_BYTES]:
        return None
    logits = np.load(io.BytesIO(data), allow_pickle=False)
    return logits if (logits.dtype, logits.shape) == (np.float16, shape) else None


def _write(folder: Path | None, view: View, logits: np.ndarray) -> None:
    """Writes a .npy file behind its SHA-256."""
    if folder is None:
        return
    buffer = io.BytesIO()
    np.save(buffer, logits)
    data = buffer.getvalue()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(_file(folder, view), hashlib.sha256(data).digest() + data)
    except (OSError, UserError) as error:
        say(f"can't cache the teacher's logits ({error}): the next run will compute them again", error=True)
