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
from cifar_jax.datasets import DATASETS
from cifar_jax.distillation import View, create_view_numbers, distillation_loss, list_views
from cifar_jax.errors import UserError
from cifar_jax.models import LeNet5
from cifar_jax.outcomes import Interrupted
from cifar_jax.parallel import replicate, select_devices
from cifar_jax.pretrained import load_pretrained, pretrained_path
from cifar_jax.sources import load_run
from cifar_jax.teacher import compute_teacher_logits, identify_teacher, load_teacher
from cifar_jax.train import train_and_evaluate
from cifar_jax.trainer import Trainer
from cifar_jax.weights.files import save_weights

pytestmark = pytest.mark.usefixtures("direct_convolutions", "no_figures")
NEVER = lambda: False
CIFAR10 = DATASETS["cifar10"]


@pytest.fixture
def taught_config(plain_config):
    """Two views: as drawn and mirrored."""
    return dataclasses.replace(plain_config, dataset="cifar10", random_flip=True, teacher="lenet5_reference")


@pytest.fixture
def dataset(tiny_dataset):
    """40 digits that pass for CIFAR-10."""
    return dataclasses.replace(first_images(tiny_dataset, 40), info=DATASETS["cifar10"])


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
    source = load_teacher(config.teacher, CIFAR10)
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
    source, devices = load_teacher(taught_config.teacher, CIFAR10), select_devices(taught_config)
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


def test_a_full_disk_does_not_hide_what_the_cache_has(taught_config, dataset, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CIFAR_JAX_CACHE", str(tmp_path))
    source, devices = load_teacher(taught_config.teacher, CIFAR10), select_devices(taught_config)
    cached = compute_teacher_logits(taught_config, source, dataset, devices, NEVER)
    larger = dataclasses.replace(taught_config, crop_padding=taught_config.crop_padding + 1)
    new = set(list_views(larger)) - set(list_views(taught_config))
    computed = []

    def full(*_):
        raise OSError(28, "No space left on device")

    def create(*_):
        return lambda view, stop: computed.append(view) or np.zeros_like(cached[:, 0])

    monkeypatch.setattr(teacher, "write_atomically", full)
    monkeypatch.setattr(teacher, "_create_compute", create)
    compute_teacher_logits(larger, source, dataset, devices, NEVER)
    assert set(computed) == new
    assert capsys.readouterr().err.count("can't cache") == 1


def test_without_a_place_for_the_cache_they_are_computed(taught_config, dataset, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CIFAR_JAX_CACHE", str(tmp_path / "file"))
    source, devices = load_teacher(taught_config.teacher, CIFAR10), select_devices(taught_config)
    assert compute_teacher_logits(taught_config, source, dataset, devices, NEVER).shape == (40, 2, 10)
    assert capsys.readouterr().err.count("can't cache") == 1


def test_logits_that_take_too_much_memory_are_refused_before_they_are_computed(taught_config, dataset, monkeypatch):
    monkeypatch.setattr(teacher, "MAX_BYTES", 1599)
    source = load_teacher(taught_config.teacher, CIFAR10)
    with pytest.raises(UserError, match="--crop-padding"):
        compute_teacher_logits(taught_config, source, dataset, select_devices(taught_config), NEVER)


def test_teachers_that_compute_alike_are_the_same():
    source = load_teacher("lenet5", CIFAR10)
    digest = identify_teacher(source)
    assert digest == identify_teacher(dataclasses.replace(source, temperature=2.0))
    for field, value in (("final_relu", True), ("input_scaling", "unit"), ("dataset", "cifar100")):
        assert digest != identify_teacher(dataclasses.replace(source, **{field: value}))


@pytest.mark.parametrize("flip", ["random_flip", pytest.param("alternating_flip", marks=pytest.mark.long)])
def test_a_copy_of_the_teacher_has_nothing_to_learn(taught_config, dataset, flip):
    """Each step finds the logits of the very images that it draws, on two devices."""
    changes = {"random_flip": flip == "random_flip", "alternating_flip": flip == "alternating_flip"}
    changes |= {"crop_padding": 1, "teacher_share": 1.0, "learning_rate": 1e-3, "num_devices": 2, "batch_size": 20}
    config = dataclasses.replace(taught_config, **changes)
    source, devices = load_teacher(config.teacher, CIFAR10), select_devices(config)
    logits = compute_teacher_logits(config, source, dataset, devices, NEVER)
    trainer = Trainer(config, dataset.train_images, dataset.train_labels, devices)
    changes = []
    for teacher_logits in (logits, np.roll(logits, 1, axis=1)):
        trainer.state = trainer.state.replace(params=replicate(source.params, devices))
        trainer.teach(teacher_logits)
        trainer.run_epoch(0, 0)
        differences = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), trainer.state.params, source.params)
        changes.append(max(jax.tree.leaves(differences)))
    assert changes[0] < 0.05 * changes[1]  # logits are rounded to float16


def test_the_reported_loss_is_that_of_the_labels(taught_config, dataset):
    """So it stays at chance where a training has stalled. The gradients are others."""
    config = dataclasses.replace(taught_config, label_smoothing=0.1)
    logits = np.zeros((40, 2, 10), np.float16)
    states, histories = [], []
    for name in ("lenet5_reference", None):
        changed = dataclasses.replace(config, teacher=name)
        trainer = Trainer(changed, dataset.train_images, dataset.train_labels, select_devices(config))
        if name:
            trainer.teach(logits)
        trainer.run_steps(trainer.order(0), 0, 1)
        states.append(trainer.state.params["Conv_0"]["kernel"])
        histories.append(np.asarray(trainer.history["loss"])[0])
    assert histories[0] == pytest.approx(histories[1], rel=1e-5)
    assert np.abs(states[0] - states[1]).max() > 1e-4


def test_a_trainer_that_was_not_taught_is_refused(taught_config, dataset):
    trainer = Trainer(taught_config, dataset.train_images, dataset.train_labels, select_devices(taught_config))
    with pytest.raises(UserError):
        trainer.run_epoch(0, 0)


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


def test_a_teacher_may_move_but_not_change(taught_config, dataset, tmp_path, capsys):
    """A complete run needs no teacher."""
    weights, moved = tmp_path / "teacher.safetensors", tmp_path / "moved.safetensors"
    weights.write_bytes(pretrained_path("lenet5_reference").read_bytes())
    config = dataclasses.replace(taught_config, teacher=str(weights), num_epochs=1)
    train_and_evaluate(config, dataset=dataset)
    weights.rename(moved)
    for name in (weights, moved):
        train_and_evaluate(dataclasses.replace(config, teacher=str(name)), dataset=dataset)
        assert "already complete" in capsys.readouterr().out
    (Path(config.workdir) / "summary.json").unlink()
    train_and_evaluate(dataclasses.replace(config, teacher=str(moved)), dataset=dataset)
    weights.write_bytes(pretrained_path("lenet5").read_bytes())
    (Path(config.workdir) / "summary.json").unlink()
    with pytest.raises(UserError, match="--teacher"):
        train_and_evaluate(config, dataset=dataset)
    with pytest.raises(UserError, match="teacher"):
        train_and_evaluate(dataclasses.replace(config, teacher=None), dataset=dataset)


def test_a_run_is_a_teacher(plain_config, taught_config, dataset):
    """Its latest checkpoint, in float32 whatever its own type."""
    config = dataclasses.replace(plain_config, num_epochs=1, dataset="cifar10", dtype="bfloat16")
    train_and_evaluate(config, dataset=dataset)
    source = load_teacher(config.workdir, CIFAR10)
    for layer, values in load_run(Path(config.workdir), "latest")[1].params.items():
        np.testing.assert_array_equal(source.params[layer]["kernel"], values["kernel"])
    logits = compute_teacher_logits(taught_config, source, dataset, select_devices(taught_config), NEVER)
    images = scale_images(jnp.asarray(dataset.train_images), *pixel_statistics("symmetric", "cifar10"))
    expected = LeNet5().apply({"params": source.params}, images)
    np.testing.assert_allclose(logits[:, 0], expected, rtol=0, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["digits", "cifar100"])
def test_a_teacher_of_other_classes_is_refused(name):
    with pytest.raises(UserError, match="--teacher lenet5"):
        load_teacher("lenet5", DATASETS[name])


def test_digits_do_not_teach_cifar(tmp_path):
    """Their classes are called as unknown classes are."""
    digits = dataclasses.replace(load_teacher("lenet5", CIFAR10), dataset="digits", class_names=tuple("0123456789"))
    save_weights(tmp_path / "digits.safetensors", digits)
    with pytest.raises(UserError, match="classes are not those of CIFAR-10"):
        load_teacher(str(tmp_path / "digits.safetensors"), CIFAR10)


@pytest.mark.usefixtures("use_tiny_dataset", "no_steps")
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--teacher nobody", "--teacher nobody"),
        ("--teacher .", "config.json"),  # a folder without a run
        ("--teacher=", "--teacher"),
        (f"--teacher {'x' * 300}", "--teacher xxx"),
        ("--teacher lenet5", "--teacher lenet5"),  # its classes are no digits
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
