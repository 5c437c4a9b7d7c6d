import dataclasses
import http.server
import os
import socket
import sys
import threading
import uuid
from pathlib import Path

import pooch
import pytest
from cifar_files import assert_loads, official

from cifar_jax.datasets import DATASETS, load_dataset
from cifar_jax.datasets.cifar import CIFAR
from cifar_jax.errors import UserError


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch, small_cifar):
    """A local HTTP server in place of the official one. Yields: the folder that it serves."""
    served = tmp_path / "served"
    handler = lambda *arguments: Quiet(*arguments, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever)
        thread.start()
        for name, data in small_cifar.items():
            archive = official(served, data, "python archive", name)
            url = f"http://127.0.0.1:{http_server.server_address[1]}/{archive.name}"
            entry = dataclasses.replace(DATASETS[name], url=url, checksum=f"sha256:{pooch.file_hash(str(archive))}")
            monkeypatch.setitem(DATASETS, name, entry)
        yield served
        http_server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", CIFAR)
def test_download_to_data_dir_or_cache(name, server, small_cifar, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".hidden").touch()
    assert_loads(small_cifar[name], tmp_path / "mine", name)
    assert sorted(os.listdir(tmp_path / "mine")) == [".hidden", CIFAR[name].python.archive]
    assert_loads(small_cifar[name], name=name)
    (server / CIFAR[name].python.archive).unlink()  # downloading again would fail
    assert_loads(small_cifar[name], name=name)


def test_a_wrong_download_is_refused_and_leaves_nothing(server, tmp_path):
    (tmp_path / "mine").mkdir()
    (server / "cifar-10-python.tar.gz").write_bytes(b"something else")
    with pytest.raises(UserError, match="can't download CIFAR-10"):
        load_dataset("cifar10", tmp_path / "mine")
    (server / "cifar-10-python.tar.gz").unlink()
    with pytest.raises(UserError, match="the download failed"):
        load_dataset("cifar10", tmp_path / "mine")
    assert not any((tmp_path / "mine").iterdir())


def test_what_a_killed_download_left_does_not_stand_in_the_way(server, small_batches, tmp_path):
    (tmp_path / "mine" / f"partial-{uuid.uuid4()}").mkdir(parents=True)
    assert_loads(small_batches, tmp_path / "mine")


def test_a_users_own_partial_folder_is_no_leftover(server, tmp_path):
    (tmp_path / "mine" / "partial-results").mkdir(parents=True)
    with pytest.raises(UserError, match="mine"):
        load_dataset("cifar10", tmp_path / "mine")


def test_others_may_read_the_download(server, small_batches, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(sys, "stderr", None)  # closed
    mask = os.umask(0o022)
    try:
        assert_loads(small_batches, tmp_path / "mine")
    finally:
        os.umask(mask)
    archive = tmp_path / "mine" / "cifar-10-python.tar.gz"
    assert archive.stat().st_mode & 0o777 == 0o644


def test_no_network(monkeypatch, run_command):
    from cifar_jax import train

    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed_port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{closed_port}/cifar-10-python.tar.gz"
    monkeypatch.setitem(DATASETS, "cifar10", dataclasses.replace(DATASETS["cifar10"], url=url))
    status, _, error = run_command(train.main, "lenet5")
    assert status == 2
    lines = [line for line in error.splitlines() if not line.startswith("downloading ")]
    assert len(lines) == 1
    assert "the download failed (" in lines[0]
    assert "--data-dir" in lines[0]
    assert {path.name for path in Path().iterdir()} == {"tfds"}  # neither runs nor the cache
