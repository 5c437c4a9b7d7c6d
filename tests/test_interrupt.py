"""Signals that end a command, from its first import on."""

import contextlib
import gc
import os
import signal
import subprocess
import sys

import pytest

from cifar_jax import __main__, interrupt
from cifar_jax.cli import command

pytestmark = pytest.mark.usefixtures("default_signals")

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


def test_the_package_still_offers_its_names():
    import cifar_jax

    assert cifar_jax.pretrained_names() == cifar_jax.pretrained.pretrained_names()
    assert cifar_jax.load_pretrained is cifar_jax.pretrained.load_pretrained
    assert {"load_pretrained", "pretrained_names", "__version__"} <= set(dir(cifar_jax))
    assert all(getattr(cifar_jax, name) for name in cifar_jax.__all__)
    with pytest.raises(AttributeError, match="nothing_such"):
        cifar_jax.nothing_such  # noqa: B018


def test_a_command_that_began_clears_away(monkeypatch):
    """Once a command runs, Ctrl-C raises an exception."""
    monkeypatch.delitem(sys.modules, "IPython", raising=False)  # the tutorial's tests import it
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
        assert signal.getsignal(signal.SIGINT) is interrupt._exit  # while Python ends
    finally:
        signal.signal(signal.SIGINT, before)
    assert cleared


def test_ipython_keeps_its_handler(monkeypatch):
    """After %run the session goes on."""
    monkeypatch.setitem(sys.modules, "IPython", sys)
    before = signal.getsignal(signal.SIGINT)
    interrupt.exit_on_interrupt()
    assert signal.getsignal(signal.SIGINT) is before


# --- Where an exception of the handler is lost ---

STATUSES = [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, ""), (signal.SIGHUP, 129, "")]


def strike(number):
    os.kill(os.getpid(), number)
    for _ in range(1000):  # Python runs the handler at the end of one of them
        pass


def in_a_garbage_collection(number):
    """There Python drops the exception; JAX has such a callback."""
    callback = lambda phase, _: strike(number) if phase == "start" else None
    gc.callbacks.append(callback)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(callback)


def in_a_finalizer(number):
    class Dropped:
        def __del__(self):
            strike(number)

    Dropped()


def in_code_that_takes_it(number):
    with contextlib.suppress(BaseException):
        strike(number)


def in_code_that_renames_it(number):
    try:
        strike(number)
    except BaseException as error:
        raise ImportError("this module could not be initialised") from error


PLACES = [in_a_garbage_collection, in_a_finalizer, in_code_that_takes_it, in_code_that_renames_it]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("number", "status", "line"), STATUSES)
def test_no_signal_is_lost(place, number, status, line, run_command):
    numbers = [*interrupt.Interrupts.NUMBERS, signal.SIGALRM]
    before, hook = [signal.getsignal(each) for each in numbers], sys.unraisablehook
    reached = []

    def main():
        place(number)
        signal.sigtimedwait([], 60)  # the work that follows
        reached.append(True)
        return 0

    assert run_command(command(main)) == (status, "", line)
    assert not reached
    assert [signal.getsignal(each) for each in numbers] == before
    assert sys.unraisablehook is hook
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_what_clears_away_is_left_alone(run_command):
    """Neither the repetition nor a second signal interrupts it."""
    cleared = []

    def main():
        try:
            strike(signal.SIGTERM)
        finally:
            strike(signal.SIGALRM)
            strike(signal.SIGTERM)
            cleared.append(True)
        return 0

    assert run_command(command(main)) == (143, "", "")
    assert cleared


def test_a_signal_as_the_command_ends_is_not_a_traceback(run_command, monkeypatch):
    restore = interrupt.Interrupts.restore
    monkeypatch.setattr(interrupt.Interrupts, "restore", lambda self: (strike(signal.SIGTERM), restore(self)))
    assert run_command(command(lambda: 0)) == (143, "", "")


def test_ignored_signals_stay_ignored(run_command):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_command(command(lambda: strike(signal.SIGHUP) or 0)) == (0, "", "")
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
