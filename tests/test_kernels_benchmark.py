import json

import pytest

from benchmarks import early_training, kernels
from cifar_jax import parallel
from cifar_jax.configs import RECIPES


@pytest.mark.usefixtures("direct_convolutions")
def test_every_form_is_timed_and_written(tmp_path, run_command, monkeypatch):
    monkeypatch.setitem(kernels.WORKLOADS, "lenet5_batch4", (RECIPES["lenet5_reference"], 1))
    for form in (
        "kernel gradient",
        "kernel gradient, Winograd",
        "kernel gradient, large",
        "kernel gradient, padded row",
        "kernel gradient, few channels",
        "max pool",
        "dropout",
    ):  # compiling each takes seconds
        monkeypatch.delitem(kernels.FORMS, form)
    status, output, _ = run_command(
        kernels.main, "--out", tmp_path / "new", "--rounds", 1, "--workloads", "lenet5_batch4"
    )
    assert status == 0
    assert len(output.splitlines()) == len(kernels.FORMS)
    content = json.loads((tmp_path / "new" / "kernels.json").read_text())
    assert list(content["results"]) == ["lenet5_batch4"]
    forms = content["results"]["lenet5_batch4"]
    assert list(forms) == list(kernels.FORMS)
    assert forms["plain"]["speedup"] == 1
    for form in forms.values():
        assert form["ms_per_step"] == form["rounds_ms"][0] > 0
        assert form["speedup"] == pytest.approx(
            forms["plain"]["ms_per_step"] / form["ms_per_step"], rel=0.01, abs=0.001
        )
        assert form["images_per_second"] == pytest.approx(4000 / form["ms_per_step"], rel=0.01, abs=0.1)


@pytest.mark.long
def test_the_forms_differ(monkeypatch):
    """Each part alone changes the lowered program. LeNet-5 has a layer for each part."""
    import jax
    import jax.numpy as jnp

    from cifar_jax.models import LeNet5

    rngs, images = {"dropout": jax.random.key(0)}, jnp.ones((4, 32, 32, 3))
    model = LeNet5()
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    loss = lambda variables: model.apply(variables, images, train=True, rngs=rngs).sum()

    texts = set()
    forms = [parts for parts in kernels.FORMS.values() if not {"cores", "memory"} & set(parts)]
    for parts in forms:
        jax.clear_caches()
        with kernels.only(parts):
            texts.add(jax.jit(jax.grad(loss)).lower(variables).as_text())
    assert len(texts) == len(forms)


def test_bad_input_is_one_line_and_status_2(tmp_path, run_command):
    messages = {("--workloads", "resnet"): "resnet", ("--workloads",): "--workloads "}
    (tmp_path / "kernels.json").mkdir()
    for flags, message in (messages | {(): "kernels.json: name another --out"}).items():
        status, _, error = run_command(kernels.main, "--out", tmp_path, *flags)
        assert (status, error.count("\n")) == (2, 1)
        assert message in error


def test_forms_take_turns_forth_and_back(tmp_path, run_command, monkeypatch):
    asked = []
    configs = iter(range(len(kernels.FORMS)))

    def create_timer(config):
        number = next(configs)
        return lambda num_steps: asked.append(number) or 1.0

    monkeypatch.setattr(kernels, "create_timer", create_timer)
    monkeypatch.setattr(kernels, "keep_memory", lambda: asked.append("memory"))
    flags = ("--out", tmp_path, "--rounds", 2, "--workloads", "lenet5_batch4")
    assert run_command(kernels.main, *flags)[0] == 0
    kept = next(number for number, parts in enumerate(kernels.FORMS.values()) if "memory" in parts)
    others = [number for number in range(len(kernels.FORMS)) if number != kept]
    assert asked == [*others, *others[::-1], "memory", kept, kept, kept]


def test_a_platform_that_is_not_there_is_one_line(tmp_path, run_command, monkeypatch):
    def absent():
        raise AssertionError

    monkeypatch.setattr(parallel.jax, "local_devices", absent)
    for main in (kernels.main, early_training.main):
        status, _, error = run_command(main, "--out", tmp_path)
        assert (status, error.count("\n")) == (2, 1)
        assert error.startswith("error: JAX finds no device")
