import dataclasses

import jax
import numpy as np
import pytest

from cifar_jax.checkpoint import Checkpoints, Progress
from cifar_jax.errors import UserError
from cifar_jax.parallel import replicate
from cifar_jax.train_step import create_history, create_train_state


@pytest.fixture
def state(tiny_config):
    return replicate(create_train_state(tiny_config, 6), jax.local_devices()[:1])


@pytest.fixture
def history():
    return replicate(create_history(6), jax.local_devices()[:1])


def at_step(state, step):
    return state.replace(step=state.step + step)


def test_latest_and_best_are_kept(state, history, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore_run(state, history) is None
    for step, accuracy in enumerate([0.1, 0.5, None, 0.3, 0.4, None], start=1):
        checkpoints.save(at_step(state, step), history, Progress(step, 2, 1.5), accuracy)
    assert {folder.name for folder in (tmp_path / "checkpoints").iterdir()} == {"2", "6"}
    checkpoints = Checkpoints(tmp_path)
    restored, progress = checkpoints.restore_state("best", state)
    assert (int(restored.step), progress) == (2, Progress(2, 2, 1.5))
    restored, restored_history, progress = checkpoints.restore_run(state, history)
    assert (int(restored.step), progress) == (6, Progress(6, 2, 1.5))
    for a, b in zip(
        jax.tree.leaves((restored.params, restored.opt_state)), jax.tree.leaves((state.params, state.opt_state))
    ):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(jax.random.key_data(restored.rng), jax.random.key_data(state.rng))
    assert set(restored_history) == {"loss", "correct", "count"}


def test_no_checkpoint_yet(state, tmp_path):
    for which in ("best", "latest"):
        with pytest.raises(UserError, match=f"no {which} checkpoint yet"):
            Checkpoints(tmp_path).restore_state(which, state)


def test_restored_onto_more_devices(state, history, tmp_path):
    Checkpoints(tmp_path).save(state, history, Progress(1), 0.5)
    (tmp_path / "checkpoints" / "1" / ".DS_Store").touch()  # a file manager's does no harm
    on_four = replicate(jax.device_get(state), jax.local_devices())
    restored, _ = Checkpoints(tmp_path).restore_state("latest", on_four)
    assert len(restored.params["Dense_0"]["kernel"].devices()) == 4


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_every_damaged_file_is_named_and_nothing_is_lost(damage, state, history, tmp_path):
    workdir = tmp_path / "run"
    checkpoints = Checkpoints(workdir)
    checkpoints.save(at_step(state, 1), history, Progress(1), 0.5)
    checkpoints.save(at_step(state, 2), history, Progress(2), 0.4)
    files = [file for file in (workdir / "checkpoints" / "2").rglob("*") if file.is_file()]
    assert len(files) > 10
    for damaged in files:
        whole = damaged.read_bytes()
        data = bytearray(whole)
        data[len(data) // 2] ^= 0x55
        if damage == "delete":
            damaged.unlink()
        else:
            damaged.write_bytes(data if damage == "flip" else data[: len(data) // 2])
        if damaged.name == "sha256.json" and damage != "flip":  # a crash between the two writes: Orbax vouches
            assert int(Checkpoints(workdir).restore_state("latest", state)[0].step) == 2
            damaged.write_bytes(whole)
            continue
        name = ".*" if damaged.name == "sha256.json" else damaged.name  # its own bits accuse another file
        with pytest.raises(UserError, match=rf"{name}: damaged or missing: move {workdir}/checkpoints/2 away"):
            Checkpoints(workdir).restore_state("latest", state)
        (workdir / "checkpoints" / "2").rename(tmp_path / "aside")
        restored, progress = Checkpoints(workdir).restore_state("latest", state)
        assert (int(restored.step), progress.epoch) == (1, 1)
        (tmp_path / "aside").rename(workdir / "checkpoints" / "2")
        damaged.write_bytes(whole)
    assert int(Checkpoints(workdir).restore_state("latest", state)[0].step) == 2  # nothing was changed by the refusals


def test_another_models_checkpoint(state, history, tiny_config, tmp_path):
    Checkpoints(tmp_path).save(state, history, Progress(1), 0.5)
    other = dataclasses.replace(tiny_config, model="all_cnn", dropout_rates=(0.0, 0.0, 0.0))
    with pytest.raises(UserError, match="damaged, or of another model"):
        Checkpoints(tmp_path).restore_state("latest", create_train_state(other, 6))


def test_replaced_while_it_is_read(state, history, tmp_path):
    writer = Checkpoints(tmp_path)
    writer.save(state, history, Progress(1), None)
    reader = Checkpoints(tmp_path)
    writer.save(state, history, Progress(2), None)
    with pytest.raises(UserError, match="replaced by a training that is under way: try again"):
        reader.restore_state("latest", state)


def test_a_full_disk(state, history, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(UserError, match=r"can't save .*No space left on device.*: make room"):
        checkpoints.save(state, history, Progress(1), None)
