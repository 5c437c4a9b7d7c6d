import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from cifar_files import assert_loads, write_binary, write_python


@pytest.fixture
def cache():
    return Path(os.environ["CIFAR_JAX_CACHE"])


def test_decoded_once_then_memory_mapped(small_batches, tmp_path, cache, monkeypatch):
    folder = write_python(tmp_path / "cifar-10-batches-py", small_batches)
    assert_loads(small_batches, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("cifar_jax.datasets.official.read_batch", None)  # nothing may be decoded again
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
    assert capsys.readouterr().err == ""
    assert len(os.listdir(cache)) == 1


def test_an_unwritable_cache_is_no_obstacle(small_batches, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CIFAR_JAX_CACHE", str(tmp_path / "file"))
    write_binary(tmp_path / "cifar-10-batches-bin", small_batches)
    assert_loads(small_batches, tmp_path)
    assert "can't cache" in capsys.readouterr().err
