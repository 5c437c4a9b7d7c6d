import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.faults import __main__ as faults
from benchmarks.faults import caches, data_files, disks, guard, layouts, stops, victims, weight_files
from benchmarks.faults.faults import FAULTS
from benchmarks.faults.lab import IDENTICAL, REFUSED, Lab
from benchmarks.faults.mutations import mutate
from benchmarks.report.reliability import reliability
from benchmarks.report.results import MEASURED, ROOT, Results
from cifar_jax import checkpoint, runs
from cifar_jax.datasets import cache
from cifar_jax.errors import UserError


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Returns a Lab whose child processes can import the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        yield Lab(tmp_path_factory.mktemp("lab"))


def by_name(name):
    return next(fault for fault in FAULTS if fault.name == name)


def command(out, *arguments):
    words = [sys.executable, "-m", "benchmarks.faults", "--out", out, *arguments]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    return result.returncode, json.loads((out / "faults.json").read_text()), result.stdout + result.stderr


@pytest.mark.long
def test_the_short_form(tmp_path):
    """Every fault of --quick has an expected outcome, and the report tabulates the result."""
    status, result, output = command(tmp_path, "--quick")
    assert status == 0, output
    assert [row["name"] for row in result["faults"]] == [fault.name for fault in FAULTS if fault.quick]
    for row in result["faults"]:
        assert row["skipped"] or sum(row["outcomes"].values()) == row["times"] > 0, row
        assert set(row["outcomes"]) <= set(by_name(row["name"]).good), row
    table = reliability(Results(tmp_path))
    assert all(f"| {row['name']} | {row['injected']} | {row['times']} |" in table for row in result["faults"])


@pytest.mark.slow
@pytest.mark.long
def test_the_long_form(tmp_path):
    status, result, output = command(tmp_path, "--seed", "1")
    assert status == 0, output
    assert [row["name"] for row in result["faults"]] == [fault.name for fault in FAULTS]


def test_the_results_are_of_the_table():
    """docs/reliability.md lists every fault as it is injected, and none fails."""
    rows = {row["name"]: row for row in MEASURED.load("faults")["faults"]}
    assert list(rows) == [fault.name for fault in FAULTS]
    assert all(rows[fault.name]["injected"] == fault.injected for fault in FAULTS)
    assert not any(row["failed"] or row["skipped"] for row in rows.values())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(("--only", "nothing"), "--only nothing"), (("--rounds", "0"), "--rounds 0"), (("--out", "file"), "file")],
)
def test_bad_flags(arguments, named, run_command):
    Path("file").write_text("")
    status, _, errors = run_command(faults.main, *(("--out", "out") if "--out" not in arguments else ()), *arguments)
    assert (status, errors.count("\n")) == (2, 1)
    assert named in errors


def test_an_interrupted_benchmark_keeps_what_it_measured(tmp_path, run_command, monkeypatch):
    def inject(fault, lab, count, seed):
        if fault is not FAULTS[0]:
            raise KeyboardInterrupt
        return {"name": fault.name, "times": 1, "failed": 0, "outcomes": {}, "seconds": 0}

    monkeypatch.setattr(faults, "inject", inject)
    monkeypatch.setattr(faults, "prepare", lambda folder: None)
    monkeypatch.setattr(faults, "Lab", lambda folder: None)
    (tmp_path / "faults.json").write_text("earlier")
    assert run_command(faults.main, "--out", tmp_path)[0] == 130
    assert (tmp_path / "faults.json").read_text() == "earlier"
    rows = json.loads((tmp_path / "faults.json.partial").read_text())["faults"]
    assert [row["name"] for row in rows] == [FAULTS[0].name]


def test_a_chain_without_a_hit_is_no_success(tmp_path, monkeypatch):
    class Other:
        new_folder, finish = (lambda self: tmp_path), (lambda self, workdir: "other parameters")

    monkeypatch.setattr(stops, "_chain", lambda strikes, workdir: (workdir, 0, None))
    assert list(stops._finish_all(Other(), [[]])) == ["other parameters"]


# --- Each fault can fail: it detects a defect of the package ---


@pytest.mark.long
def test_another_end_is_found(lab):
    assert lab.finish(lab.new_folder(), seed=1) == "other parameters, optimizer, batch_loss.npy, metrics.csv"
    shutil.copytree(lab.half, workdir := lab.new_folder())
    (workdir / "config.json").write_text("{}")
    assert lab.finish(workdir) == REFUSED


@pytest.mark.parametrize(("method", "outcome"), [("_set_aside", "kept: False, says 1"), ("say", "kept: True, says 0")])
def test_falling_back_otherwise_is_found(method, outcome, lab, monkeypatch):
    owner = checkpoint.Checkpoints if method == "_set_aside" else checkpoint
    monkeypatch.setattr(owner, method, lambda *_, **__: "nowhere")
    file = Path("checkpoints", "2", "progress", "metadata")
    found = disks.one_damaged_file(lab, file, "cut", np.random.default_rng(0))
    assert found == f"cut metadata: {outcome} lines"


def test_a_cache_that_is_taken_as_it_is_is_found(lab, monkeypatch):
    monkeypatch.setattr(cache, "_checksum", lambda path: "the same")
    outcomes = caches.damaged(lab, 16, np.random.default_rng(0))
    assert any(outcome.endswith(data_files.CHANGED) for outcome in outcomes)


def test_locks_that_are_needed_are_found(lab, monkeypatch):
    """The lines that training prints are counted."""
    monkeypatch.setattr(runs, "say", lambda text, error: None)
    assert list(disks.no_locks(lab, 1, np.random.default_rng(0))) == [f"says 0 lines: {IDENTICAL}"]


def test_a_signal_that_is_lost_is_found(lab, monkeypatch):
    """In this process, as the other imports the package anew."""
    monkeypatch.setattr(victims, "run", lambda *_: 0)  # the command went on to its end
    assert list(stops.garbage_collection(lab, 1, np.random.default_rng(0))) == ["status 0, , left []"]


@pytest.mark.long
def test_the_small_datasets_are_whole(tmp_path):
    """Unchanged, each layout is read as it was: else mutations would be refused for nothing."""
    for name, make in {**layouts.LAYOUTS, **layouts.RECORDS, "image folder": layouts.image_folder}.items():
        assert data_files.read(data_files.write(tmp_path / name, make())) == data_files.RIGHT, name


# --- Malicious files are read with limits ---


def execute(path):
    os.system("true")
    return "read"


def write_outside(path):
    (path.parent.parent / "escaped").write_text("")
    return "read"


def take_memory(path):
    return str(len(np.ones(2**27)))  # 1 GiB


def crash(path):
    if path.name == "bad":
        os.kill(os.getpid(), signal.SIGSEGV)
    return "read"


def spin(path):
    signal.raise_signal(signal.SIGPROF)  # like the timer after 10 s of CPU time
    return "read"


def refuse(path):
    raise UserError("one line")


def fail(path):
    raise RecursionError


@pytest.mark.parametrize(
    ("task", "outcome"),
    [
        (execute, "bad: os.system "),
        (write_outside, "bad: open outside its folder, escaped"),
        (take_memory, "bad: takes 1024 MiB"),
        (crash, "bad: ends its process (status -11)"),
        (spin, "bad: takes over 10 s"),
        (refuse, REFUSED),
        (fail, "bad: RecursionError"),
    ],
)
def test_what_reading_a_file_must_not_do(task, outcome, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "folder").mkdir()
    paths = [tmp_path / "folder" / name for name in ("bad", "good")]
    first, second = guard.read_all(task, paths, tmp_path / "folder")
    assert re.fullmatch(r"bad: takes 10\d\d MiB", first) if task is take_memory else first == outcome
    assert second == "read" or task is not crash


def test_mutations_change_bytes():
    rng = np.random.default_rng(0)
    data = rng.bytes(5000)
    mutated = [mutate(data, rng) for _ in range(100)]
    assert sum(other != data for other in mutated) > 90
    assert {len(other) < 5000 for other in mutated} == {True, False}
    assert all(isinstance(mutate(b"", rng), bytes) for _ in range(100))


@pytest.mark.long
def test_crafted_files_are_small():
    weights, folders = weight_files.crafted_files(), data_files.crafted_folders()
    contents = [*weights.values(), *(content for folder in folders.values() for content in folder.values())]
    assert max(map(len, contents)) < 10**7
    assert len(weights) == by_name("crafted weight files").count
    assert len(folders) == by_name("crafted data files").count
