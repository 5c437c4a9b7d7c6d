"""The table of faults: what is injected, how often, and the expected outcomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from benchmarks.faults import caches, companions, data_files, disks, run_files, stops, weight_files
from benchmarks.faults.disks import FELL_BACK, RESUMED
from benchmarks.faults.lab import IDENTICAL, REFUSED, Lab

__all__ = ["FAULTS", "Fault"]


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault. `run` injects it `count` times and yields an outcome each time. `good` are the expected outcomes.

    `quick` is the count with --quick; 0: not injected.
    """

    name: str
    injected: str
    run: Callable[[Lab, int, np.random.Generator], Iterable[str]]
    good: tuple[str, ...]
    count: int
    quick: int


IDENTICALLY = (IDENTICAL,)
READ = (REFUSED, data_files.RIGHT, data_files.CHANGED, weight_files.CHANGED)

FAULTS = (
    Fault(
        "SIGKILL",
        "chains of up to 4 starts of a training, each killed at a random step or file event, or up to 0.2 s later",
        stops.sigkill, IDENTICALLY, 40, 0,
    ),
    Fault("SIGTERM", "the same, by SIGTERM", stops.sigterm, IDENTICALLY, 40, 0),
    Fault(
        "SIGTERM during start-up",
        "SIGTERM 0.3 to 4 s after the start of `python -m cifar_jax.train`",
        stops.start_up, (stops.STATUS_143,), 6, 0,
    ),
    Fault(
        "SIGTERM in a garbage collection",
        "SIGTERM within a callback of the garbage collector, where Python drops exceptions, in `convert` and `predict`",
        stops.garbage_collection, (stops.STATUS_143,), 8, 2,
    ),
    Fault(
        "crash between two file events",
        "SIGKILL as a training is about to open a file for writing, or to rename, make or remove one",
        stops.file_events, IDENTICALLY, 24, 0,
    ),
    Fault(
        "damaged checkpoint",
        "a file of the latest checkpoint has a flipped bit, is cut, emptied or deleted; a training goes on",
        disks.latest_checkpoint, (FELL_BACK, IDENTICAL), 80, 3,
    ),
    Fault(
        "damaged log or description",
        "the same to metrics.csv, batch_loss.npy, summary.json, dataset.json or config.json",
        disks.logs, (IDENTICAL, REFUSED), 20, 3,
    ),
    Fault(
        "hostile JSON of a run",
        "config, identity, summary, checksums or Orbax' metadata: other texts, nested 100,000 deep, values of other "
        "types, fields less or more, changed bytes",
        run_files.hostile, (IDENTICAL, REFUSED), 90, 3,
    ),
    Fault(
        "full disk", "a training on a file system of 4 KiB to 12 MiB; then there is room, and it is started again",
        disks.full_disk, (IDENTICAL, RESUMED), 16, 1,
    ),
    Fault(
        "limit of a file's size", "the same, with a limit of 4 KiB to 2 MiB for each file",
        disks.small_files, (IDENTICAL, RESUMED), 12, 0,
    ),
    Fault(
        "read-only folder", "a new or a half finished training on a file system that is read-only, and then writable",
        disks.read_only, (RESUMED,), 4, 1,
    ),
    Fault("no locks", "`flock` fails with ENOSYS, ENOLCK or EOPNOTSUPP", disks.no_locks, IDENTICALLY, 3, 1),
    Fault(
        "no console", "stdout and stderr are a full disk, a pipe without a reader, or closed",
        disks.no_console, IDENTICALLY, 3, 0,
    ),
    Fault(
        "matplotlib's settings", "MPLBACKEND names a module that is not there",
        disks.matplotlib_settings, IDENTICALLY, 1, 0,
    ),
    Fault("another thread", "a training is called outside of the main thread", stops.other_thread, IDENTICALLY, 1, 0),
    Fault(
        "three processes, one workdir", "three trainings are started at the same time in one folder",
        companions.one_workdir, (f"{companions.ONE_TRAINS}; {IDENTICAL}",), 2, 0,
    ),
    Fault(
        "three processes, one cache",
        "three processes decode the same data into one cache; one is killed at a random file event",
        caches.shared, (data_files.RIGHT,), 8, 2,
    ),
    Fault(
        "killed while decoding", "SIGKILL at each file event of filling the cache; then the data are loaded",
        caches.killed_decoding, (data_files.RIGHT,), 16, 3,
    ),
    Fault(
        "damaged cache",
        "a file of the cache has a flipped bit, is cut, emptied, deleted, has another header, type or label, or zeros",
        caches.damaged, (data_files.RIGHT, caches.DECODED_AGAIN), 200, 16,
    ),
    Fault(
        "other numbers of devices", "4 epochs without dropout, on 1, 2, 4 and 1 devices",
        companions.devices, (companions.CLOSE,), 2, 0,
    ),
    Fault(
        "unconnected process of a cluster", "`jax.process_count()` is 2, and the command did not connect the processes",
        companions.second_process, (REFUSED,), 1, 1,
    ),
    Fault(
        "workdir that can't be", "`--workdir gs://bucket/run`, `s3://bucket/run`, or below a file",
        companions.addresses, (REFUSED,), 3, 3,
    ),
    Fault(
        "state_dict in another order",
        "the tensors of a PyTorch file shuffled, with `module.` or `_orig_mod.` before their names, or in a checkpoint",
        weight_files.names_tell, (weight_files.RIGHT,), 36, 0,
    ),
    Fault(
        "mutated weight files", "1 to 4 random changes of the bytes of a .safetensors or .pth file",
        weight_files.mutated, READ, 6000, 0,
    ),
    Fault(
        "mutated Keras files", "the same to .h5, .weights.h5 and .keras files",
        weight_files.mutated_keras, READ, 60, 0,
    ),
    Fault(
        "crafted weight files", "pickles that execute, archives and headers that ask for gigabytes, deep nesting",
        weight_files.crafted, READ, 18, 18,
    ),
    Fault(
        "mutated data files",
        "1 to 4 random changes of the bytes of a binary or Python batch, an official archive, or an .npz file",
        data_files.mutated, READ, 8000, 40,
    ),
    Fault(
        "mutated image folders", "the same to one PNG file of an ImageFolder",
        data_files.mutated_images, READ, 300, 20,
    ),
    Fault(
        "mutated parquet and ArrayRecord files", "the same to a file of Hugging Face's or TensorFlow Datasets' layout",
        data_files.mutated_records, READ, 24, 0,
    ),
    Fault(
        "crafted data files",
        "pickles that execute, archives with links, sparse members and wild sizes, images of 13,000² pixels",
        data_files.crafted, READ, 15, 15,
    ),
)  # fmt: skip
