"""Ctrl-C during a command's imports."""

import os
import signal
import subprocess
import sys

import pytest

from cifar_jax import __main__, interrupt
from cifar_jax.cli import command

COMMANDS = [["cifar_jax"], *([f"cifar_jax.{name}"] for name in __main__.COMMANDS)]
COMMANDS += [["cifar_jax", name] for name in __main__.COMMANDS]

# Replaces a module that all commands import first. It catches exceptions, like extension modules.
INTERRUPTED = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass
except BaseException:
    raise ImportError("this module could not be initialised")
"""


@pytest.fixture
def start(tmp_path):
    """Returns start(code, *arguments) → (status, stdout, stderr) of python -m ARGUMENTS with numpy replaced by code."""

    def start(code, *arguments, **options):
        (tmp_path / "numpy.py").write_text(code)
        path = os.pathsep.join([str(tmp_path), *sys.path])
        environment = {**os.environ, "PYTHONPATH": path}
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, **options)
        return done.returncode, done.stdout, done.stderr

    return start


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_it_is_one_line(arguments, start):
    assert start(INTERRUPTED, *arguments) == (130, "", "interrupted\n")


def test_it_stays_ignored_where_it_was(start):
    """For example in a background job."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child process inherits it
    try:
        assert start(f"{INTERRUPTED}\nos._exit(7)", "cifar_jax.train") == (7, "", "")
    finally:
        signal.signal(signal.SIGINT, handler)


def test_the_package_still_offers_the_released_networks():
    import cifar_jax

    assert cifar_jax.pretrained_names() == cifar_jax.pretrained.pretrained_names()
    assert cifar_jax.load_pretrained is cifar_jax.pretrained.load_pretrained
    assert {"load_pretrained", "pretrained_names", "__version__"} <= set(dir(cifar_jax))
    with pytest.raises(AttributeError, match="nothing_such"):
        cifar_jax.nothing_such  # noqa: B018


def test_a_command_that_began_clears_away():
    """Once a command runs, Ctrl-C raises an exception."""
    before = signal.getsignal(signal.SIGINT)
    cleared = []

    def main():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass
        finally:
            cleared.append(True)

    try:
        interrupt.exit_on_interrupt()
        assert signal.getsignal(signal.SIGINT) is not before
        assert command(main)() == 130
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, before)
    assert cleared
