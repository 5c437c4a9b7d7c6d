import os
import warnings
import zlib

import jax
import pytest

from cifar_jax import compilation
from cifar_jax.compilation import processor_id, prune, use_compilation_cache


@pytest.fixture
def updates(monkeypatch):
    """What is set in JAX's configuration: the tests' own cache stays as it is."""
    found = {}
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    with warnings.catch_warnings():
        yield found


def test_programs_are_kept_in_the_users_cache_by_processor(updates, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR_JAX_CACHE", str(tmp_path))
    use_compilation_cache()
    folder = tmp_path / "compiled" / processor_id()
    assert updates["jax_compilation_cache_dir"] == str(folder)
    assert folder.is_dir()
    warnings.warn("Error reading persistent compilation cache entry for 'step': damaged", stacklevel=1)


def test_the_users_own_cache_is_left_alone(updates, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    use_compilation_cache()
    assert updates == {}


@pytest.mark.parametrize("folder", ["/dev/null/cache", "~nobody-has-this-name/cache"])
def test_a_folder_that_cannot_be_used_costs_nothing_else(folder, updates, monkeypatch, capsys):
    monkeypatch.setenv("CIFAR_JAX_CACHE", folder)
    use_compilation_cache()
    assert updates == {}
    assert capsys.readouterr().err == ""


def test_another_processor_has_a_folder_of_its_own(monkeypatch):
    here = processor_id()
    monkeypatch.setattr(compilation.platform, "processor", lambda: "another")
    assert processor_id() != here


def test_damaged_and_old_entries_are_removed(tmp_path):
    good = zlib.compress(os.urandom(1000))
    altered = good[:500] + bytes([good[500] ^ 1]) + good[501:]
    for age, (name, data) in enumerate({"new": good, "cut": good[:-1], "altered": altered, "old": good}.items()):
        (tmp_path / name).write_bytes(data)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    (tmp_path / "empty").touch()
    (tmp_path / "gone").symlink_to("nowhere")  # as if another process had removed it after it was listed
    (tmp_path / "folder").mkdir()
    prune(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "old", "gone", "folder"}
    (tmp_path / "gone").unlink()
    (tmp_path / "folder").rmdir()
    prune(tmp_path, max_bytes=len(good))
    assert {path.name for path in tmp_path.iterdir()} == {"new"}
