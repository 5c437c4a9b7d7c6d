import errno
import importlib
import io
import os
import signal
import subprocess
import sys

import jax
import pytest
from frameworks import needs_frameworks

from benchmarks import accuracy
from cifar_jax import __main__, convert, evaluate, plots, predict, train
from cifar_jax.cli import command, parse_arguments
from cifar_jax.errors import UserError
from cifar_jax.host import check_devices
from cifar_jax.pretrained import pretrained_path


def test_output_is_seen_at_once(monkeypatch):
    """Also in a log file: training takes hours between its first and its last line."""
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
    assert (status, error.count("\n"), "/dev/null/x: Not a directory" in error) == (2, 1, True)
    silenced = []
    monkeypatch.setattr(os, "dup2", lambda _, descriptor: silenced.append(descriptor))

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    status, _, error = run_command(command(full))
    assert (status, error.count("\n"), "disk space" in error) == (2, 1, True)
    assert silenced == [1]


def test_a_full_device_is_one_line(run_command):
    def main(text):
        def fails():
            raise jax.errors.JaxRuntimeError(text)

        return command(fails)

    status, _, error = run_command(main("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."))
    assert (status, error.count("\n"), "--batch-size or --eval-batch-size" in error) == (2, 1, True)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        main("INTERNAL: a bug")()


@pytest.mark.parametrize(
    ("failure", "advice"),
    [(OSError(errno.EMFILE, "Too many open files"), "ulimit"), (MemoryError(), "free memory"),
     (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "free memory")],
)  # fmt: skip
def test_what_the_system_lacks_is_said(failure, advice, run_command):
    def fails():
        raise failure

    status, _, error = run_command(command(fails))
    assert (status, error.count("\n"), advice in error) == (2, 1, True)


@pytest.mark.parametrize("words", [["--no-such-flag"], ["--help"]])
def test_flags_are_read_without_an_output(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate", *words])
    monkeypatch.setattr(sys, "stdout", None)
    if words == ["--help"]:
        with pytest.raises(SystemExit) as stop:
            evaluate.main()
        assert not stop.value.code
    else:
        assert evaluate.main() == 2


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_bad_flag_is_one_line_at_a_terminal(encoding):
    """tyro colours its text then."""
    terminal, child = os.openpty()
    command = (sys.executable, "-m", "cifar_jax.evaluate", "--no-such-flag")
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": encoding}
    result = subprocess.run(command, stdin=child, stdout=child, stderr=subprocess.PIPE, env=environment, text=True)
    os.close(child)
    os.close(terminal)
    assert result.stderr == "error: Unrecognized options: --no-such-flag: see --help\n"
    assert result.returncode == 2


def test_a_librarys_own_error_is_not_hidden():
    def broken():
        raise OSError("a file in the wrong state")

    with pytest.raises(OSError, match="wrong state"):
        command(broken)()


def test_without_a_device_commands_still_tell_their_flags(run_command, monkeypatch, tmp_path):
    def absent():
        raise RuntimeError("no such platform")

    monkeypatch.setattr(jax, "local_devices", absent)
    monkeypatch.setenv("JAX_PLATFORMS", "abacus")
    for main in (train.main, evaluate.main, predict.main, convert.main, accuracy.main):
        assert run_command(main, "--help")[0] == 0
    status, _, error = run_command(convert.main, pretrained_path("lenet5"), tmp_path / "lenet5.pth")
    assert (status, error.count("\n")) == (2, 1)
    assert "JAX finds no device for JAX_PLATFORMS=abacus (no such platform): " in error
    monkeypatch.delenv("JAX_PLATFORMS")
    _, _, error = run_command(convert.main, pretrained_path("lenet5"), tmp_path / "lenet5.pth")
    assert error == "error: JAX can't use a device (no such platform): set JAX_PLATFORMS=cpu to do without it\n"
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="no such platform"):
        check_devices()


def test_a_lost_process_is_no_missing_device(monkeypatch):
    def lost():
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out")

    monkeypatch.setattr(jax, "local_devices", lost)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="Barrier"):
        check_devices()


def closed():
    stream = io.TextIOWrapper(io.BytesIO())
    stream.close()
    return stream


class Gone(io.StringIO):
    """A closed terminal."""

    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("stream", [closed, Gone, lambda: None])
@pytest.mark.parametrize(("error", "status"), [(UserError("lines\nof text"), 2), (KeyboardInterrupt(), 130)])
def test_a_status_needs_no_output(stream, error, status, monkeypatch):
    def main():
        raise error

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream())
    assert command(main)() == status


def test_sigterm_ends_a_command_and_clears_away(run_command):
    cleared = []

    def main():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):
                pass
        finally:
            cleared.append(True)

    before = signal.getsignal(signal.SIGTERM)
    assert run_command(command(main)) == (143, "", "")
    assert cleared
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("cifar_jax.convert", ["--input=~/x", "--output=~/x", "--architecture=~/x"]),
        ("cifar_jax.evaluate", ["--workdir=~/x", "--weights=~/x", "--architecture=~/x"]),
        ("cifar_jax.predict", ["~/x", "~/x", "--weights=~/x"]),
        ("benchmarks.accuracy", ["--out=~/x", "--runs=~/x"]),
        ("benchmarks.early_training", ["--out=~/x"]),
        ("benchmarks.kernels", ["--out=~/x"]),
        ("benchmarks.throughput", ["--out=~/x"]),
        ("benchmarks.faults.__main__", ["--out=~/x"]),
        pytest.param("parity.command", ["--out=~/x", "--weights", "~/x", "~/x"], marks=needs_frameworks),
    ],
)
def test_home_is_expanded_in_every_path(module, words, monkeypatch):
    """The shell leaves it in --flag=~/x, and a notebook or a Dockerfile everywhere."""
    monkeypatch.setenv("HOME", "/home/me")
    told = repr(parse_arguments(importlib.import_module(module).Arguments, args=words))
    assert (told.count("/home/me/x"), "~" in told) == (len([word for word in words if "~" in word]), False)


def test_home_in_a_commands_own_paths(run_command, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.safetensors").write_bytes(pretrained_path("lenet5").read_bytes())
    assert run_command(convert.main, "~/a.safetensors", "~/b.safetensors")[0] == 0
    assert (tmp_path / "b.safetensors").is_file()
    for main, *words in (
        (convert.main, "~nobody-of-this-name/a.pth", "b.pth"),
        (evaluate.main, "--weights=~nobody-of-this-name/a.pth"),
        (evaluate.main, "--workdir=~nobody-of-this-name/run"),
        (train.main, "--workdir=~nobody-of-this-name/run"),
        (plots.main, "~nobody-of-this-name/run"),
        (predict.main, "~nobody-of-this-name/image.png"),
    ):
        status, _, error = run_command(main, *words)
        assert (status, error.count("\n")) == (2, 1)
        assert "~nobody-of-this-name" in error
        assert "without ~" in error


def test_all_commands_are_told(run_command):
    status, output, _ = run_command(__main__.main, "--help")
    assert status == 0
    assert all(name in output for name in __main__.COMMANDS)
    assert run_command(__main__.main)[:2] == (0, output)
    status, _, error = run_command(__main__.main, "trains")
    assert (status, error.count("\n"), "'trains'" in error) == (2, 1, True)
    status, output, _ = run_command(__main__.main, "predict", "--help")
    assert (status, "--top" in output) == (0, True)
