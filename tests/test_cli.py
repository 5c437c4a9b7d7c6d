import errno
import io
import os
import sys

import jax
import pytest

from benchmarks import accuracy
from cifar_jax import convert, evaluate, predict, train
from cifar_jax.cli import command
from cifar_jax.pretrained import pretrained_path


def test_output_is_seen_at_once(monkeypatch):
    """In a log file as well: a training has hours between its first and its last line."""
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file))
    seen = []
    assert command(lambda: print("epoch 1") or seen.append(file.getvalue()) or 0)() == 0
    assert seen == [b"epoch 1\n"]


def test_what_the_output_cant_encode_is_a_question_mark(monkeypatch):
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding="ascii"))
    assert command(lambda: print("2 × cpu") or 0)() == 0
    assert file.getvalue() == b"2 ? cpu\n"


def test_a_systems_error_is_one_line(run_command, monkeypatch):
    status, _, error = run_command(command(lambda: len(os.listdir("/dev/null/x"))))
    assert (status, error) == (2, "error: /dev/null/x: Not a directory: name another place\n")
    silenced = []
    monkeypatch.setattr(os, "dup2", lambda _, descriptor: silenced.append(descriptor))

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    status, _, error = run_command(command(full))
    assert (status, error) == (2, "error: No space left on device: make room\n")
    assert silenced == [1]


def test_a_full_device_is_one_line(run_command):
    def main(text):
        def fails():
            raise jax.errors.JaxRuntimeError(text)

        return command(fails)

    status, _, error = run_command(main("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."))
    assert (status, error) == (2, "error: out of memory: lower --batch-size or --eval-batch-size\n")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        main("INTERNAL: a bug")()


def test_a_librarys_own_error_is_not_hidden():
    def broken():
        raise OSError("a file in the wrong state")

    with pytest.raises(OSError, match="wrong state"):
        command(broken)()


def test_without_a_device_commands_still_tell_their_flags(run_command, monkeypatch, tmp_path):
    def absent():
        raise RuntimeError("no such platform")

    monkeypatch.setattr(jax, "local_devices", absent)
    for main in (train.main, evaluate.main, predict.main, convert.main, accuracy.main):
        assert run_command(main, "--help")[0] == 0
    status, _, error = run_command(convert.main, pretrained_path("lenet5"), tmp_path / "lenet5.pth")
    assert (status, error.count("\n")) == (2, 1)
    assert "JAX finds no device" in error
