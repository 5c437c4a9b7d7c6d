import dataclasses
import errno
import json
import re
import resource
import shutil
import signal
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from cifar_jax import checkpoint
from cifar_jax.checkpoint import Checkpoints, Progress
from cifar_jax.errors import UserError
from cifar_jax.metrics import EpochMetrics, RunLog
from cifar_jax.parallel import replicate
from cifar_jax.train_step import create_train_state
from cifar_jax.trainer import create_history

ROW = EpochMetrics(1, 1.5, 0.25, 1.25, 0.5, 0.01, 2.0, 100.0)


@pytest.fixture
def state(tiny_config):
    return replicate(create_train_state(tiny_config, 6), jax.local_devices()[:1])


@pytest.fixture
def history():
    return replicate(create_history(6), jax.local_devices()[:1])


@pytest.fixture
def save(state, history):
    """Returns save(checkpoints, step, accuracy), which saves a state of that step and a log of as many epochs."""

    def save(checkpoints, step, accuracy=None):
        rows = [dataclasses.replace(ROW, epoch=epoch) for epoch in range(1, step + 1)]
        log = RunLog(rows, np.arange(6 * step, dtype=np.float32))
        checkpoints.save(state.replace(step=state.step + step), history, Progress(step, 2, 1.5), log, accuracy)

    return save


def test_latest_two_and_best_are_kept(state, history, save, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore_run(state, history) is None
    for step, accuracy in enumerate([0.1, 0.5, None, 0.3, 0.4, None], start=1):
        save(checkpoints, step, accuracy)
    assert {folder.name for folder in (tmp_path / "checkpoints").iterdir()} == {"2", "5", "6"}
    checkpoints = Checkpoints(tmp_path)
    best, progress = checkpoints.restore_state("best", state)
    assert (int(best.step), progress) == (2, Progress(2, 2, 1.5))
    restored = checkpoints.restore_run(state, history)
    assert (int(restored.state.step), restored.progress) == (6, Progress(6, 2, 1.5))
    leaves = lambda state: jax.tree.leaves((state.params, state.opt_state))
    for a, b in zip(leaves(restored.state), leaves(state)):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(jax.random.key_data(restored.state.rng), jax.random.key_data(state.rng))
    assert set(restored.history) == {"loss", "correct", "count"}
    assert restored.log.rows == [dataclasses.replace(ROW, epoch=epoch) for epoch in range(1, 7)]
    np.testing.assert_array_equal(restored.log.batch_loss, np.arange(36, dtype=np.float32))


def test_no_checkpoint_yet(state, tmp_path):
    for which in ("best", "latest"):
        with pytest.raises(UserError, match=f"no {which} checkpoint yet"):
            Checkpoints(tmp_path).restore_state(which, state)


def test_restored_onto_more_devices(state, save, tmp_path):
    save(Checkpoints(tmp_path), 1, 0.5)
    (tmp_path / "checkpoints" / "1" / ".DS_Store").touch()  # a file manager's files do no harm
    on_four = replicate(jax.device_get(state), jax.local_devices())
    restored, _ = Checkpoints(tmp_path).restore_state("latest", on_four)
    assert len(restored.params["Dense_0"]["kernel"].devices()) == 4


def test_a_key_names_its_generator(state, save, tmp_path):
    """A run is restored independently of the user's default."""
    with jax.default_prng_impl("rbg"):
        save(Checkpoints(tmp_path), 1)
    restored, _ = Checkpoints(tmp_path).restore_state("latest", state)
    assert jax.random.key_impl(restored.rng) == "threefry2x32"


def test_a_key_of_an_earlier_version_is_restored(state, save, tmp_path, monkeypatch):
    """It was saved as a key, not as its data."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "plain", lambda tree: tree)
        save(Checkpoints(tmp_path), 1)
    restored, _ = Checkpoints(tmp_path).restore_state("latest", state)
    np.testing.assert_array_equal(jax.random.key_data(restored.rng), jax.random.key_data(state.rng))


DAMAGES = ("flip", "truncate", "delete")


@pytest.mark.parametrize("damages", [DAMAGES, *(pytest.param((one,), marks=pytest.mark.long) for one in DAMAGES)])
def test_any_damaged_file_of_the_latest_is_survived(damages, state, history, save, tmp_path, capsys):
    """The run resumes from the previous checkpoint, with one warning, and keeps the damaged one.

    Each file is damaged in one way, which its name decides.
    """
    workdir = tmp_path / "run"
    for step in (1, 2):
        save(Checkpoints(workdir), step, 0.5)
    files = [file for file in (workdir / "checkpoints" / "2").rglob("*") if file.is_file()]
    assert len(files) > 10
    for damaged in files:
        name = "data" if re.fullmatch("[0-9a-f]{32}", damaged.name) else damaged.name  # their names are random
        damage = damages[zlib.crc32(f"{damaged.parent.name}/{name}".encode()) % len(damages)]
        whole = damaged.read_bytes()
        data = bytearray(whole)
        data[len(data) // 2] ^= 0x55
        if damage == "delete":
            damaged.unlink()
        else:
            damaged.write_bytes(data if damage == "flip" else data[: len(data) // 2])
        restored = Checkpoints(workdir).restore_run(state, history)
        error = capsys.readouterr().err
        aside = workdir / "checkpoints" / "damaged-2"
        if damaged.name == "sha256.json" and not aside.exists():  # a crash between the two writes: Orbax vouches
            assert int(restored.state.step) == 2
            damaged.write_bytes(whole)
            continue
        assert (int(restored.state.step), restored.progress.epoch, len(restored.log.rows)) == (1, 1, 1), damaged
        assert (error.count("\n"), "warning: " in error, "damaged-2" in error) == (1, True, True), damaged
        if damage != "delete":
            assert (aside / damaged.relative_to(workdir / "checkpoints/2")).read_bytes() != whole
        aside.rename(workdir / "checkpoints" / "2")
        damaged.write_bytes(whole)
    assert int(Checkpoints(workdir).restore_run(state, history).state.step) == 2


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (ValueError("RESOURCE_EXHAUSTED: Too many open files [os_error_code='24']"), OSError),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), jax.errors.JaxRuntimeError),
        (MemoryError(), MemoryError),
    ],
)
def test_files_that_the_system_cant_read_are_no_damage(failure, told, state, history, save, tmp_path, monkeypatch):
    for number in (1, 2):
        save(Checkpoints(tmp_path), number, 0.5)

    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)
    with pytest.raises(told):
        Checkpoints(tmp_path).restore_run(state, history)
    monkeypatch.undo()
    assert int(Checkpoints(tmp_path).restore_run(state, history).state.step) == 2


def test_an_error_of_the_system_is_no_damage(state, history, save, tmp_path, monkeypatch):
    save(Checkpoints(tmp_path), 1, 0.5)

    def fail(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(checkpoint, "find_damage", fail)
    for read in (Checkpoints, lambda _: checkpoints.restore_run(state, history)):
        with pytest.raises(OSError, match="Too many"):
            read(tmp_path)
    monkeypatch.undo()
    assert int(Checkpoints(tmp_path).restore_run(state, history).state.step) == 1


def damage(folder):
    """Changes a byte of a checkpoint's largest file."""
    file = max(folder.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x55
    file.write_bytes(data)


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_damaged_checkpoint_is_never_overwritten(state, history, save, tmp_path, capsys):
    """Also if a later checkpoint with the same number is damaged."""
    folder = tmp_path / "checkpoints"
    save(Checkpoints(tmp_path), 1)
    kept = []
    for _ in range(3):
        save(Checkpoints(tmp_path), 2)
        damage(folder / "2")
        kept.append(files_of(folder / "2"))
        checkpoints = Checkpoints(tmp_path)
        assert int(checkpoints.restore_run(state, history).state.step) == 1
    for step in range(2, 6):
        save(checkpoints, step)
    asides = [files_of(path) for path in sorted(folder.iterdir()) if path.name.startswith("damaged-")]
    assert asides == kept
    assert capsys.readouterr().err.count("\n") == 3


def test_two_damaged_checkpoints_before_a_whole_one(state, history, save, tmp_path, capsys):
    for step, accuracy in ((1, 0.9), (2, 0.1), (3, 0.1)):
        save(Checkpoints(tmp_path), step, accuracy)
    for step in (2, 3):
        damage(tmp_path / "checkpoints" / str(step))
    assert int(Checkpoints(tmp_path).restore_run(state, history).state.step) == 1
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "damaged-2", "damaged-3"}
    assert capsys.readouterr().err.count("warning: ") == 2


def test_all_damaged_is_refused_and_nothing_is_touched(state, history, save, tmp_path, capsys):
    for step in (1, 2):
        save(Checkpoints(tmp_path), step, 0.5)
        damage(tmp_path / "checkpoints" / str(step))
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=r"checkpoints/2.*--workdir"):
        Checkpoints(tmp_path).restore_run(state, history)
    for which in ("latest", "best"):
        with pytest.raises(UserError, match=r"checkpoints/[12]"):
            Checkpoints(tmp_path).restore_state(which, state)
    assert files_of(tmp_path) == before
    assert capsys.readouterr().err == ""


JSON_TEXTS = ["[]", "null", "3", '"text"', "{}", '{"a": {"b": [1]}}', "", "\0" * 50, "[" * 100_000, '{"a":' * 100_000]
FEW_TEXTS = ("[]", "3", "{}", "")


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """Of states with few numbers: (workdir, state, history)."""
    workdir, state, history = tmp_path_factory.mktemp("run"), {"step": jnp.int32(0)}, {"loss": jnp.zeros(6)}
    for step in (1, 2):
        log = RunLog([dataclasses.replace(ROW, epoch=epoch) for epoch in range(1, step + 1)], np.zeros(3, np.float32))
        Checkpoints(workdir).save({"step": jnp.int32(step)}, history, Progress(step), log, 0.5)
    return workdir, state, history


@pytest.fixture
def small_run(two_checkpoints, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(two_checkpoints[0], tmp_path / "run"), *two_checkpoints[1:]


def fall_back(workdir, state, history, capsys):
    """Falls back to the first checkpoint, with one line each, and goes on."""
    for which in ("latest", "best"):
        assert int(Checkpoints(workdir).restore_state(which, state)[0]["step"]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    checkpoints = Checkpoints(workdir)
    restored = checkpoints.restore_run(state, history)
    assert (int(restored.state["step"]), restored.progress) == (1, Progress(1))
    assert capsys.readouterr().err.count("\n") == 1
    assert (workdir / "checkpoints" / "damaged-2").is_dir()
    checkpoints.save({"step": jnp.int32(2)}, history, Progress(2), restored.log, 0.5)
    assert int(Checkpoints(workdir).restore_run(state, history).state["step"]) == 2


@pytest.mark.parametrize(
    ("text", "checksums"),
    [
        *(pytest.param(text, True, marks=() if text in FEW_TEXTS else pytest.mark.long) for text in JSON_TEXTS),
        ("[" * 100_000, False),
    ],
)
def test_any_json_in_the_metadata_is_survived(text, checksums, small_run, capsys):
    """Orbax reads those of every checkpoint before it lists them, and stumbles over JSON of another kind."""
    folder = small_run[0] / "checkpoints" / "2"
    (folder / "_CHECKPOINT_METADATA").write_text(text)
    if checksums:
        fall_back(*small_run, capsys)
    else:  # after a crash between the two writes Orbax vouches
        (folder / "sha256.json").unlink()
        assert int(Checkpoints(small_run[0]).restore_run(*small_run[1:]).state["step"]) in (1, 2)


@pytest.mark.parametrize(
    ("text", "checksums"),
    [pytest.param("[]", True, marks=pytest.mark.long), ("[]", False), ("[" * 100_000, False)],
)
@pytest.mark.parametrize("name", ["history/_METADATA", "state/_METADATA", "progress/metadata"])
def test_any_json_in_an_items_metadata_is_survived(name, text, checksums, small_run, capsys):
    folder = small_run[0] / "checkpoints" / "2"
    (folder / name).write_text(text)
    if not checksums:
        (folder / "sha256.json").unlink()
    if name == "history/_METADATA" and not checksums:  # which an evaluation needs not
        assert int(Checkpoints(small_run[0]).restore_run(*small_run[1:]).state["step"]) == 1
    else:
        fall_back(*small_run, capsys)


@pytest.mark.parametrize(
    "change",
    [{"epoch": None}, {"step": "x"}, {"seconds": []}, {"rows": 3}, {"rows": [{}]}, {"rows": [[]]}, {"num_losses": -1},
     {"num_losses": None}, {"rows": [dataclasses.asdict(ROW) | {"seconds": "x"}]}, {"test_accuracy": "x"}],
    ids=str,
)  # fmt: skip
def test_progress_of_other_types_is_survived(change, small_run, capsys):
    """Without checksums, as they would tell."""
    folder = small_run[0] / "checkpoints" / "2"
    (folder / "sha256.json").unlink()
    progress = json.loads((folder / "progress" / "metadata").read_text())
    (folder / "progress" / "metadata").write_text(json.dumps(progress | change))
    best = 2 if {"rows", "num_losses"} & change.keys() else 1  # its parameters are whole
    assert int(Checkpoints(small_run[0]).restore_state("best", small_run[1])[0]["step"]) == best
    assert capsys.readouterr().err.count("\n") == 2 - best
    expected = 2 if "test_accuracy" in change else 1
    assert int(Checkpoints(small_run[0]).restore_run(*small_run[1:]).state["step"]) == expected
    assert capsys.readouterr().err.count("\n") == 2 - expected


def test_reading_passes_over_a_damaged_checkpoint_and_changes_nothing(state, save, tmp_path, capsys):
    for step, accuracy in ((1, 0.1), (2, 0.9)):
        save(Checkpoints(tmp_path), step, accuracy)
    damage(tmp_path / "checkpoints" / "2")
    before = files_of(tmp_path)
    assert int(Checkpoints(tmp_path).restore_state("latest", state)[0].step) == 1
    assert int(Checkpoints(tmp_path).restore_state("best", state)[0].step) == 1
    assert capsys.readouterr().err.count("warning: ") == 2
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "[]", '{"a": {}}'])
def test_damaged_checksums_are_no_traceback(content, state, save, tmp_path):
    save(Checkpoints(tmp_path), 1)
    (tmp_path / "checkpoints" / "1" / "sha256.json").write_text(content)
    if content == '{"a": {}}':  # it names a missing file
        with pytest.raises(UserError, match=r"checkpoints/1/a: "):
            Checkpoints(tmp_path).restore_state("latest", state)
    else:  # no more than after a crash between the two writes: Orbax vouches
        assert int(Checkpoints(tmp_path).restore_state("latest", state)[0].step) == 1


def test_another_models_checkpoint(save, tiny_config, tmp_path):
    save(Checkpoints(tmp_path), 1, 0.5)
    other = dataclasses.replace(tiny_config, model="all_cnn", dropout_rates=(0.0, 0.0, 0.0))
    with pytest.raises(UserError, match="another model"):
        Checkpoints(tmp_path).restore_state("latest", create_train_state(other, 6))


def test_replaced_while_it_is_read(state, save, tmp_path):
    writer = Checkpoints(tmp_path)
    save(writer, 1)
    reader = Checkpoints(tmp_path)
    for step in (2, 3):
        save(writer, step)
    with pytest.raises(UserError, match=r"checkpoints/1: .*try again"):
        reader.restore_state("latest", state)


# --- Full disks ---


def test_room_is_asked_for_before_anything_is_written(save, tmp_path, monkeypatch):
    save(Checkpoints(tmp_path), 1)
    before = files_of(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"checkpoints: .*disk space"):
        save(Checkpoints(tmp_path), 2)
    assert files_of(tmp_path) == before


def test_a_full_disk_is_one_line_without_the_noise_of_threads(state, history, save, tmp_path, capfd, caplog):
    """A limit on file sizes acts like a full disk: Orbax' threads fail, and would print tracebacks."""
    save(Checkpoints(tmp_path), 1)
    capfd.readouterr()
    caplog.clear()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"checkpoints: ") as error:
            save(Checkpoints(tmp_path), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(error.value)
    assert "free disk space" in str(error.value)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert int(Checkpoints(tmp_path).restore_run(state, history).state.step) == 1


@pytest.mark.parametrize(
    ("failure", "advice"),
    [
        (OSError(28, "No space left on device"), "disk space"),
        (OSError(122, "Disk quota exceeded"), "disk space"),
        (ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']"), "disk space"),
        (ValueError("UNKNOWN: Disk quota exceeded [os_error_code='122']"), "disk space"),
        (PermissionError(13, "Permission denied"), "writable"),
        (OSError(5, "Input/output error"), "writable"),
    ],
)
def test_the_advice_on_a_failed_save_is_true(failure, advice, save, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    with pytest.raises(UserError, match=advice):
        save(Checkpoints(tmp_path), 1)
