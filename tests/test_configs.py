import dataclasses
import importlib
import json

import numpy as np
import pytest

from cifar_jax import configs
from cifar_jax.configs import DESCRIPTIONS, FAULTY, RECIPES
from cifar_jax.configs.base import Config
from cifar_jax.errors import UserError
from cifar_jax.train import parse_command

RECIPE = """
from cifar_jax.configs.base import Config

CONFIG = Config(workdir="runs/x", model="lenet5", dropout_rates=(0.2, 0.2), input_scaling="unit", dataset="digits",
                batch_size=32, num_epochs=1, {})
"""


def test_every_recipe_has_its_folder_file_and_description():
    assert {"all_cnn", "all_cnn_fast", "all_cnn_reference", "lenet5", "lenet5_reference", "quickstart"} <= set(RECIPES)
    assert list(RECIPES) == sorted(RECIPES)
    for name, config in RECIPES.items():
        assert config.workdir == f"runs/{name}"
        assert importlib.import_module(f"cifar_jax.configs.{name}").CONFIG is config
        assert f"python -m cifar_jax.train {name}" in importlib.import_module(f"cifar_jax.configs.{name}").__doc__
        assert DESCRIPTIONS[name]
    assert FAULTY == {}


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("bad_value", RECIPE.format("learning_rate=-1.0"), "--learning-rate -1.0: must be a number above 0"),
        ("bad_field", RECIPE.format("learning_rat=0.1"), "'learning_rat'"),
        ("bad_syntax", "CONFIG = (", "line 1"),
        ("no_config", "", "CONFIG"),
        ("no_recipe", "CONFIG = {}", "CONFIG is not a Config"),
    ],
)
def test_a_faulty_recipe_is_refused_by_name_and_the_others_go_on(name, content, fault, tmp_path, monkeypatch):
    (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.setattr(configs, "__path__", [*configs.__path__, str(tmp_path)])
    monkeypatch.setitem(FAULTY, name, "")
    configs.load_recipe(name)
    with pytest.raises(UserError) as error:
        parse_command([name])[0]
    assert str(error.value).startswith(f"cifar_jax/configs/{name}.py: ")
    assert fault in str(error.value)
    assert parse_command(["quickstart"])[0] == RECIPES["quickstart"]
    assert name not in RECIPES


def test_a_recipe_needs_no_docstring(tmp_path, monkeypatch):
    (tmp_path / "no_docstring.py").write_text(RECIPE.format("learning_rate=0.1"))
    monkeypatch.setattr(configs, "__path__", [*configs.__path__, str(tmp_path)])
    for table in (RECIPES, DESCRIPTIONS):
        monkeypatch.setitem(table, "no_docstring", None)
    configs.load_recipe("no_docstring")
    assert (parse_command(["no_docstring"])[0].learning_rate, DESCRIPTIONS["no_docstring"]) == (0.1, "")


def test_the_reference_recipes_are_the_originals():
    keras, pytorch = RECIPES["all_cnn_reference"], RECIPES["lenet5_reference"]
    assert (keras.num_epochs, keras.batch_size, keras.learning_rate, keras.lr_decay) == (200, 64, 0.01, 5e-5)
    assert (keras.optimizer, keras.schedule, keras.momentum, keras.nesterov) == ("keras_sgd", "inverse_time", 0.9, True)
    assert (keras.rotation_degrees, keras.shift_fraction, keras.random_flip) == (10, 0.1, True)
    assert (keras.dropout_rates, keras.input_scaling, keras.weight_decay) == ((0.2, 0.5, 0.5), "unit", 0)
    assert (pytorch.num_epochs, pytorch.batch_size, pytorch.learning_rate) == (15, 4, 1e-4)
    assert (pytorch.optimizer, pytorch.schedule, pytorch.momentum, pytorch.nesterov) == ("sgd", "constant", 0.9, False)
    assert (pytorch.rotation_degrees, pytorch.shift_fraction, pytorch.random_flip) == (0, 0, False)
    assert (pytorch.dropout_rates, pytorch.input_scaling, pytorch.weight_decay) == ((0.2, 0.2), "symmetric", 0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_size": 0}, "--batch-size 0: .* 1 or more"),
        ({"num_epochs": -1}, "--num-epochs -1"),
        ({"optimizer": "adamw"}, "--optimizer adamw: .* sgd, keras_sgd, muon"),
        ({"model": "resnet"}, "--model resnet: .* all_cnn, lenet5"),
        ({"cutout_size": 65}, "--cutout-size 65"),
        ({"learning_rate": float("nan")}, "--learning-rate nan"),
        ({"momentum": 1.0}, "--momentum 1.0"),
        ({"dropout_rates": (0.1,)}, "--dropout-rates .* 2 .*lenet5"),
        ({"dropout_rates": (0.1, 1.0)}, "--dropout-rates"),
        ({"lr_decay": 0.1}, "--lr-decay 0.1: .* --schedule inverse_time"),
        ({"warmup_fraction": 1.0}, "--warmup-fraction 1.0"),
        ({"crop_padding": 32}, "--crop-padding 32"),
        ({"seed": -1}, "--seed -1"),
        ({"ema_decay": 1.0}, "--ema-decay 1.0"),
        ({"swa_fraction": 1.0}, "--swa-fraction 1.0"),
        ({"swa_cycles": 0}, "--swa-cycles 0"),
        ({"swa_learning_rate": 0.0}, "--swa-learning-rate 0.0"),
        ({"gradient_clip": -1.0}, "--gradient-clip -1.0"),
        ({"mixup_alpha": 1.0, "cutmix_alpha": 1.0}, "--mixup-alpha 1.0: .* 0 with --cutmix-alpha"),
        ({"image_sizes": ((24, 2),)}, "--image-sizes .*lenet5"),
        ({"model": "all_cnn", "dropout_rates": (0.0,) * 3, "image_sizes": ((9, 2),)}, "--image-sizes .* 14 to 32"),
        ({"learning_rate": "0.1"}, "--learning-rate 0.1: must be a number"),
        ({"learning_rate": np.float32(0.5)}, "--learning-rate 0.5: must be a number"),
        ({"workdir": 1}, "--workdir 1: must be text"),
        ({"momentum": None}, "--momentum None: must be a number"),
        ({"weight_decay": True}, "--weight-decay True: must be a number"),
        ({"dropout_rates": ("0", "0")}, "--dropout-rates .* numbers"),
        ({"image_sizes": ((24.5, 1),)}, "--image-sizes .* pairs of whole numbers"),
        ({"image_sizes": ((24, 1, 1),)}, "--image-sizes .* pairs of whole numbers"),
        ({"random_flip": True, "alternating_flip": True}, "--alternating-flip True: .* --random-flip"),
        ({"whitening": True, "initializer": "lsuv"}, "--whitening True: .* --initializer lsuv"),
        ({"warmup_fraction": 0.1, "schedule": "constant"}, "--warmup-fraction 0.1: .* --schedule cosine or one_cycle"),
    ],
)
def test_impossible_values_are_refused(changes, named):
    with pytest.raises(UserError, match=named):
        dataclasses.replace(RECIPES["lenet5"], **changes)


def test_paths_are_text(tmp_path):
    config = dataclasses.replace(RECIPES["lenet5"], workdir=tmp_path / "run", data_dir=tmp_path)
    assert (config.workdir, config.data_dir) == (str(tmp_path / "run"), str(tmp_path))


def test_lists_are_tuples():
    config = Config(**json.loads(json.dumps(dataclasses.asdict(RECIPES["all_cnn_fast"]))))
    assert config == RECIPES["all_cnn_fast"]
    assert hash(config) == hash(RECIPES["all_cnn_fast"])
    with pytest.raises(UserError, match="sequences"):
        dataclasses.replace(config, dropout_rates=0.5)


def test_the_size_of_an_epochs_images():
    config = dataclasses.replace(RECIPES["all_cnn_reference"], image_sizes=((16, 1), (24, 2)), num_epochs=5)
    assert [config.image_size(epoch) for epoch in range(5)] == [16, 24, 24, 32, 32]
    assert RECIPES["lenet5"].image_size(0) == 32
