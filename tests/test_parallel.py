import dataclasses
import types

import jax
import numpy as np
import pytest
from small_runs import assert_trees_close, train_epoch

from cifar_jax import parallel
from cifar_jax.configs import RECIPES
from cifar_jax.errors import UserError
from cifar_jax.parallel import select_devices

pytestmark = pytest.mark.usefixtures("direct_convolutions")


@pytest.mark.parametrize(
    ("recipe", "mixup_alpha"),
    [("lenet5_reference", 0.4), pytest.param("all_cnn_reference", 0.0, marks=pytest.mark.long)],
)
def test_four_devices_train_like_one(recipe, mixup_alpha, tiny_dataset):
    """Same global batches, augmentation, dropout and mixing. The last batch is partial, on some devices empty."""
    config = dataclasses.replace(RECIPES[recipe], learning_rate=0.01, mixup_alpha=mixup_alpha)
    # Noise, because on the digits' flat background rounding would decide every pool's maximum.
    images = np.random.default_rng(0).integers(0, 256, (18, 32, 32, 3), dtype=np.uint8)
    dataset = dataclasses.replace(tiny_dataset, train_images=images, train_labels=tiny_dataset.train_labels[:18])
    config = dataclasses.replace(config, batch_size=8)
    (one, history_one), (four, history_four) = (
        train_epoch(dataclasses.replace(config, num_devices=n), dataset) for n in (1, 4)
    )
    assert int(one.step) == 3
    assert_trees_close(four.params, one.params, 2e-3)  # near-ties of ReLU and maximum; 1 without pmean
    np.testing.assert_allclose(history_four["loss"], history_one["loss"], rtol=1e-5)
    np.testing.assert_array_equal(history_four["count"], [8, 8, 2])
    np.testing.assert_array_equal(history_four["correct"], history_one["correct"])


def test_replicas_agree(tiny_dataset, tiny_config):
    """A forgotten pmean would silently give the devices different parameters inside one array."""
    state, _ = train_epoch(dataclasses.replace(tiny_config, num_devices=4), tiny_dataset)
    for leaf in jax.tree.leaves(state.params) + jax.tree.leaves(state.opt_state):
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(shards) == 4
        for shard in shards[1:]:
            np.testing.assert_array_equal(shard, shards[0])


def test_select_devices(tiny_config):
    with pytest.raises(UserError, match=r"--num-devices 5\b.* 4$"):
        select_devices(dataclasses.replace(tiny_config, num_devices=5))
    with pytest.raises(UserError, match=r"--batch-size 15 .* --num-devices 3$"):
        select_devices(dataclasses.replace(tiny_config, batch_size=15, num_devices=4))


@pytest.mark.parametrize(("batch_size", "count"), [(4, 1), (16, 1), (31, 1), (32, 2), (50, 2), (64, 4), (129, 3)])
def test_cpu_cores_share_large_batches_alone(tiny_config, batch_size, count):
    config = dataclasses.replace(tiny_config, batch_size=batch_size, num_devices=None)
    assert len(select_devices(config)) == count


@pytest.mark.parametrize(("batch_size", "count"), [(64, 4), (100, 2), (108, 3), (129, 3)])
def test_cpu_cores_get_pairs_of_images_to_mix(tiny_config, batch_size, count):
    config = dataclasses.replace(tiny_config, batch_size=batch_size, num_devices=None, mixup_alpha=0.2)
    assert len(select_devices(config)) == count


def test_an_accelerators_devices_are_all_used(monkeypatch, tiny_config):
    devices = [types.SimpleNamespace(platform="gpu")] * 4
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert select_devices(dataclasses.replace(tiny_config, num_devices=None)) == devices
    with pytest.raises(UserError, match=r"--batch-size 15 .* --num-devices 3$"):
        select_devices(dataclasses.replace(tiny_config, batch_size=15, num_devices=None))


def test_steps_a_call():
    """On a CPU a loop makes All-CNN's convolutions several times slower. Elsewhere it hides the dispatch time."""
    cpu, gpu = ([types.SimpleNamespace(platform=platform)] for platform in ("cpu", "gpu"))
    all_cnn, lenet5 = RECIPES["all_cnn_reference"], RECIPES["lenet5_reference"]
    assert [parallel.choose_steps_per_call(config, cpu, 782) for config in (all_cnn, lenet5)] == [1, 16]
    assert parallel.choose_steps_per_call(lenet5, cpu, 3) == 3
    assert parallel.choose_steps_per_call(all_cnn, gpu, 782) == 782
    assert parallel.choose_steps_per_call(lenet5, gpu, 12500) == 625  # calls of equal length need one program
    assert parallel.choose_steps_per_call(lenet5, gpu, 10007) == 1000  # a prime number
    assert parallel.choose_steps_per_call(dataclasses.replace(lenet5, steps_per_call=7), gpu, 12500) == 7


def test_compiling_uses_free_memory_and_leaves_none(monkeypatch):
    order = []
    monkeypatch.setattr(parallel, "release_memory", lambda: order.append("released"))
    lowered = types.SimpleNamespace(compile=lambda options: order.append("compiled"))
    monkeypatch.setattr(parallel.Parallel, "_lower", lambda *_: lowered)
    parallel.Parallel(None, jax.local_devices()[:1], (), {}).compile()
    assert order == ["released", "compiled", "released"]
