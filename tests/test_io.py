import errno
import json
import os
from pathlib import Path

import pytest

from cifar_jax.errors import UserError
from cifar_jax.io import made_folder, read_json, write_atomically, write_json


def test_a_full_disk_leaves_the_old_file_alone(tmp_path, monkeypatch):
    (tmp_path / "x.partial").touch()  # a file of another program
    write_atomically(tmp_path / "x", b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"x: No space left on device"):
        write_atomically(tmp_path / "x", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x": b"old", "x.partial": b""}


def test_a_file_is_synced_before_it_takes_its_name(tmp_path, monkeypatch):
    """Otherwise a crash of the machine could leave an empty file."""
    events = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append("sync") or sync(descriptor))
    monkeypatch.setattr(os, "replace", lambda *paths: events.append("rename") or replace(*paths))
    write_atomically(tmp_path / "x", b"new")
    assert events == ["sync", "rename"]


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "x", b"new")
    assert list(tmp_path.iterdir()) == []


def test_json_round_trip(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1, 2.5, None, "é"]})
    assert read_json(tmp_path / "x.json") == {"a": [1, 2.5, None, "é"]}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text())["a"][0] == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"a":' * 100_000])
def test_anything_but_an_object_is_a_value_error(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError):  # noqa: PT011  # whose text is the parser's
        read_json(tmp_path / "x.json")


def test_a_folder_is_made_to_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK or Path(path) != tmp_path / "full")
    with pytest.raises(PermissionError, match="full"), made_folder(tmp_path / "full"):
        pass
    assert not (tmp_path / "full").exists()


def test_made_folders_that_stay_empty_go(tmp_path):
    with made_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with made_folder(tmp_path / "a" / "b"), made_folder(tmp_path / "a" / "c"):
        (tmp_path / "a" / "c" / "file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["c"]
    (tmp_path / "mine").mkdir()
    with made_folder(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()
    with pytest.raises(OSError, match="too long"), made_folder(tmp_path / "new" / ("x" * 300)):
        pass
    assert not (tmp_path / "new").exists()
