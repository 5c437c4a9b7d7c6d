import errno
import fcntl
import os
import shutil
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from cifar_files import assert_loads, write_binary, write_python

from cifar_jax.datasets import cache as cache_module
from cifar_jax.datasets.partial import partial_folder
from cifar_jax.errors import UserError


@pytest.fixture
def cache():
    return Path(os.environ["CIFAR_JAX_CACHE"])


def test_decoded_once_then_memory_mapped(small_batches, tmp_path, cache, monkeypatch):
    folder = write_python(tmp_path / "cifar-10-batches-py", small_batches)
    assert_loads(small_batches, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("cifar_jax.datasets.official.read_batch", None)  # decoding again would fail
        assert isinstance(assert_loads(small_batches, tmp_path).train_images, np.memmap)
    # A changed file is decoded again, and so is a damaged cache entry.
    shutil.rmtree(folder)
    write_python(folder, (255 - small_batches[0], *small_batches[1:]))
    assert_loads((255 - small_batches[0], *small_batches[1:]), tmp_path)
    for size in (1000, 0):
        for array in cache.rglob("train_images.npy"):
            array.write_bytes(array.read_bytes()[:size])
        assert_loads((255 - small_batches[0], *small_batches[1:]), tmp_path)


def test_a_shared_cache_can_be_read_by_others(small_batches, tmp_path, cache):
    write_python(tmp_path / "cifar-10-batches-py", small_batches)
    previous = os.umask(0o022)
    try:
        assert_loads(small_batches, tmp_path)
    finally:
        os.umask(previous)
    (entry,) = cache.iterdir()
    assert entry.stat().st_mode & 0o777 == 0o755


def test_copies_in_ever_new_places_do_not_fill_the_cache(small_batches, tmp_path, cache):
    """A batch job may copy the data to a folder of its own. The entries that were used last stay."""
    (cache / "cifar10-mine").mkdir(parents=True)
    used = []
    for job in (0, 1, 2, 3, 0, 4, 5):
        if not (folder := tmp_path / f"{job}").exists():
            write_python(folder / "cifar-10-batches-py", small_batches)
        assert_loads(small_batches, folder)
        used.append(max(cache.iterdir(), key=lambda path: path.stat().st_mtime_ns))
        for number, entry in enumerate(used):
            if entry.exists():
                os.utime(entry, (number, number))
    assert {*cache.iterdir()} == {cache / "cifar10-mine", *used[-cache_module.KEPT :]}
    assert len({*used}) == 6


def test_a_named_cache_needs_no_pooch(small_batches, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    write_python(tmp_path / "cifar-10-batches-py", small_batches)
    assert_loads(small_batches, tmp_path)


def test_another_process_was_faster(small_batches, tmp_path, cache, monkeypatch, capsys):
    rename = Path.rename

    def late(partial, entry):
        shutil.copytree(partial, entry)
        rename(partial, entry)

    monkeypatch.setattr(Path, "rename", late)
    write_python(tmp_path / "cifar-10-batches-py", small_batches)
    assert_loads(small_batches, tmp_path)
    assert "can't" not in capsys.readouterr().err
    assert len(os.listdir(cache)) == 1


def test_an_unwritable_cache_is_no_obstacle(small_batches, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CIFAR_JAX_CACHE", str(tmp_path / "file"))
    write_binary(tmp_path / "cifar-10-batches-bin", small_batches)
    assert_loads(small_batches, tmp_path)
    assert "can't cache" in capsys.readouterr().err


def fill(array):
    """Writes a .npy file with the right header and other content."""
    return lambda path: np.save(path, array)


def zero_half(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def header(text):
    """Returns a .npy file with this text as header."""
    line = text.encode() + b"\n"
    return lambda path: path.write_bytes(b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line)


def as_npz(path):
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(3))


def as_pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGE = {
    "zeros in half of the images": ("train_images.npy", zero_half),
    "a label of no class": ("train_labels.npy", fill(np.full(100, 255, np.int32))),
    "a label below 0": ("test_labels.npy", fill(np.full(20, -1, np.int32))),
    "other labels": ("test_labels.npy", fill(np.zeros(20, np.int32))),
    "another type": ("train_labels.npy", fill(np.zeros(100, np.int64))),
    "another shape": ("test_images.npy", fill(np.zeros((20, 3, 32, 32), np.uint8))),
    "objects": ("test_labels.npy", fill(np.array([None] * 20))),
    "a header that ends early": ("train_labels.npy", header("{'descr': '<i4', 'fortran_order': False, 'shape': (100")),
    "a header that is no Python": ("train_labels.npy", header("{'descr': '<i4' $ 'shape': (100,), }")),
    "a header that is nested deep": ("train_labels.npy", header("(" * 5000)),
    "a huge shape": (
        "train_labels.npy",
        header(f"{{'descr': '<i4', 'fortran_order': False, 'shape': ({10**15},), }}"),
    ),
    "a shape beyond all integers": (
        "train_labels.npy",
        header(f"{{'descr': '<i4', 'fortran_order': False, 'shape': ({10**30},), }}"),
    ),
    "an npz file": ("train_images.npy", as_npz),
    "a pipe": ("train_images.npy", as_pipe),
    "no array": ("test_images.npy", os.unlink),
    "an empty array": ("test_images.npy", lambda path: path.write_bytes(b"")),
    "a byte too many": ("test_images.npy", lambda path: path.write_bytes(path.read_bytes() + b"\0")),
    "no manifest": ("manifest.json", os.unlink),
    "a manifest that is no JSON": ("manifest.json", lambda path: path.write_text("{")),
    "a manifest that is nested deep": ("manifest.json", lambda path: path.write_text("[" * 60_000)),
    "a manifest without checksums": ("manifest.json", lambda path: path.write_text('{"sha256": {}, "checked": {}}')),
    "a manifest of something else": ("manifest.json", lambda path: path.write_text('{"sha256": 1, "checked": [2]}')),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_entry_is_decoded_again_with_one_line(what, small_batches, tmp_path, cache, capsys):
    write_python(tmp_path / "cifar-10-batches-py", small_batches)
    assert_loads(small_batches, tmp_path)
    (entry,) = cache.iterdir()
    name, damage = DAMAGE[what]
    damage(entry / name)
    if (entry / name).exists():
        os.utime(entry / name, ns=(1, 1))  # as the system's clock of files may be coarse
    os.utime(entry, ns=(1, 1))
    capsys.readouterr()
    assert_loads(small_batches, tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(str(entry))
    assert name in lines[0]
    assert lines[1].startswith("decoding ")
    assert isinstance(assert_loads(small_batches, tmp_path).train_images, np.memmap)
    assert capsys.readouterr().err == ""
    assert os.listdir(cache) == [entry.name]


def test_checksums_are_computed_once_for_each_state_of_the_files(small_batches, tmp_path, cache, monkeypatch):
    computed = []
    checksum = cache_module._checksum
    monkeypatch.setattr(cache_module, "_checksum", lambda path: computed.append(path.name) or checksum(path))
    write_python(tmp_path / "cifar-10-batches-py", small_batches)
    assert_loads(small_batches, tmp_path)
    assert len(computed) == 4  # of the written files
    assert_loads(small_batches, tmp_path)
    assert len(computed) == 4
    (entry,) = cache.iterdir()
    os.utime(entry / "train_labels.npy", ns=(1, 1))  # like a copied cache
    assert_loads(small_batches, tmp_path)
    assert len(computed) == 8
    assert_loads(small_batches, tmp_path)
    assert len(computed) == 8


def test_a_cache_that_may_only_be_read(small_batches, tmp_path, cache, monkeypatch, capsys):
    write_python(tmp_path / "cifar-10-batches-py", small_batches)
    assert_loads(small_batches, tmp_path)
    (entry,) = cache.iterdir()
    os.utime(entry / "train_labels.npy", ns=(1, 1))

    def refuse(path, content):
        raise UserError(f"can't write {path}")

    monkeypatch.setattr(cache_module, "write_json", refuse)
    capsys.readouterr()
    assert isinstance(assert_loads(small_batches, tmp_path).train_images, np.memmap)
    assert capsys.readouterr().err == ""


def test_files_are_on_the_disk_before_the_entry_has_its_name(small_batches, tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename
    names = lambda descriptor: os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
    monkeypatch.setattr(os, "fsync", lambda file: events.append(names(file)) or fsync(file))
    monkeypatch.setattr(Path, "rename", lambda *paths: events.append("rename") or rename(*paths))
    write_python(tmp_path / "cifar-10-batches-py", small_batches)
    assert_loads(small_batches, tmp_path)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    arrays = {f"{split}_{kind}.npy" for split in ("train", "test") for kind in ("images", "labels")}
    assert {*arrays, "manifest.json"} <= set(before)
    assert after == ["cache"]


def test_what_killed_processes_left_is_cleared_but_nothing_of_a_live_one(small_batches, tmp_path, cache):
    old = time.time() - 7200
    abandoned, fresh, users = f"partial-{uuid.uuid4()}", f"partial-{uuid.uuid4()}", "partial-results"
    for name in (abandoned, fresh, users, "cifar10-0123"):
        (cache / name).mkdir(parents=True)
        (cache / name / "train_images.npy").touch()
        os.utime(cache / name, (old, old) if name != fresh else None)
    with partial_folder(cache) as mine:
        os.utime(mine, (old, old))
        assert not (cache / abandoned).exists()
        write_python(tmp_path / "cifar-10-batches-py", small_batches)
        assert_loads(small_batches, tmp_path)
        assert mine.exists()
    left = set(os.listdir(cache))
    assert {fresh, users, "cifar10-0123"} < left
    assert len(left) == 4


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_file_systems_without_locks(number, small_batches, tmp_path, cache, monkeypatch):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    hours, days = (f"partial-{uuid.uuid4()}" for _ in range(2))
    for name, age in ((hours, 7200), (days, 200_000)):
        (cache / name).mkdir(parents=True)
        os.utime(cache / name, (time.time() - age,) * 2)
    write_python(tmp_path / "cifar-10-batches-py", small_batches)
    assert_loads(small_batches, tmp_path)
    assert sorted(name.partition("-")[0] for name in os.listdir(cache)) == ["cifar10", "partial"]
    assert (cache / hours).exists()


def test_a_folder_that_is_not_utf8(small_batches, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write_python(folder / "cifar-10-batches-py", small_batches)
    assert_loads(small_batches, folder)
