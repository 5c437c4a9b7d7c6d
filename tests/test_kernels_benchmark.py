import json

from benchmarks import kernels
from cifar_jax.configs import RECIPES


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
    assert all(form["ms_per_step"] > 0 for form in forms.values())


def test_the_forms_differ(monkeypatch):
    """Each part by itself changes the program that is traced: LeNet-5 has a layer for each."""
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
            texts.add(str(jax.make_jaxpr(jax.grad(loss))(variables)))
    assert len(texts) == len(forms)


def test_bad_input_is_one_line_and_status_2(tmp_path, run_command):
    status, _, error = run_command(kernels.main, "--out", tmp_path, "--workloads", "resnet")
    assert status == 2
    assert error.startswith("error: --workloads takes lenet5_batch4, lenet5_batch128, all_cnn_batch64")
