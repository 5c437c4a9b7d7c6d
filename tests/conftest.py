"""Shared by all tests: four virtual CPU devices, strict types, a private cache, small datasets."""

import dataclasses
import gc
import importlib.metadata
import os
import shutil
import signal
import subprocess

# Compiled quickly rather than well: compilation is what the tests spend their time on.
_flags = "--xla_force_host_platform_device_count=4"
if "CIFAR_JAX_TEST_PLATFORMS" not in os.environ:  # a GPU's programs are tested as they are used
    _flags += " --xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA ends a process for a flag that it does not know
    _flags += " --xla_cpu_use_fusion_emitters=false"  # XLA's former way to emit fused loops compiles in half the time
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flags}"
os.environ["JAX_PLATFORMS"] = os.environ.get("CIFAR_JAX_TEST_PLATFORMS", "cpu")

import sys
import tempfile

# Most tests compile the same few programs: a cache for this session alone, which the workers of pytest-xdist and the
# commands that tests start inherit and share, more than halves the time.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compilation_cache = tempfile.TemporaryDirectory(prefix="cifar_jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compilation_cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["MPLCONFIGDIR"] = _compilation_cache.name  # its list of fonts, which takes seconds where there are many
    # An entry that another process is just writing is compiled again.
    os.environ["PYTHONWARNINGS"] = "ignore:Error reading persistent compilation cache entry"

# Checkpoints wait for the disk, so temporary folders, 0.6 GB in all, are in memory where there is room, unless TMPDIR
# names another place. Some tests execute files there.
MEMORY = "/dev/shm"
if "TMPDIR" not in os.environ and os.access(MEMORY, os.W_OK):
    room = shutil.disk_usage(MEMORY).free > 2 * 2**30
    if room and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

import frameworks
from weight_files import random_weights

from cifar_jax import evaluate, plots, train_step, trainer, training
from cifar_jax.configs.base import Config
from cifar_jax.datasets import DATASETS, Dataset, load_dataset
from cifar_jax.datasets.cifar import CIFAR
from cifar_jax.ops import winograd
from cifar_jax.trainer import Trainer
from cifar_jax.weights import hdf5_worker, keras_files

# JAX keeps what it traced, so the heap grows to gigabytes, and collecting it over and over takes a fifth of the time.
gc.disable()

TFDS_DATA_DIR = os.environ.get("TFDS_DATA_DIR", "")


# Modules whose tests train, compile networks or start commands. `pytest -m "not slow and not long"` leaves them out.
SLOW_MODULES = {
    *("accuracy", "augment", "calibration", "checkpoint", "console", "distillation", "early_training", "evaluate"),
    *("export", "extending", "faults", "gpu", "kernels_benchmark", "loggers", "lowering", "models", "network_report"),
    *("normalization", "ops", "parallel", "parity", "predict", "pretrained", "processes", "symmetry", "throughput"),
    *("train", "trainer", "training", "weights_files", "weights_hostile", "weights_keras"),
}


# The modules that take longest, which are run first so that pytest-xdist's workers end together.
LONGEST_FIRST = (
    *("docs", "parity", "tutorial", "ops", "training", "processes", "trainer", "accuracy", "checkpoint"),
    *("normalization", "export", "pretrained", "faults", "datasets", "extending", "weights_files", "weights_keras"),
    *("weights_hostile", "loggers", "augment", "predict", "network_report", "parallel", "symmetry", "models"),
)


def pytest_collection_modifyitems(items):
    rank = {f"test_{name}": number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW_MODULES:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="module")
def _collected():
    """Garbage is collected after each module instead."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _isolated(tmp_path_factory):
    """No test reads or writes the user's folders, finds a dataset that it did not make, or asks a proxy."""
    home = tmp_path_factory.mktemp("home")
    (home / "tfds").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HOME": home, "CIFAR_JAX_CACHE": home / "cache", "TFDS_DATA_DIR": home / "tfds"}.items():
            patch.setenv(name, str(value))
        proxies = (name for name in os.environ if name.lower().endswith("_proxy"))
        for name in ("DATA_DIR", "KERAS_HOME", *proxies):
            patch.delenv(name, raising=False)
        patch.chdir(home)
        yield
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def _skip_without_frameworks():
    """A test for which the package imports PyTorch or Keras is skipped where they are not installed."""
    with pytest.MonkeyPatch.context() as patch:
        if frameworks.ABSENT:
            frameworks.skip_without_frameworks(patch)
        yield


@pytest.fixture(scope="module")
def direct_convolutions():
    """Without Winograd's form a step compiles two to three times as fast: for the tests of other things."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "pays", lambda kernel, size: False)
        yield


@pytest.fixture(scope="module")
def compiled_once():
    """Runs of the same recipe on the same data share their initial state and compiled steps, within a module."""
    states, programs, evaluators = {}, {}, {}
    create, compile_steps, create_evaluator = train_step.create_train_state, Trainer.program, trainer.Evaluator

    def shared_state(config, steps_per_epoch, images=None):
        fixed = {"workdir": "-"}
        if config.schedule == "constant" and not config.swa_fraction:
            fixed["num_epochs"] = 1  # changes nothing in a step
        key = dataclasses.replace(config, **fixed), steps_per_epoch, None if images is None else images.tobytes()
        if key not in states:
            states[key] = create(config, steps_per_epoch, images)
        return jax.tree.map(jnp.copy, states[key])

    def shared_steps(self, image_size, order, count):
        length = count if trainer.has_constant_bounds(self.devices) else None
        key = jax.tree.structure(self.state), image_size, len(order), self.steps_per_call, tuple(self.devices), length
        if key not in programs:
            programs[key] = compile_steps(self, image_size, order, count)
        return programs[key]

    def shared_evaluator(config, state, images, labels, devices, *rest):
        data = images.tobytes(), labels.tobytes()
        key = jax.tree.structure(state), config.eval_batch_size, data, tuple(devices), rest
        if key not in evaluators:
            evaluators[key] = create_evaluator(config, state, images, labels, devices, *rest)
        return evaluators[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "create_train_state", shared_state)
        patch.setattr(Trainer, "program", shared_steps)
        patch.setattr(training, "Evaluator", shared_evaluator)
        yield


@pytest.fixture
def no_steps(monkeypatch):
    """A training compiles and computes nothing: for the tests of what surrounds the steps. Its loss is 2."""
    metrics = {"loss": 2.0, "accuracy": 0.1}
    epoch_metrics = lambda self: metrics | {"batch_loss": np.full(self.steps_per_epoch, 2, np.float32)}
    monkeypatch.setattr(Trainer, "compile", lambda *_: None)
    monkeypatch.setattr(Trainer, "run_steps", lambda *_: np.float32(2))
    monkeypatch.setattr(Trainer, "epoch_metrics", epoch_metrics)
    monkeypatch.setattr(trainer, "MAX_PENDING_CALLS", 1000)
    monkeypatch.setattr(training, "Evaluator", lambda *_: lambda state, stop: None if stop() else metrics)


@pytest.fixture
def no_figures(monkeypatch):
    """A training draws none: for the tests of other things, since they take as long as a tiny training."""
    monkeypatch.setattr(plots, "plot_run", lambda workdir: None)


@pytest.fixture(scope="session")
def cifar10_dir():
    """The folder of a TFDS-prepared CIFAR-10; skips without one."""
    if not os.path.isdir(os.path.join(TFDS_DATA_DIR, "cifar10")):
        pytest.skip("CIFAR-10 is not here: set TFDS_DATA_DIR to a folder where TFDS prepared it as array_record")
    return os.path.abspath(TFDS_DATA_DIR)


@pytest.fixture(scope="session")
def tiny_dataset():
    """90 training and 30 test digits."""
    digits = load_dataset("digits")
    return Dataset(
        digits.train_images[:90],
        digits.train_labels[:90],
        digits.test_images[:30],
        digits.test_labels[:30],
        digits.info,
        "tiny digits",
    )


@pytest.fixture
def use_tiny_dataset(monkeypatch, tiny_dataset):
    """Whatever a command asks for, training and evaluation get the tiny dataset."""
    for module in (training, evaluate):
        monkeypatch.setattr(module, "load_dataset", lambda name, data_dir: tiny_dataset)


@pytest.fixture
def tiny_config(tmp_path):
    """LeNet-5 on the tiny dataset: 6 steps an epoch, the last of 10 images; every random part is on."""
    return Config(
        workdir=str(tmp_path / "run"),
        dataset="digits",
        model="lenet5",
        dropout_rates=(0.2, 0.2),
        input_scaling="symmetric",
        batch_size=16,
        num_epochs=3,
        learning_rate=0.05,
        nesterov=True,
        crop_padding=2,
        random_flip=True,
        eval_batch_size=8,
        num_devices=1,
        steps_per_call=1,
    )


@pytest.fixture
def plain_config(tiny_config):
    """tiny_config without dropout and augmentation: its step compiles in half the time."""
    return dataclasses.replace(tiny_config, dropout_rates=(0.0, 0.0), crop_padding=0, random_flip=False)


@pytest.fixture
def run_command(monkeypatch, capsys):
    """Runs a command's main in this process: (main, *arguments) → (exit status, stdout, stderr)."""

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        on_interrupt = signal.getsignal(signal.SIGINT)
        try:
            status = main()
        except SystemExit as stop:
            status = stop.code
        finally:
            signal.signal(signal.SIGINT, on_interrupt)  # a command's process would end now
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


@pytest.fixture
def default_signals():
    """Ctrl-C and hang-ups end a process. Under nohup, or in the background of a script, pytest ignores them."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    ignored = [number for number in defaults if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, defaults[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture
def small_cifar(monkeypatch):
    """CIFAR-10 and 100 with 100 training and 20 test images: {name: (train images, train labels, test images, …)}."""
    data = {}
    for seed, (name, info) in enumerate(CIFAR.items()):
        monkeypatch.setitem(DATASETS, name, dataclasses.replace(info, train_size=100, test_size=20))
        rng = np.random.default_rng(seed)
        images = rng.integers(0, 256, (120, 32, 32, 3), dtype=np.uint8)
        labels = rng.integers(0, info.num_classes, 120, dtype=np.int32)
        labels[:2] = 0, info.num_classes - 1
        data[name] = images[:100], labels[:100], images[100:], labels[100:]
    return data


@pytest.fixture
def small_batches(small_cifar):
    """CIFAR-10 with 20 images a batch: (train images, train labels, test images, test labels)."""
    return small_cifar["cifar10"]


@pytest.fixture
def process_groups(monkeypatch):
    """The process groups of the programs that were started. Ctrl-C at a terminal ends all of its foreground group."""
    groups = []

    class Noted(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            groups.append(os.getpgid(self.pid))

    monkeypatch.setattr(subprocess, "Popen", Noted)
    return groups


@pytest.fixture
def keras_files_read_here(monkeypatch):
    """Keras' files are read in this process, since another takes a quarter of a second to start.

    test_weights_hostile.py tests the other process, its limits and its end.
    """
    answer = lambda path: b"".join(hdf5_worker.answer(str(path.absolute()), h5py, np))
    monkeypatch.setattr(keras_files, "run_worker", answer)


@pytest.fixture(scope="module")
def lenet5():
    """Random Weights of LeNet-5."""
    return random_weights("lenet5")


@pytest.fixture(scope="module")
def all_cnn():
    """Random Weights of All-CNN."""
    return random_weights("all_cnn")
