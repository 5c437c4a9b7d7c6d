import dataclasses
import gzip
import importlib
import itertools
import json
import shutil
import struct
import sys
import types
from pathlib import Path

import jax
import pytest
from small_runs import stop_at

from cifar_jax import loggers, train
from cifar_jax.errors import UserError
from cifar_jax.metrics import read_metrics
from cifar_jax.outcomes import Interrupted
from cifar_jax.train import train_and_evaluate
from cifar_jax.trainer import Trainer

pytestmark = pytest.mark.usefixtures("compiled_once", "no_steps", "no_figures")
STEPS = 6  # of an epoch


def read_events(folder):
    """Returns every (epoch, {name: value}) of a folder's event files, without TensorBoard."""
    event_pb2, found = importlib.import_module("tensorboardX.proto.event_pb2"), []
    for path in sorted(folder.glob("events*"), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            if event.summary.value:
                found.append((event.step, {value.tag: value.simple_value for value in event.summary.value}))
    return found


def interrupt_then_resume(config, dataset, **changes):
    """Stops a run within its second epoch and resumes it."""
    with pytest.raises(Interrupted):
        train_and_evaluate(config, dataset, stop_at(4 + STEPS + 1 + 3))
    assert len(read_metrics(Path(config.workdir))) == 1
    return train_and_evaluate(dataclasses.replace(config, **changes), dataset)


class FakeRun(types.SimpleNamespace):
    offline = False

    def log(self, values, step):
        self.points.append((step, values))

    def finish(self):
        self.points.append("finished")


@pytest.fixture
def fake_wandb(monkeypatch):
    """Stands for wandb. Its `inits` has the arguments of each init, and the points that the run got then."""
    module = types.ModuleType("wandb")
    module.inits, module.Settings = [], types.SimpleNamespace

    def init(**arguments):
        run = FakeRun(points=[], url="https://example.org/run")
        module.inits.append((arguments, run.points))
        return run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.mark.parametrize("late", [False, True])
def test_tensorboard_has_each_epoch_once(late, tiny_config, tiny_dataset):
    """Also in a resumed run, and if the first epochs were trained without a logger."""
    pytest.importorskip("tensorboardX")
    config = dataclasses.replace(tiny_config, logger="none" if late else "tensorboard")
    interrupt_then_resume(config, tiny_dataset, logger="tensorboard")
    points, rows = read_events(Path(config.workdir) / "tensorboard"), read_metrics(Path(config.workdir))
    assert [epoch for epoch, _ in points] == [1, 2, 3]
    for row, (epoch, values) in zip(rows, points, strict=True):
        assert {"epoch": epoch, **values} == pytest.approx(dataclasses.asdict(row), rel=1e-6)


def test_a_resumed_wandb_run_is_the_same_run(tiny_config, tiny_dataset, fake_wandb, capsys):
    config = dataclasses.replace(tiny_config, logger="wandb")
    interrupt_then_resume(config, tiny_dataset)
    (first, points), (second, more) = fake_wandb.inits
    assert (first["id"], first["resume"]) == (second["id"], "allow")
    assert first["settings"].reinit == "create_new"  # the calling program may have a run of its own
    assert first["config"]["batch_size"] == 16
    assert not {"workdir", "logger", "profile"} & set(first["config"])
    assert [point[0] for point in points[:-1]] == [1]
    assert [point[0] for point in more[:-1]] == [2, 3]
    assert (points[-1], more[-1]) == ("finished", "finished")
    assert more[0][1]["test_loss"] == 2
    other = dataclasses.replace(config, workdir=f"{config.workdir}2", num_epochs=1)
    train_and_evaluate(other, tiny_dataset)
    assert fake_wandb.inits[-1][0]["id"] != first["id"]
    assert "https://example.org/run" in capsys.readouterr().out


def test_a_training_that_starts_again_is_another_curve(tiny_config, tiny_dataset, fake_wandb):
    config = dataclasses.replace(tiny_config, logger="wandb", num_epochs=2)
    train_and_evaluate(config, tiny_dataset)
    shutil.rmtree(Path(config.workdir) / "checkpoints")
    (Path(config.workdir) / "summary.json").unlink()
    train_and_evaluate(config, tiny_dataset)
    (first, _), (second, points) = fake_wandb.inits
    assert first["id"] != second["id"]
    assert [point[0] for point in points[:-1]] == [1, 2]


@pytest.mark.slow
def test_wandb_itself_takes_a_run(tiny_config, tiny_dataset, monkeypatch):
    """Offline, read from the file that `wandb sync` would send."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    interrupt_then_resume(dataclasses.replace(tiny_config, logger="wandb", num_epochs=2), tiny_dataset)
    files = sorted((Path(tiny_config.workdir) / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({path.name for path in files}) == 1
    steps = []
    for data in map(Path.read_bytes, files):
        at = 7  # after the file's header; records have a checksum, a length and a kind, as in LevelDB's logs
        while at < len(data):
            (length,) = struct.unpack_from("<H", data, at + 4)
            record = wandb.proto.wandb_internal_pb2.Record.FromString(data[at + 7 : at + 7 + length])
            steps += [record.history.step.num] if record.HasField("history") else []
            at += 7 + length
    assert steps == [1, 2]


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_failing_logger_warns_once_and_stops_nothing(failing, tiny_config, tiny_dataset, fake_wandb, capsys):
    def fail(*_, **__):
        raise OSError(28, "No space left\non device")

    if failing == "init":
        fake_wandb.init = fail
    else:
        create = fake_wandb.init
        fake_wandb.init = lambda **arguments: (run := create(**arguments), setattr(run, failing, fail))[0]
    summary = train_and_evaluate(dataclasses.replace(tiny_config, logger="wandb"), tiny_dataset)
    assert summary["epochs"] == 3
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: --logger wandb failed ([Errno 28] No space left on device)")


def test_a_full_disk_does_not_stop_tensorboard_runs(tiny_config, tiny_dataset, monkeypatch, capsys):
    writer = pytest.importorskip("tensorboardX.event_file_writer").EventsWriter
    flush, calls = writer.flush, itertools.count(1)

    def flush_but_once(self):
        if next(calls) == 2:
            raise OSError(28, "No space left on device")
        flush(self)

    monkeypatch.setattr(writer, "flush", flush_but_once)
    assert train_and_evaluate(dataclasses.replace(tiny_config, logger="tensorboard"), tiny_dataset)["epochs"] == 3
    assert capsys.readouterr().err.count("No space left") == 1
    assert [epoch for epoch, _ in read_events(Path(tiny_config.workdir) / "tensorboard")] == [1, 2]


def test_a_folder_of_the_librarys_name_is_no_library(tmp_path, tiny_config, monkeypatch):
    """Another project may have left its wandb/ in the current folder."""
    (tmp_path / "abacus").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(loggers.SERVICES, "wandb", ("abacus", None))
    with pytest.raises(UserError, match="abacus is not installed"):
        loggers.Logger(dataclasses.replace(tiny_config, logger="wandb"))


@pytest.mark.parametrize(("name", "library"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_library_is_one_line(name, library, use_tiny_dataset, tmp_path, run_command, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    arguments = ("quickstart", "--workdir", tmp_path / "run", "--logger", name)
    status, output, error = run_command(train.main, *arguments)
    assert (status, output, error.count("\n")) == (2, "", 1)
    assert f"pip install 'cifar_jax[{name}]'" in error
    assert not (tmp_path / "run").exists()


def test_a_damaged_state_is_another_run(tmp_path, tiny_config, fake_wandb):
    config = dataclasses.replace(tiny_config, logger="wandb")
    state = Path(config.workdir) / "wandb" / "logged.json"
    state.parent.mkdir(parents=True)
    state.write_text("{")
    with loggers.Logger(config):
        assert json.loads(state.read_text()) == {"run_id": fake_wandb.inits[0][0]["id"], "epochs": 0}


def test_watching_is_no_part_of_the_recipe(tiny_config, tiny_dataset, fake_wandb, monkeypatch):
    """A run may be resumed with and without it, and its summary does not tell."""
    config = dataclasses.replace(tiny_config, num_epochs=2)
    summary = interrupt_then_resume(config, tiny_dataset, logger="wandb", profile=1)
    assert not {"logger", "profile"} & set(summary["config"])
    with pytest.raises(UserError, match="--profile -1"):
        dataclasses.replace(tiny_config, profile=-1)


@pytest.fixture
def traced(monkeypatch):
    """The numbers of calls of steps that were started when a trace started and stopped, of three steps a call."""
    calls, events = [], []
    monkeypatch.setattr(Trainer, "run_steps", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append(len(calls)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append(len(calls)))
    return events


@pytest.mark.parametrize(("steps", "expected"), [(1, [1, 2]), (3, [1, 2]), (4, [1, 3]), (100, [1, 6])])
def test_whole_calls_are_traced_from_the_second_on(steps, expected, tiny_config, tiny_dataset, traced, capsys):
    """3 epochs have two calls of three steps each. A trace may go on in the next epoch, and ends with the run."""
    train_and_evaluate(dataclasses.replace(tiny_config, steps_per_call=3, profile=steps), tiny_dataset)
    assert traced == expected
    assert f"trace of {3 * (expected[1] - 1)} steps" in capsys.readouterr().out


def test_a_run_of_one_call_says_that_it_traced_nothing(tiny_config, tiny_dataset, traced, capsys):
    train_and_evaluate(dataclasses.replace(tiny_config, num_epochs=1, steps_per_call=6, profile=1), tiny_dataset)
    assert traced == [1, 1]
    output = capsys.readouterr()
    assert (output.out.count("trace of"), output.err.count("the trace has none")) == (0, 1)


def test_a_failing_profiler_stops_nothing(tiny_config, tiny_dataset, monkeypatch, capsys):
    def fail(folder):
        raise RuntimeError("another trace is running")

    monkeypatch.setattr(jax.profiler, "start_trace", fail)
    assert train_and_evaluate(dataclasses.replace(tiny_config, profile=2), tiny_dataset)["epochs"] == 3
    assert capsys.readouterr().err.splitlines() == ["warning: --profile failed (another trace is running)"]


def test_a_trace_is_a_file_that_perfetto_opens(tiny_config, tiny_dataset):
    train_and_evaluate(dataclasses.replace(tiny_config, num_epochs=1, profile=2), tiny_dataset)
    (file,) = (Path(tiny_config.workdir) / "profile").rglob("*.trace.json.gz")
    assert json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert list(file.parent.glob("*.xplane.pb"))
