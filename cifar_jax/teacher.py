"""Loads a teacher and computes its logits for every view of every training image, once for all runs.

The logits of each view are a file in the user's cache folder, so that a stopped computation goes on where it was, and
a recipe with larger crops computes only the views that are new.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cifar_jax.augment import slice_window
from cifar_jax.batches import pixel_statistics, scale_images, take_batch
from cifar_jax.configs.base import Config
from cifar_jax.console import progress_bar, say
from cifar_jax.datasets import DATASETS, Dataset, DatasetInfo
from cifar_jax.datasets.files import cache_folder
from cifar_jax.distillation import View, list_views
from cifar_jax.errors import UserError
from cifar_jax.host import compiler_options
from cifar_jax.io import user_path, write_atomically
from cifar_jax.multi_step import round_eval_batch_size
from cifar_jax.ops.blocks import infer
from cifar_jax.parallel import AXIS, Parallel, local, replicate
from cifar_jax.pretrained import pretrained_names
from cifar_jax.processes import on_main
from cifar_jax.sources import SourceFlags, evaluation_config, load_source
from cifar_jax.weights.files import Weights

MAX_BYTES = 2**31  # of the logits of all views
_DIGEST_BYTES = hashlib.sha256().digest_size


def load_teacher(name: str, info: DatasetInfo) -> Weights:
    """Loads a released network, a run's latest checkpoint (a folder) or a weight file, in process 0, for all.

    Raises: UserError if there is none of this name, it can't be loaded, or it has other classes than the dataset.
    """
    return on_main(lambda: _load(name, info))


def _load(name: str, info: DatasetInfo) -> Weights:
    try:
        path = user_path(name)
        if name in pretrained_names():
            flags = SourceFlags(pretrained=name)
        elif path.exists():
            flags = SourceFlags(workdir=path) if path.is_dir() else SourceFlags(weights=path)
        else:
            names = ", ".join(pretrained_names())
            raise UserError(f"must be a released network ({names}), a run's folder or a weight file")
        source = load_source(flags)
    except OSError as error:
        raise UserError(f"--teacher {name}: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"--teacher {name}: {error}") from error
    numbers = tuple(map(str, range(info.num_classes)))
    unknown = source.class_names == numbers and DATASETS[source.config.dataset].class_names != numbers
    if source.class_names != info.class_names and not unknown:
        raise UserError(f"--teacher {name}: its {len(source.class_names)} classes are not those of {info.title}")
    return source.weights()


def identify_teacher(teacher: Weights) -> str:
    """Returns the SHA-256 of a network's parameters and of what it computes from them."""
    config = evaluation_config(teacher, "float32")
    facts = (teacher.model, pixel_statistics(config.input_scaling, config.dataset), teacher.final_relu)
    stamp = hashlib.sha256(repr(facts).encode())
    for path, leaf in jax.tree.leaves_with_path(teacher.params):
        stamp.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return stamp.hexdigest()


def compute_teacher_logits(
    config: Config, teacher: Weights, dataset: Dataset, devices: Sequence[jax.Device], stop: Callable[[], bool]
) -> np.ndarray | None:
    """Returns the teacher's logits of all views of the training images: float16 [N, views, C]; None if stopped.

    Each view's logits are read from the cache or computed on the devices in float32, by all processes together.
    Raises: UserError if the array would be larger than MAX_BYTES, or a logit is not finite in float16.
    """
    images, views = dataset.train_images, list_views(config)
    if (size := 2 * len(images) * len(views) * teacher.num_classes) > MAX_BYTES:
        raise UserError(
            f"--crop-padding {config.crop_padding}: the logits of --teacher for its {len(views)} views take "
            f"{size / 2**30:.1f} GiB on each device: use smaller crops"
        )
    folder = on_main(lambda: _folder(teacher, images))
    writes = True
    table = np.empty((len(images), len(views), teacher.num_classes), np.float16)
    compute = None
    with progress_bar(f"logits of {config.teacher}", len(views), 0) as bar:
        for number, view in enumerate(views):
            if stop():
                return None
            logits = on_main(partial(_read, folder, view, table[:, 0].shape))
            if logits is None:
                if compute is None:
                    say(f"computing the logits of {config.teacher} for {len(views) - number} views of the images")
                    compute = _create_compute(config, teacher, dataset, devices)
                if (logits := compute(view, stop)) is None:
                    return None
                if not np.isfinite(logits).all():
                    raise UserError(f"--teacher {config.teacher}: its logits are not finite numbers in float16")
                writes = writes and on_main(partial(_write, folder, view, logits))
            table[:, number] = logits
            bar.update(1, None)
    return table


def _create_compute(
    config: Config, teacher: Weights, dataset: Dataset, devices: Sequence[jax.Device]
) -> Callable[[View, Callable[[], bool]], np.ndarray | None]:
    """Returns compute(view, stop) → float16 [N, C], compiled once; None if stopped."""
    count, padding = len(dataset.train_labels), config.crop_padding
    applied = dataclasses.replace(evaluation_config(teacher, "float32"), deterministic=config.deterministic)
    statistics = pixel_statistics(applied.input_scaling, applied.dataset)
    size = round_eval_batch_size(config, devices, count) // len(devices)
    model = teacher.create_module()

    def step(params, images, labels, start, view, device):  # type: ignore[no-untyped-def]
        """Returns the logits of `size` images on each device, from `start` on: float16 [devices · size, C]."""
        order = jnp.arange(labels.shape[0], dtype=jnp.int32)
        seen = take_batch(images, labels, order, start + device * size, size)["image"]
        mirrored, y, x = view
        seen = jnp.where(mirrored == 1, seen[:, :, ::-1], seen)
        seen = jnp.pad(seen, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode="reflect")
        seen = jax.vmap(lambda image: slice_window(image, y + padding, x + padding, padding))(seen)
        logits = infer(lambda seen: model.apply({"params": params}, scale_images(seen, *statistics)), seen)
        return lax.all_gather(logits.astype(jnp.float16), AXIS, tiled=True)

    params, *data = replicate((teacher.params, dataset.train_images, dataset.train_labels), devices)
    arguments = lambda start, view: (params, *data, np.int32(start), tuple(map(np.int32, view)))
    options = compiler_options(applied, size * len(devices), devices)
    run = Parallel(step, devices, (), options).compile(*arguments(0, View(0, 0, 0)))

    def compute(view: View, stop: Callable[[], bool]) -> np.ndarray | None:
        parts = []
        for start in range(0, count, size * len(devices)):
            if start and stop():
                return None
            parts.append(np.asarray(local(run(*arguments(start, view)))))
        return np.concatenate(parts)[:count]

    return compute


def _folder(teacher: Weights, images: np.ndarray) -> Path | None:
    """Returns the folder of the logits of these images; None, with a note, if there is no cache."""
    if (cache := cache_folder()) is None:
        say("no home folder, so the teacher's logits are not cached: set CIFAR_JAX_CACHE to a folder", error=True)
        return None
    stamp = hashlib.sha256(identify_teacher(teacher).encode() + np.ascontiguousarray(images).tobytes())
    return cache / f"teacher-{stamp.hexdigest()[:16]}"


def _file(folder: Path, view: View) -> Path:
    return folder / f"mirrored{view.mirrored}_y{view.shift_y:+d}_x{view.shift_x:+d}"


def _read(folder: Path | None, view: View, shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns a view's logits, float16 [N, C]; None if they are not in the cache. Damaged files count as missing."""
    try:
        content = _file(folder, view).read_bytes() if folder else b""
    except OSError:
        return None
    data = content[_DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != content[:_DIGEST_BYTES]:
        return None
    logits = np.load(io.BytesIO(data), allow_pickle=False)
    return logits if (logits.dtype, logits.shape) == (np.float16, shape) else None


def _write(folder: Path | None, view: View, logits: np.ndarray) -> bool:
    """Writes float16 [N, C] as a .npy file behind its SHA-256. Returns: whether it could be written."""
    if folder is None:
        return False
    buffer = io.BytesIO()
    np.save(buffer, logits)
    data = buffer.getvalue()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(_file(folder, view), hashlib.sha256(data).digest() + data)
    except (OSError, UserError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        say(f"can't cache the teacher's logits in {folder} ({reason}): each run will compute them again", error=True)
        return False
    return True
