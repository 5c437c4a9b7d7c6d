"""Failing output must not stop training."""

import contextlib
import dataclasses
import errno
import io
import os
import sys

import jax.numpy as jnp
import pytest

from cifar_jax import console, train
from cifar_jax.console import format_epoch, progress_bar, say
from cifar_jax.metrics import EpochMetrics, read_metrics
from cifar_jax.train import train_and_evaluate
from cifar_jax.training import Path

ROW = EpochMetrics(1, 1.5, 0.25, 1.25, 0.5, 0.01, 2.0, 100.0)


class Terminal(io.StringIO):
    """A terminal that fails with `error` from the `number`-th write on."""

    def __init__(self, error=None, number=1):
        super().__init__()
        self.error, self.left = error, number

    def isatty(self):
        return True

    def write(self, text):
        self.left -= 1
        if self.error is not None and self.left <= 0:
            raise self.error
        return super().write(text)


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


FAILURES = {
    "gone": lambda: Terminal(OSError(errno.EIO, "Input/output error")),
    "later": lambda: Terminal(OSError(errno.EIO, "Input/output error"), 4),
    "full": lambda: Terminal(OSError(errno.ENOSPC, "No space left on device")),
    "pipe": lambda: Terminal(BrokenPipeError(errno.EPIPE, "Broken pipe")),
    "closed": closed,
    "none": lambda: None,
}


def test_an_epochs_line():
    assert format_epoch(ROW, 10, "held-out") == (
        "epoch  1/10  train loss 1.5000 accuracy  25.00%  held-out loss 1.2500 accuracy  50.00%"
        "  lr 0.01  2.0 s  100 images/s"
    )


def test_lines_go_to_their_stream(capsys):
    say("out")
    say("error", error=True)
    assert capsys.readouterr() == ("out\n", "error\n")


def test_errors_do_not_go_elsewhere(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    say("error", error=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("failure", FAILURES)
def test_a_stream_that_fails_is_passed_over(failure, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, FAILURES[failure]())
    for _ in range(3):
        say("out")
        say("error", error=True)
    for _ in range(2):
        with progress_bar("epoch", 100, 0) as bar:
            for _ in range(100):
                bar.update(1, jnp.float32(2))


@pytest.mark.parametrize("code", [errno.EIO, errno.EPIPE, errno.ENOSPC])
def test_a_terminal_that_is_gone_does_not_take_the_log_with_it(code, monkeypatch):
    """The progress bar's terminal fails. Output to a file is still written, also while the bar is shown."""
    log = io.StringIO()
    monkeypatch.setattr(sys, "stdout", log)
    monkeypatch.setattr(sys, "stderr", Terminal(OSError(code, "gone"), 3))
    with progress_bar("epoch", 100, 0) as bar:
        bar._bar.mininterval = 0
        for number in range(5):
            bar.update(1, jnp.float32(2))
            say(f"line {number}")
    assert log.getvalue() == "".join(f"line {number}\n" for number in range(5))


def test_a_bar_tells_steps_and_loss(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar("epoch 1/2", 4, 1) as bar:
        bar._bar.mininterval = 0  # draws each update
        bar.update(1, None)
        bar.update(2, jnp.float32(1.25))
    drawn = terminal.getvalue().split("\r")
    assert any("epoch 1/2" in text and "2/4" in text and "loss" not in text for text in drawn)
    assert any("4/4" in text and "loss=1.2500" in text for text in drawn)
    assert terminal.getvalue().split("\r")[-1].strip(" \n\x1b[A") == ""  # nothing of the bar remains


def test_what_python_writes_at_its_end_goes_nowhere(tmp_path):
    """After a failure the stream's descriptor refers to /dev/null."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    stream.write("never read")
    console.silence(stream)
    with contextlib.closing(stream):
        stream.flush()
    console.silence(None)


@pytest.mark.usefixtures("direct_convolutions", "no_figures", "compiled_once")
@pytest.mark.parametrize("failure", ["later", "pipe", "closed", "none"])
def test_a_training_goes_on_to_its_end(failure, plain_config, tiny_dataset, monkeypatch):
    config = dataclasses.replace(plain_config, num_epochs=2)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, FAILURES[failure]())
    assert train_and_evaluate(config, tiny_dataset)["epochs"] == 2
    assert len(read_metrics(Path(config.workdir))) == 2


@pytest.mark.usefixtures("no_steps", "no_figures")
def test_a_closed_pipe_loses_no_epoch(use_tiny_dataset, tmp_path, monkeypatch):
    """With `| head` the command continues and ends normally."""
    arguments = ("quickstart", "--workdir", str(tmp_path / "run"), "--num-devices", "1", "--num-epochs", "2")
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    monkeypatch.setattr(sys, "stdout", FAILURES["pipe"]())
    assert train.main() == 0
    assert len(read_metrics(tmp_path / "run")) == 2


def test_a_character_that_cant_be_encoded_costs_nothing_else(monkeypatch):
    """A program that calls train_and_evaluate may have such an output."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    say("on 1 × cpu")
    say("more")
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"on 1 ? cpu\nmore\n"
