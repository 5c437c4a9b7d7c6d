import dataclasses
import functools
import importlib
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from frameworks import OnUse, import_torch, needs_frameworks, torch

from benchmarks import throughput, workloads
from benchmarks.backends import FAMILIES, QUEUED_CALLS, Backend, JaxBackend
from benchmarks.report.figures import draw_throughput
from benchmarks.report.performance import throughput_table
from benchmarks.report.results import ROOT
from benchmarks.worker import Absent, Worker
from benchmarks.workloads import PHASES, create_workload
from cifar_jax import augment, evaluate, train
from cifar_jax.batches import pixel_statistics, scale_images
from cifar_jax.configs import RECIPES
from cifar_jax.errors import UserError
from cifar_jax.models import MODELS
from cifar_jax.train_step import cross_entropy
from cifar_jax.weights import pytorch as pytorch_weights

pytorch_backends = OnUse(lambda: import_torch() and importlib.import_module("benchmarks.pytorch_backends"))


@pytest.fixture(autouse=True)
def _quick_workers(monkeypatch):
    """OpenMP's threads do not spin on a busy machine."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


def test_flops_are_those_counted_by_hand():
    conv1, conv2 = 2 * 28 * 28 * 25 * 3 * 32, 2 * 10 * 10 * 25 * 32 * 64
    lenet5, all_cnn = RECIPES["lenet5_reference"], RECIPES["all_cnn_reference"]
    assert workloads.layer_flops(lenet5) == [conv1, conv2, 2 * 1600 * 200, 2 * 200 * 100, 2 * 100 * 10]
    forward = 14_685_200
    assert workloads.flops_per_image(lenet5) == {
        "training": 3 * forward - 3_763_200,
        "training_augmented": 3 * forward - 3_763_200,
        "inference": forward,
    }
    assert workloads.layer_flops(all_cnn) == [
        5_308_416, 169_869_312, 169_869_312,  # 32×32
        74_649_600, 112_140_288, 112_140_288,  # 15×15, then 13×13
        23_887_872, 2_654_208, 138_240,  # 6×6
    ]  # fmt: skip


def phase(*rounds):
    return {"first_call_seconds": 1.5, "steps_of_a_round": 1, "rounds": list(rounds)}


def measured(**rates):
    """Returns a workload like the result of `measure`, with only the training phase."""
    backends = {
        name.replace("_", " ", 1): {
            "threads": 2,
            "phases": {"training": phase(*rounds)},
            "peak_memory_bytes": 3 * 2**20,
            "matrix_products": {"1024": 4e9, "2048": 1e10 if name == "pytorch" else 1e9},
        }
        for name, rounds in rates.items()
    }
    absent = {"keras": "no module"}
    return {
        "model": "lenet5",
        "batch_size": 4,
        "flops_per_image": {"training": 10_000_000},
        "contenders": backends,
        "absent": absent,
    }


def test_medians_ratios_and_shares():
    with_pytorch = measured(jax=[100, 300, 110], pytorch=[90, 95, 900], pytorch_channels_last=[220, 1, 200])
    alone = measured(jax=[500])
    assert throughput.summarize({"a": with_pytorch, "b": alone}) == 1e10
    medians = {name: c["phases"]["training"]["images_per_second"] for name, c in with_pytorch["contenders"].items()}
    assert medians == {"jax": 110, "pytorch": 95, "pytorch channels_last": 200}
    assert with_pytorch["best_pytorch"] == {"training": {"contender": "pytorch channels_last", "jax_ratio": 0.55}}
    assert with_pytorch["contenders"]["jax"]["phases"]["training"]["share_of_matrix_rate"] == 0.11
    assert alone["best_pytorch"] == {}


def test_the_report_shows_them(tmp_path):
    workloads = {"a": measured(jax=[110], pytorch=[200])}
    result = {
        "command": "python x",
        "matrix_flops_per_second": throughput.summarize(workloads),
        "workloads": workloads,
        "dtype": "float32",
        "rounds": 1,
        "seconds_per_round": 2.0,
        "load_average_before": 0.123,
        "hardware": "an abacus",
        "versions": {"jax": "1"},
        "date": "2026-01-01",
    }
    text = throughput_table(result)
    assert "| LeNet-5, batch 4 | jax | 110 (0.55×, 11 %) | 1.5 | 3 |" in text
    assert "Absent from LeNet-5, batch 4: keras (no module)." in text
    assert "10 GFLOP/s), float32; medians of 1 rounds of 2 s; load average before 0.12." in text
    assert text.endswith("an abacus; jax 1; 2026-01-01.")
    draw_throughput(result, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000


class JaxHere:
    """The JAX backend in the tests' process, in place of a worker that imports JAX again."""

    def __init__(self, _, workload, *__):
        self._backend = JaxBackend(workload)

    def call(self, method, *arguments):
        return getattr(self._backend, method)(*arguments)

    def close(self):
        pass


@pytest.mark.long
@needs_frameworks
def test_a_tiny_run(tmp_path, run_command, monkeypatch):
    monkeypatch.setattr(throughput, "MATRIX_SIZES", {"cpu": (64, 128)})
    monkeypatch.setattr(throughput, "Worker", lambda name, *task: (JaxHere if name == "jax" else Worker)(name, *task))
    families = {"jax": ["jax"], "pytorch": ["pytorch channels_last"], "pytorch-cudagraphs": ["pytorch-cudagraphs"]}
    monkeypatch.setattr(throughput, "FAMILIES", families)
    flags = ["--models", "lenet5", "--batch-sizes", 4, "--frameworks", "pytorch", "pytorch-cudagraphs"]
    flags += ["--phases", "training_augmented", "inference", "--rounds", 1, "--seconds-per-round", 0.001]
    status, output, error = run_command(throughput.main, *flags, "--out", tmp_path / "new", "--name", "tiny")
    assert status == 0
    assert len(output.splitlines()) == 2
    content = json.loads((tmp_path / "new" / "tiny.json").read_text())
    assert {"command", "hardware", "versions", "date", "dtype", "rounds", "load_average_before"} <= set(content)
    assert {"jax", "torch", "keras"} <= set(content["versions"])
    assert content["command"].endswith("--seconds-per-round 0.001 --out new --name tiny")
    workload = content["workloads"]["lenet5_batch4"]
    assert workload["recipe"] == "lenet5_reference"
    assert (workload["config"]["crop_padding"], workload["config_augmented"]["crop_padding"]) == (0, 3)
    assert list(workload["contenders"]) == ["jax", "pytorch channels_last"]
    assert workload["absent"] == {"pytorch-cudagraphs": "RuntimeError: CUDA graphs need a GPU"}
    assert "RuntimeError: CUDA graphs need a GPU" in error
    for backend in workload["contenders"].values():
        assert backend["peak_memory_bytes"] > 2**20
        assert set(backend["matrix_products"]) == {"64", "128"}
        for values in backend["phases"].values():
            assert len(values["rounds"]) == 1
            assert values["images_per_second"] == values["rounds"][0] > 0
    assert set(workload["best_pytorch"]) == {"training_augmented", "inference"}
    assert throughput_table(content)


def test_a_network_without_a_reference_recipe_is_refused(monkeypatch):
    monkeypatch.setattr(workloads, "RECIPES", {"all_cnn_reference": RECIPES["all_cnn_reference"]})
    with pytest.raises(UserError, match="lenet5_reference"):
        create_workload("lenet5", 4, "float32")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--frameworks", "jax", "tensorflow"], "error: "),
        (["--models", "resnet"], "error: "),
        (["--rounds", "0"], "error: --rounds, --batch-sizes, --seconds-per-round and --timeout "),
        (["--batch-sizes", "0"], "error: --rounds, --batch-sizes"),
        (["--phases"], "error: --models and --phases "),
        (["--models"], "error: --models and --phases "),
        (["--name", "a/b"], "error: can't write "),
        (["--out", "/dev/null/here"], "error: /dev/null/here: Not a directory: name another place"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, run_command, flags, message):
    status, _, error = run_command(throughput.main, "--out", tmp_path, *flags)
    assert status == 2
    assert error.startswith(message)
    assert len(error.splitlines()) == 1


@needs_frameworks
def test_a_worker_that_dies_or_hangs_is_absent_with_the_reason():
    _, workload = create_workload("lenet5", 4, "float32")
    worker = Worker("pytorch-cudagraphs", workload, "cpu", 60)
    with pytest.raises(Absent, match="CUDA graphs need a GPU"):
        worker.call("describe")
    worker._timeout = 0.1
    os.kill(worker._process.pid, signal.SIGSTOP)
    with pytest.raises(Absent, match=r"no answer in 0\.1 s"):
        worker.call("describe")
    os.kill(worker._process.pid, signal.SIGKILL)
    worker._process.join()
    with pytest.raises(Absent, match="its process ended with status -9"):
        worker.call("describe")
    worker.close()


def test_workloads_are_the_recipes():
    recipe, workload = create_workload("all_cnn", 64, "bfloat16")
    assert recipe == "all_cnn_reference"
    assert (workload.augmented.rotation_degrees, workload.augmented.shift_fraction) == (10, 0.1)
    assert workload.augmented.random_flip
    assert not workload.plain.random_flip
    assert workload.plain == dataclasses.replace(
        workload.augmented, rotation_degrees=0.0, shift_fraction=0.0, random_flip=False
    )
    assert [workload.config(phase) is workload.augmented for phase in PHASES] == [False, True, False]
    lenet5 = create_workload("lenet5", 128, "float32")[1]
    assert (lenet5.plain.crop_padding, lenet5.augmented.crop_padding, lenet5.augmented.random_flip) == (0, 3, True)
    assert (lenet5.plain.optimizer, lenet5.plain.ema_decay, lenet5.plain.weight_decay) == ("sgd", 0, 1e-3)
    images, labels, order = workload.data()
    assert len(images) == len(labels) == 4096
    assert sorted(order[:64].ravel()) == list(range(4096))


# --- PyTorch's backend does the same work ---


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((8, 32, 32, 3), dtype=np.float32)


def nchw(images):
    return torch.from_numpy(images.transpose(0, 3, 1, 2))


def test_pytorchs_affine_is_the_packages(images):
    rng = np.random.default_rng(1)
    parameters = [rng.uniform(-bound, bound, 8).astype(np.float32) for bound in (math.radians(10), 3.2, 3.2)]
    expected = jax.vmap(augment.affine)(images, *map(jnp.asarray, parameters))
    result = pytorch_backends.affine(nchw(images), *map(torch.from_numpy, parameters))
    np.testing.assert_allclose(result.numpy().transpose(0, 2, 3, 1), expected, atol=1e-4)


def test_pytorchs_crop_is_the_packages(images):
    offsets = np.random.default_rng(2).integers(0, 7, (8, 2))
    padded = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)), mode="reflect")
    expected = np.stack([image[y : y + 32, x : x + 32] for image, (y, x) in zip(padded, offsets)])
    result = pytorch_backends.crop(nchw(images), 3, *torch.from_numpy(offsets).T)
    np.testing.assert_array_equal(result.numpy().transpose(0, 2, 3, 1), expected)


@pytest.mark.parametrize("input_scaling", ["unit", "symmetric", "standardized"])
def test_pytorchs_scaling_is_the_packages(input_scaling):
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    config = dataclasses.replace(RECIPES["lenet5_reference"], input_scaling=input_scaling)
    scale, shift = pytorch_backends.scaling(config)
    expected = scale_images(images, *pixel_statistics(input_scaling, config.dataset))
    expected = np.asarray(expected).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(images.transpose(0, 3, 1, 2) * scale + shift, expected, atol=1e-6)


def test_pytorchs_augmentation_draws_for_each_image():
    torch.manual_seed(0)
    shades = (np.mgrid[:32, :32].sum(axis=0) ** 1.5).astype(np.float32)
    images = torch.from_numpy(np.broadcast_to(shades, (64, 3, 32, 32)).copy())
    plain = dataclasses.replace(create_workload("lenet5", 4, "float32")[1].plain)
    different = lambda images: len(np.unique(images.numpy().reshape(64, -1), axis=0))
    assert different(pytorch_backends.augment(images, plain)) == 1
    flipped = pytorch_backends.augment(images, dataclasses.replace(plain, random_flip=True))
    mirrored = [torch.equal(image, images[0].flip(-1)) for image in flipped]
    assert 0 < sum(mirrored) < 64
    assert sum(torch.equal(image, images[0]) for image in flipped) == 64 - sum(mirrored)
    assert different(pytorch_backends.augment(images, dataclasses.replace(plain, crop_padding=3))) > 15
    for setting in ({"rotation_degrees": 10.0}, {"shift_fraction": 0.1}):
        assert different(pytorch_backends.augment(images, dataclasses.replace(plain, **setting))) == 64


def test_pytorch_and_keras_see_the_same_images_and_compute_the_same_loss():
    _, workload = create_workload("lenet5", 4, "float32")
    images, labels, order = workload.data()
    inputs = np.asarray(scale_images(jnp.asarray(images), *pixel_statistics("symmetric", "cifar10")))
    backend = pytorch_backends.PyTorchBackend("pytorch", workload, "cpu")
    params = pytorch_weights.params_from_pytorch(backend._network.state_dict(), "lenet5")
    rows = order[:2].ravel()
    logits = MODELS["lenet5"]().apply({"params": params}, inputs[rows])
    backend.run("inference", 2)
    np.testing.assert_allclose(backend._total, cross_entropy(logits, labels[rows]).sum(), rtol=1e-5)
    assert int(backend._correct) == int((logits.argmax(-1) == labels[rows]).sum())
    seen = []
    keras = pytorch_backends.KerasBackend("keras", workload, "cpu")
    keras._network.train_on_batch = lambda *batch: seen.append(batch)
    keras.run("training", 2)
    np.testing.assert_allclose(torch.cat([batch[0] for batch in seen]), inputs[rows], atol=1e-6)
    np.testing.assert_array_equal(torch.cat([batch[1] for batch in seen]), labels[rows])
    keras.run("training_augmented", 2)
    assert not np.allclose(torch.cat([batch[0] for batch in seen[2:]]), inputs[rows])


@pytest.fixture
def rounds(monkeypatch):
    """Replaces the workers. Returns the (backend, phase) pairs that they are asked to time."""
    asked = []

    class Stub:
        def __init__(self, backend, *_):
            self._backend = backend

        def call(self, method, *arguments):
            if method == "run_round":
                asked.append((self._backend, *arguments))
                return 1.0
            environment = {"threads": 1, "platform": "cpu", "environment": {}}
            return {"describe": environment, "warm_up": {}}.get(method, 1)

        def close(self):
            pass

    monkeypatch.setattr(throughput, "Worker", Stub)
    return asked


def test_backends_take_turns_forth_and_back(rounds):
    arguments = throughput.Arguments(None, phases=("training", "inference"), rounds=2)
    throughput.measure(None, ["jax", "a", "b"], arguments)
    names = ["jax", "a", "b"]
    assert rounds == [
        (name, phase) for turn in (names, names[::-1]) for phase in ("training", "inference") for name in turn
    ]


def test_an_interrupted_measurement_replaces_no_result(tmp_path, run_command, monkeypatch):
    calls = []

    def measure(workload, backends, arguments):
        calls.append(workload)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {"environment": {}, "contenders": {}}

    monkeypatch.setattr(throughput, "measure", measure)
    monkeypatch.setattr(throughput, "summarize", lambda workloads: 1.0)
    result, partial = tmp_path / "throughput.json", tmp_path / "throughput.json.partial"
    result.write_text("earlier")
    run = functools.partial(
        run_command, throughput.main, "--out", tmp_path, "--models", "lenet5", "--frameworks", "jax"
    )
    assert run()[0] == 130
    assert result.read_text() == "earlier"
    assert list(json.loads(partial.read_text())["workloads"]) == ["lenet5_batch4"]
    assert run()[0] == 0
    assert list(json.loads(result.read_text())["workloads"]) == ["lenet5_batch4", "lenet5_batch128"]
    assert not partial.exists()


def test_every_phase_of_pytorch_and_keras_trains_or_leaves_the_weights_alone():
    _, workload = create_workload("lenet5", 4, "float32")
    for kind, name in (
        (pytorch_backends.PyTorchBackend, "pytorch channels_last"),
        (pytorch_backends.KerasBackend, "keras"),
    ):
        backend = kind(name, workload, "cpu")
        weights = lambda backend=backend: torch.cat([p.detach().ravel() for p in backend._network.parameters()])
        for phase, changes in (("training", True), ("training_augmented", True), ("inference", False)):
            before = weights()
            assert backend.run(phase, 2) > 0
            assert torch.equal(before, weights()) != changes


def test_jax_goes_over_the_data_again_and_again():
    _, workload = create_workload("lenet5", 4, "float32")
    backend = JaxBackend(workload)
    calls = []
    backend._phases = dict.fromkeys(("training", "inference"), lambda *call: calls.append(call))
    lengths = iter([1, 1000, 1000, 16])
    backend._steps_of_a_call = lambda phase: next(lengths)
    backend.run("inference", 1026)
    assert calls[1022:] == [(1022, 1), (1023, 1), (0, 1), (1, 1)]
    calls.clear()
    backend.run("training", 1500)
    backend.run("inference", 1500)
    assert calls == [(0, 1000), (0, 500), (0, 1000), (1000, 24), (0, 476)]
    calls.clear()
    backend.run("training", 1020)  # 16 does not divide 1,000
    assert calls[:2] == [(0, 16), (16, 16)]
    assert calls[61:] == [(976, 16), (992, 8), (0, 16), (16, 4)]


def test_slow_first_calls_leave_the_length_of_a_round_alone(monkeypatch):
    """Compiled PyTorch compiles in the first call and captures its CUDA graph in the second."""
    seconds = iter([20.0, 0.3])
    monkeypatch.setattr(Backend, "__abstractmethods__", frozenset())
    backend = Backend(None)
    backend.run = lambda phase, steps: next(seconds, 0.001 * steps)
    assert backend.warm_up("training", 0.5)["steps_of_a_round"] == 500


def test_an_accelerator_runs_whole_calls(monkeypatch):
    """Calls of other lengths would need programs of their own, compiled within the measurement."""
    _, workload = create_workload("lenet5", 4, "float32")
    backend = JaxBackend(workload)
    assert backend.unit("training") == 1
    backend._devices = [types.SimpleNamespace(platform="gpu")]
    assert (backend.unit("training"), backend.unit("inference")) == (50, 50)
    lengths = []
    monkeypatch.setattr(backend, "run", lambda phase, steps: lengths.append(steps) or 0.001 * steps)
    assert backend.warm_up("inference", 6)["steps_of_a_round"] == 6000
    assert lengths == [50] * 4 + [200, 800]


def test_jax_takes_one_of_several_gpus(monkeypatch):
    """PyTorch uses all cores. A batch need not divide over all of them."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    _, workload = create_workload("lenet5", 64, "float32")
    assert JaxBackend(workload)._devices == jax.devices()[:1]


def test_few_calls_are_queued_at_a_time():
    """With 32 of them the devices of a CPU could wait for each other."""
    waiting, most = [], []

    class Result:
        def block_until_ready(self):
            waiting.clear()

    def call(first, count):
        waiting.append(first)
        most.append(len(waiting))
        return Result()

    backend = JaxBackend(create_workload("lenet5", 4, "float32")[1])
    backend._phases["training"] = call
    backend.run("training", 999)
    assert max(most) == QUEUED_CALLS < 32
    assert waiting == []


def test_the_gpu_campaign_takes_10_minutes_at_most():
    script = (ROOT / "benchmarks" / "gpu_campaign.sh").read_text()
    inner, outer = script.split("\npart smoke")
    grace, evaluation = (int(re.search(pattern, inner)[1]) for pattern in (r"timeout -k (\d+)", r"_evaluate\" (\d+)"))
    trainings = re.findall(r"^train \w+ (\d+)", outer, re.MULTILINE)
    timings = re.findall(r"^throughput \w+ (\d+) .*--frameworks (.*)$", outer, re.MULTILINE)
    limits = [int(outer.split()[0]), *map(int, trainings), *(int(limit) for limit, _ in timings)]
    limits += [evaluation] * len(trainings)
    assert len(limits) == 8
    assert sum(limits) + grace * len(limits) <= 10 * 60 + grace
    # Timing takes a quarter of a throughput part. The rest is for starting, compiling and autotuning.
    rounds, seconds = (float(re.search(rf"--{flag} ([\d.]+)", inner)[1]) for flag in ("rounds", "seconds-per-round"))
    for limit, frameworks in timings:
        backends = sum(len(FAMILIES[family]) for family in frameworks.split())
        assert backends * len(PHASES) * rounds * seconds < int(limit) / 4


needs_timeout = pytest.mark.skipif(shutil.which("timeout") is None, reason="the campaign needs GNU's timeout")


@needs_timeout
@pytest.mark.usefixtures("direct_convolutions", "no_figures", "use_tiny_dataset")
def test_the_gpu_campaign_on_a_cpu(tmp_path, run_command, rounds):
    """A stub of Python records the script's commands and writes their results. Then the test runs smaller ones."""
    python = tmp_path / "python"
    python.write_text("""#!/bin/sh
        echo "$CUDA_VISIBLE_DEVICES" "$JAX_PLATFORMS" "$CIFAR_JAX_TEST_PLATFORMS" "$@" | tr '\\n' ' ' >> $LOG
        echo >> $LOG
        case "$*" in
          *cifar_jax.train*all_cnn_fast*) echo "out of memory" >&2; exit 2 ;;
          *cifar_jax.train*) for workdir; do :; done; mkdir "$workdir"; echo '"a summary"' > "$workdir/summary.json" ;;
          *evaluate*) echo '"an evaluation"'; echo "a warning" >&2 ;;
          *) echo "a line for each backend" ;;
        esac
        """)
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "LOG": str(tmp_path / "log")}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    script, out = ROOT / "benchmarks" / "gpu_campaign.sh", tmp_path / "out"
    result = subprocess.run([script, out], env=environment, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (1, "failed: all_cnn_fast: exit status 2, see all_cnn_fast.log\n")
    content = {path.name: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert content == {"all_cnn_reference.json": "a summary", "all_cnn_reference_evaluate.json": "an evaluation"}
    assert (out / "all_cnn_fast.log").read_text() == "out of memory\n"
    assert (out / "throughput_compiled.txt").read_text() == "a line for each backend\n"

    recorded = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert {tuple(words[:3]) for words in recorded} == {("0", "cuda,cpu", "cuda,cpu")}
    first, smoke, *lines = [words[3:] for words in recorded]
    assert "jax.default_backend()" in " ".join(first)
    assert smoke[-2:] == ["gpu", "tests/test_gpu.py"]
    assert [words[1] for words in lines] == [
        *("cifar_jax.train", "cifar_jax.evaluate", "benchmarks.throughput", "benchmarks.throughput"),
        *("cifar_jax.train", "benchmarks.throughput"),
    ]
    training, evaluation, timing, *_ = (words[2:] for words in lines)
    workdir = tmp_path / "run"
    small = {"all_cnn_reference": "quickstart", "all_cnn": "lenet5", "512": "4", "pytorch-cudagraphs": "pytorch"}
    small |= {"46": "1"}
    fit = lambda words: [workdir if word.endswith("/all_cnn_reference") else small.get(word, word) for word in words]
    assert run_command(train.main, *fit(training), "--num-epochs", "1")[0] == 0
    status, output, _ = run_command(evaluate.main, *fit(evaluation))
    assert status == 0
    assert json.loads((workdir / "summary.json").read_text())["epochs"] == json.loads(output)["epoch"] == 1
    less = ["--dtype", "float32", "--phases", "inference", "--rounds", "1", "--seconds-per-round", "0.001"]
    assert run_command(throughput.main, *fit(timing), *less)[0] == 0
    name = "throughput_all_cnn"
    assert list(json.loads((out / f"{name}.json").read_text())["workloads"]) == ["lenet5_batch4"]
    assert rounds == [(name, "inference") for name in ("jax", "pytorch", "pytorch channels_last")]


@needs_timeout
def test_an_interrupted_gpu_campaign_stops_its_part_and_leaves_the_rest(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$2" in *default_backend*) exit 0 ;; esac\necho $$ >> $LOG\nexec sleep 100\n')
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "LOG": str(tmp_path / "log")}
    os.mkfifo(tmp_path / "log")
    log = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    script = ROOT / "benchmarks" / "gpu_campaign.sh"
    campaign = subprocess.Popen([script, tmp_path / "out"], env=environment)
    assert select.select([log], [], [], 60)[0], "no part began"
    part = os.pidfd_open(int(os.read(log, 100)))
    os.close(log)
    campaign.send_signal(signal.SIGTERM)
    assert campaign.wait(60) == 130
    assert select.select([part], [], [], 60)[0], "the part outlived the campaign"
    os.close(part)
