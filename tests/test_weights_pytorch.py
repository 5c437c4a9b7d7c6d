"""state_dicts in the forms that other programs write."""

import jax
import numpy as np
import pytest
from frameworks import torch
from weight_files import random_weights

from cifar_jax.errors import UserError
from cifar_jax.weights import pytorch
from cifar_jax.weights.files import load_weights, save_weights


@pytest.fixture(scope="module", params=list(pytorch.TWINS))
def network(request):
    weights = random_weights(request.param)
    return weights, {k: torch.tensor(v) for k, v in pytorch.params_to_pytorch(weights.params).items()}


def read(tmp_path, content, capsys=None, **options):
    torch.save(content, tmp_path / "x.pth", **options)
    weights = load_weights(tmp_path / "x.pth")
    return (weights, capsys.readouterr().err) if capsys else weights


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def biases_first(state_dict):
    return {k: state_dict[k] for k in sorted(state_dict, key=lambda name: name.endswith("weight"))}


def in_random_order(state_dict):
    return {str(k): state_dict[k] for k in np.random.default_rng(0).permutation(list(state_dict))}


def numbered_backwards(state_dict):
    """features.10 sorts before features.2 and is stored before it."""
    layers = list(dict.fromkeys(name.partition(".")[0] for name in state_dict))
    renamed = {
        f"features.{3 * layers.index(k.partition('.')[0])}.{k.partition('.')[2]}": v for k, v in state_dict.items()
    }
    return {k: renamed[k] for k in sorted(renamed)}


@pytest.mark.parametrize(
    "change",
    [
        lambda d: {k: d[k] for k in sorted(d)},
        biases_first,
        in_random_order,
        numbered_backwards,
        lambda d: {f"module.{k}": v for k, v in d.items()},
        lambda d: {f"_orig_mod.module.{k}": v for k, v in d.items()},
        lambda d: {f"module.{k}": v for k, v in d.items()} | {"n_averaged": torch.tensor(7)},
        lambda d: d | {"bn.num_batches_tracked": torch.tensor(7)},
        lambda d: {"state_dict": d, "epoch": 3},
        lambda d: {"net": d, "acc": 91.5, "epoch": 3, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}}},
        lambda d: {"model": d, 5: None, None: 5},
        lambda d: {"weights of mine": d},
        lambda d: {"checkpoint": 1, "model": {"state_dict": d}},
        lambda d: {k: v.double() for k, v in d.items()},
        lambda d: {k: torch.nn.Parameter(v) for k, v in d.items()},
        lambda d: {k: torch.stack([v, v])[1] for k, v in d.items()},  # views of larger storages
        lambda d: {k: v.T.contiguous().T if v.ndim == 2 else v for k, v in d.items()},  # not contiguous
        lambda d: {k.replace("convLayer", "conv"): v for k, v in d.items()},  # names in an earlier version
    ],
)
def test_the_same_network_in_another_form(tmp_path, network, change):
    weights, state_dict = network
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        assert_same(read(tmp_path, change(state_dict), **options).params, weights.params)


def test_what_is_dropped_or_reordered_is_said(tmp_path, network, capsys):
    _, state_dict = network
    _, errors = read(tmp_path, {"net": {f"module.{k}": v for k, v in state_dict.items()}}, capsys)
    assert "reading its entry net" in errors
    assert "module." in errors
    _, errors = read(tmp_path, state_dict | {"n_averaged": torch.tensor(1)}, capsys)
    assert "n_averaged" in errors
    _, errors = read(tmp_path, {k: state_dict[k] for k in reversed(state_dict)}, capsys)
    assert "matched by name" in errors
    _, errors = read(tmp_path, state_dict, capsys)
    assert "matched by name" not in errors


def test_layers_of_one_shape_are_not_swapped(tmp_path):
    """conv2 and conv3 of All-CNN have the same shape, and the file has conv3 first."""
    weights = random_weights("all_cnn")
    state_dict = {k: torch.tensor(v) for k, v in pytorch.params_to_pytorch(weights.params).items()}
    names = list(state_dict)
    names[2:4], names[4:6] = names[4:6], names[2:4]
    assert_same(read(tmp_path, {name: state_dict[name] for name in names}).params, weights.params)
    words = ("stem", "left", "right", "d", "e", "f", "g", "h", "head")
    unnumbered = {f"{words[i // 2]}.{name.partition('.')[2]}": state_dict[name] for i, name in enumerate(state_dict)}
    assert_same(read(tmp_path, unnumbered).params, weights.params)  # the file's order is the network's
    with pytest.raises(UserError, match="left and right have the same shape"):
        read(tmp_path, {k: unnumbered[k] for k in sorted(unnumbered)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {"model": d, "net": d}, "not a state_dict"),
        (
            lambda d: d | {"convLayer2.weight": torch.zeros(64, 32, 3, 3)},
            r"convLayer2.weight has shape \(64, 32, 3, 3\)",
        ),
        (lambda d: {number: tensor for number, tensor in enumerate(d.values(), 5)}, "a key is 5"),
        (lambda d: d | {None: torch.ones(1)}, "a key is None"),
        (lambda d: d | {"bn1.weight": torch.ones(32), "bn1.bias": torch.ones(32)}, "12 tensors"),
        (lambda d: [d], "not a state_dict"),
    ],
)
def test_what_is_none_of_ours_is_named(tmp_path, change, message):
    state_dict = {k: torch.tensor(v) for k, v in pytorch.params_to_pytorch(random_weights("lenet5").params).items()}
    for changed in (change(state_dict), change({k: state_dict[k] for k in sorted(state_dict)})):
        with pytest.raises(UserError, match=message):
            read(tmp_path, changed)


def test_a_whole_pickled_model_is_named(tmp_path):
    with pytest.raises(UserError, match=r"whole pickled object \(torch.nn.modules.container.Sequential\)"):
        read(tmp_path, pytorch.create_model("lenet5"))


def test_bfloat16_and_float16_files(tmp_path, network):
    _, state_dict = network
    for dtype in (torch.bfloat16, torch.float16):
        loaded = read(tmp_path, {k: v.to(dtype) for k, v in state_dict.items()}).params
        expected = pytorch.params_from_pytorch({k: v.to(dtype).float() for k, v in state_dict.items()})
        assert_same(loaded, expected)


def test_a_state_dict_in_safetensors(tmp_path, network):
    weights, state_dict = network
    from safetensors.torch import save_file  # here: it imports torch

    save_file(state_dict, tmp_path / "x.safetensors")
    assert_same(load_weights(tmp_path / "x.safetensors").params, weights.params)


def notebook():
    """The original notebook's network, with the names of its class, `xav` among them."""
    nn = torch.nn

    class Notebook(nn.Module):
        def __init__(self):
            super().__init__()
            self.convLayer1 = nn.Conv2d(3, 32, 5)
            self.convLayer2 = nn.Conv2d(32, 64, 5)
            self.fullyc1 = nn.Linear(1600, 200)
            self.xav = nn.init.xavier_normal_(self.fullyc1.weight)
            self.fullyc2 = nn.Linear(200, 100)
            self.fullyc3 = nn.Linear(100, 10)

        def forward(self, x):
            x = torch.max_pool2d(torch.relu(self.convLayer1(x)), 2)
            x = torch.max_pool2d(torch.relu(self.convLayer2(x)), 2)
            x = torch.relu(self.fullyc1(x.flatten(1)))
            return self.fullyc3(torch.relu(self.fullyc2(x)))

    return Notebook()


def test_the_notebooks_own_class_takes_our_weights(tmp_path):
    weights = random_weights("lenet5")
    save_weights(tmp_path / "x.pth", weights)
    network = notebook().eval()
    assert next(iter(network.state_dict())) == "xav"
    network.load_state_dict(torch.load(tmp_path / "x.pth", weights_only=True), strict=True)
    images = np.random.default_rng(0).random((3, 32, 32, 3), np.float32)
    ours = np.asarray(jax.jit(weights.create_module().apply)({"params": weights.params}, images))
    with torch.no_grad():
        theirs = network(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(theirs, ours, atol=1e-5 * np.abs(ours).max())
    assert_same(read(tmp_path, network.state_dict()).params, weights.params)
