"""Learning from a teacher: the views it sees, its loss, its cached logits, and runs with one."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import first_images, latest_state, stop_at, untimed_rows

from cifar_jax import teacher, train
from cifar_jax.augment import create_input_transform
from cifar_jax.batches import pixel_statistics, scale_images, take_batch
from cifar_jax.distillation import View, create_view_numbers, distillation_loss, list_views
from cifar_jax.errors import UserError
from cifar_jax.outcomes import Interrupted
from cifar_jax.parallel import replicate, select_devices
from cifar_jax.pretrained import load_pretrained, pretrained_path
from cifar_jax.teacher import compute_teacher_logits, load_teacher
from cifar_jax.train import train_and_evaluate
from cifar_jax.trainer import Trainer

pytestmark = pytest.mark.usefixtures("direct_convolutions", "no_figures")
NEVER = lambda: False


@pytest.fixture
def taught_config(plain_config):
    """Two views: as drawn and mirrored."""
    return dataclasses.replace(plain_config, random_flip=True, teacher="lenet5_reference")


@pytest.fixture
def dataset(tiny_dataset):
    return first_images(tiny_dataset, 40)


def seen(view, images):
    """What the teacher sees, written out with numpy."""
    images = images[:, :, ::-1] if view.mirrored else images
    pad = 2
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
    y, x = pad + view.shift_y, pad + view.shift_x
    return padded[:, y : y + 32, x : x + 32]


@pytest.mark.parametrize("flip", ["random_flip", "alternating_flip", None])
@pytest.mark.parametrize("padding", [0, 2])
def test_the_number_is_of_the_view_that_the_step_draws(plain_config, tiny_dataset, flip, padding):
    flips = {name: name == flip for name in ("random_flip", "alternating_flip")}
    config = dataclasses.replace(plain_config, crop_padding=padding, **flips)
    images, labels = map(jnp.asarray, (tiny_dataset.train_images, tiny_dataset.train_labels))
    batch = take_batch(images, labels, jnp.arange(90)[::-1], jnp.int32(3), 40) | {"epoch": jnp.int32(1)}
    arguments = jax.random.key(1), jnp.int32(7), jnp.int32(1), batch
    actual, _ = jax.jit(create_input_transform(config, 32))(*arguments)
    numbers = jax.jit(create_view_numbers(config))(*arguments)
    views = [list_views(config)[number] for number in numbers]
    expected = np.concatenate([seen(view, image[None]) for view, image in zip(views, np.asarray(batch["image"]))])
    statistics = pixel_statistics(config.input_scaling, config.dataset)
    np.testing.assert_allclose(actual, scale_images(expected, *statistics), atol=1e-6)
    assert len({view.mirrored for view in views}) == (2 if flip else 1)
    assert len(set(views)) > (10 if padding else 0)


def test_the_loss_against_numpy():
    rng = np.random.default_rng(0)
    logits, wanted = rng.normal(0, 3, (2, 5, 10))
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    p, q = softmax(wanted / 4), softmax(logits / 4)
    loss = distillation_loss(jnp.float32(logits), jnp.float32(wanted), 4.0)
    np.testing.assert_allclose(loss, 16 * (p * np.log(p / q)).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(distillation_loss(jnp.float32(logits), jnp.float32(logits), 4.0), 0, atol=1e-5)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_the_logits_are_the_teachers_of_every_view(taught_config, dataset, num_devices, monkeypatch):
    """Computed once, on one or two devices and with a partial last batch, then read from the cache."""
    config = dataclasses.replace(taught_config, crop_padding=1, num_devices=num_devices, eval_batch_size=16)
    monkeypatch.setattr(teacher, "list_views", lambda config: [View(0, 0, 0), View(1, 1, -1), View(0, -1, 1)])
    source = load_teacher(config.teacher, 10)
    logits = compute_teacher_logits(config, source, dataset, select_devices(config), NEVER)
    model, variables, preprocess = load_pretrained(config.teacher)
    assert (logits.dtype, logits.shape) == (np.float16, (40, 3, 10))
    for number, view in enumerate(teacher.list_views(config)):
        expected = model.apply(variables, preprocess(seen(view, dataset.train_images)))
        np.testing.assert_allclose(logits[:, number], expected, rtol=0, atol=2e-3 * np.abs(expected).max())
    monkeypatch.setattr(teacher, "_create_compute", None)
    again = compute_teacher_logits(config, source, dataset, select_devices(config), NEVER)
    assert again.tobytes() == logits.tobytes()


def test_the_cache_survives_damage_and_is_of_these_images(taught_config, dataset, tiny_dataset, tmp_path, monkeypatch):
    source, devices = load_teacher(taught_config.teacher, 10), select_devices(taught_config)
    computed = []
    create = teacher._create_compute

    def counting(*arguments):
        compute = create(*arguments)
        return lambda view, stop: computed.append(view) or compute(view, stop)

    monkeypatch.setattr(teacher, "_create_compute", counting)
    monkeypatch.setenv("CIFAR_JAX_CACHE", str(tmp_path / "cache"))
    logits = compute_teacher_logits(taught_config, source, dataset, devices, NEVER)
    assert computed == list_views(taught_config)
    first, second = sorted((tmp_path / "cache").glob("teacher-*/*"))
    first.write_bytes(first.read_bytes()[:-1])
    content = bytearray(second.read_bytes())
    content[200] ^= 1
    second.write_bytes(content)
    assert compute_teacher_logits(taught_config, source, dataset, devices, NEVER).tobytes() == logits.tobytes()
    assert len(computed) == 4
    others = compute_teacher_logits(taught_config, source, first_images(tiny_dataset, 39), devices, NEVER)
    assert len(others) == 39
    assert len(computed) == 6


def test_without_a_place_for_the_cache_they_are_computed(taught_config, dataset, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CIFAR_JAX_CACHE", str(tmp_path / "file"))
    source, devices = load_teacher(taught_config.teacher, 10), select_devices(taught_config)
    assert compute_teacher_logits(taught_config, source, dataset, devices, NEVER).shape == (40, 2, 10)
    assert "can't cache" in capsys.readouterr().err


@pytest.mark.parametrize("flip", ["random_flip", "alternating_flip"])
def test_a_copy_of_the_teacher_has_nothing_to_learn(taught_config, dataset, flip):
    """Each step finds the logits of the very images that it draws, on two devices."""
    changes = {"random_flip": flip == "random_flip", "alternating_flip": flip == "alternating_flip"}
    changes |= {"crop_padding": 1, "teacher_share": 1.0, "learning_rate": 1e-6, "num_devices": 2, "batch_size": 20}
    config = dataclasses.replace(taught_config, **changes)
    source, devices = load_teacher(config.teacher, 10), select_devices(config)
    logits = compute_teacher_logits(config, source, dataset, devices, NEVER)
    trainer = Trainer(config, dataset.train_images, dataset.train_labels, devices)
    trainer.state = trainer.state.replace(params=replicate(jax.device_get(source.state.params), devices))
    for teacher_logits, loss in ((logits, 0), (np.roll(logits, 1, axis=1), None)):
        trainer.teach(teacher_logits)
        trainer.run_epoch(0, 0)
        losses = np.asarray(trainer.history["loss"])
        assert (np.abs(losses) < 1e-4).all() if loss == 0 else (losses > 1e-3).all()


def test_a_taught_run_learns_and_resumes_bit_for_bit(taught_config, dataset, tmp_path):
    config = dataclasses.replace(taught_config, num_epochs=2, learning_rate=0.002)
    summary = train_and_evaluate(config, dataset=dataset)
    assert summary["config"]["teacher"] == "lenet5_reference"
    assert summary["metrics"][1]["train_loss"] < summary["metrics"][0]["train_loss"]
    stopped = dataclasses.replace(config, workdir=str(tmp_path / "stopped"))
    with pytest.raises(Interrupted):
        train_and_evaluate(stopped, dataset=dataset, stop=stop_at(12))
    saved = json.loads((Path(stopped.workdir) / "dataset.json").read_text())
    assert len(saved["teacher_sha256"]) == 64
    train_and_evaluate(stopped, dataset=dataset)
    assert untimed_rows(stopped) == untimed_rows(config)
    for a, b in zip(latest_state(stopped), latest_state(config)):
        assert a.tobytes() == b.tobytes()


def test_stopped_while_the_teacher_computes(taught_config, dataset, monkeypatch):
    monkeypatch.setattr(teacher, "_create_compute", lambda *_: lambda view, stop: None)
    with pytest.raises(Interrupted):
        train_and_evaluate(taught_config, dataset=dataset)


def test_a_changed_teacher_is_refused(taught_config, dataset, tmp_path):
    weights = tmp_path / "teacher.safetensors"
    weights.write_bytes(pretrained_path("lenet5_reference").read_bytes())
    config = dataclasses.replace(taught_config, teacher=str(weights), num_epochs=1)
    train_and_evaluate(config, dataset=dataset)
    weights.write_bytes(pretrained_path("lenet5").read_bytes())
    (Path(config.workdir) / "summary.json").unlink()
    with pytest.raises(UserError, match="--teacher"):
        train_and_evaluate(config, dataset=dataset)


def test_a_teacher_of_other_classes_is_refused():
    with pytest.raises(UserError, match="--teacher lenet5"):
        load_teacher("lenet5", 100)


@pytest.mark.usefixtures("use_tiny_dataset", "no_steps")
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--teacher nobody", "--teacher nobody"),
        ("--teacher .", "config.json"),  # a folder without a run
        ("--teacher lenet5 --teacher-share 0", "--teacher-share"),
        ("--teacher lenet5 --teacher-temperature 0", "--teacher-temperature"),
        ("--teacher lenet5 --rotation-degrees 5", "--rotation-degrees"),
        ("--teacher lenet5 --mixup-alpha 0.2", "--mixup-alpha"),
        ("--teacher lenet5 --trivial-augment", "--trivial-augment"),
    ],
)
def test_bad_input_is_one_line(flags, named, run_command, tmp_path):
    small = ["--batch-size", "30", "--num-devices", "1"]
    status, _, errors = run_command(train.main, "lenet5", "--workdir", tmp_path / "run", *small, *flags.split())
    assert status == 2
    assert errors.count("error: ") == 1
    assert named in errors
