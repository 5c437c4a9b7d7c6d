"""Training with several processes, which are started here as a user would start them."""

import json
import os
import re
import shutil
import signal
import socket
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_command
from small_runs import latest_state, untimed_rows

import benchmarks.processes
import cifar_jax
from cifar_jax import models, processes, train
from cifar_jax.cluster import Processes, check_port, is_clusters_process, refuse_unknown_launcher, silence_xla
from cifar_jax.errors import UserError
from cifar_jax.processes import agree, any_of, broadcast, check_same, connected, on_main
from cifar_jax.runs import read_config

TESTS = Path(__file__).parent
# What all processes compute together: the logits of a teacher, the statistics of a normalised network.
TOGETHER = ("--teacher", "lenet5_reference", "--teacher-temperature", "1", "--normalization", "batch")
LOST = r"error: .*another .*: run the same command in all processes to resume\n"


def started(count, devices, *commands, **environment):
    """Starts processes that train together. Args: commands: the flags of each process, or of all."""
    environment.setdefault("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=4", f"device_count={devices}"))
    environment["PYTHONPATH"] = str(TESTS.parent)
    own = lambda number: {name: x if isinstance(x, str) else x[number] for name, x in environment.items()}
    words = [[str(TESTS / "tiny_command.py"), "tiny", *commands[number % len(commands)]] for number in range(count)]
    return benchmarks.processes.started(words, [own(number) for number in range(count)])


def outcomes(running):
    """Waits for processes. Returns: (exit status, stdout without Gloo's words, stderr) of each."""
    results = []
    for process in running:
        out, err = process.communicate(timeout=300)
        out = re.sub(r"\[Gloo\] Rank |\d+ is connected to \d+ peer ranks\. .* : \d+", "", out)  # they run together
        results.append((process.returncode, out.strip(), err))
    return results


def wait_for(process, pattern):
    """Reads stdout to a line that matches."""
    assert any(re.match(pattern, line) for line in process.stdout)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(models.MODELS, "tiny", tiny_command.Tiny)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The workdir of a run in one process with 4 devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    cache = str(workdir.with_name("cache"))
    with started(1, 4, ["--workdir", str(workdir), "--num-devices", "4", *TOGETHER], CIFAR_JAX_CACHE=cache) as running:
        assert outcomes(running)[0][::2] == (0, "")
    return workdir


@pytest.mark.parametrize(("count", "devices"), [(2, 2), pytest.param(4, 1, marks=pytest.mark.long)])
def test_several_processes_train_like_one(alone, tmp_path, count, devices):
    """The same numbers, up to the order in which four devices' gradients are added. Process 0 alone prints."""
    with started(count, devices, ["--workdir", str(tmp_path / "run"), "--num-devices", "4", *TOGETHER]) as running:
        main, *others = outcomes(running)
    assert main[::2] == (0, "")
    assert re.search(r"on 4 × cpu(.|\n)*epoch 1/2(.|\n)*figures and summary.json", main[1])
    assert [(status, err) for status, _, err in others] == [(0, "")] * (count - 1)
    assert not any("epoch" in out for _, out, _ in others)
    config, expected_config = read_config(tmp_path / "run"), read_config(alone)
    for actual, expected in zip(latest_state(config), latest_state(expected_config)):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * max(float(np.abs(expected).max()), 1e-30))
    for row, expected in zip(untimed_rows(config), untimed_rows(expected_config)):
        assert (row.train_accuracy, row.test_accuracy) == (expected.train_accuracy, expected.test_accuracy)
        assert row.train_loss == pytest.approx(expected.train_loss, rel=1e-5)


def test_a_signal_to_one_process_stops_all_and_one_resumes(tmp_path):
    flags = ["--workdir", str(tmp_path / "run"), "--num-epochs", "999"]
    with started(2, 1, flags) as running:
        wait_for(running[0], "epoch +1/")
        running[1].send_signal(signal.SIGTERM)
        main, other = outcomes(running)
    assert (main[0], other[0]) == (143, 143)
    assert re.match(r"saved after \d+ epochs and \d/6 steps. To resume: python -m cifar_jax.train tiny ", main[2])
    with started(1, 8, [*flags, "--num-devices", "8"]) as running:  # a checkpoint fits any number of either
        wait_for(running[0], "resuming after")
        wait_for(running[0], "epoch")


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.long)])
def test_when_one_process_is_killed_the_other_ends_with_a_line(tmp_path, victim):
    with started(2, 1, ["--workdir", str(tmp_path / "run"), "--num-epochs", "999"]) as running:
        wait_for(running[0], "epoch +1/")
        running[victim].kill()
        status, _, err = outcomes(running)[1 - victim]
    assert status in (2, -signal.SIGABRT)  # an exception, or the end that JAX puts to the process
    assert re.fullmatch(LOST, err)


@pytest.mark.parametrize(
    ("flags", "seeds", "named"),
    [
        (["--learning-rate", "0.1"], ("0", "0"), "another recipe or version: learning_rate 0.1, and process 0 0.05"),
        ([], ("0", "1"), "process 1 has another dataset: training images' SHA-256"),
    ],
)
def test_a_process_that_differs_is_refused_by_all(tmp_path, flags, seeds, named):
    workdir = ["--workdir", str(tmp_path / "run")]
    with started(2, 1, workdir, [*workdir, *flags], TINY_SEED=seeds) as running:
        for status, out, err in outcomes(running):
            assert (status, "epoch" in out) == (2, False)
            assert named in err
            assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_what_one_process_can_not_do_is_refused_by_all(tmp_path):
    (tmp_path / "file").touch()
    with started(2, 1, ["--workdir", str(tmp_path / "file")]) as running:
        results = outcomes(running)
    assert [status for status, *_ in results] == [2, 2]
    assert results[0][2] == results[1][2]
    assert "name a writable folder" in results[0][2]


@pytest.mark.parametrize("failing", [pytest.param(0, marks=pytest.mark.long), 1])
def test_an_error_in_one_process_is_said_and_ends_all(tmp_path, failing):
    fails = ["yes" if number == failing else "no" for number in range(2)]
    with started(2, 1, ["--workdir", str(tmp_path / "run")], TINY_FAILS=fails) as running:
        results = outcomes(running)
    assert results[failing][0] == 2
    assert results[failing][2] == "error: data: Permission denied: name another place\n"
    assert re.fullmatch(
        r"error: .*another .*: run the same command in all processes to resume\n", results[1 - failing][2]
    )


def test_other_numbers_of_devices_are_refused_by_all(tmp_path):
    counts = [f"--xla_force_host_platform_device_count={number}" for number in (1, 2)]
    with started(2, 1, ["--workdir", str(tmp_path / "run")], XLA_FLAGS=counts) as running:
        for status, _, err in outcomes(running):
            assert status == 2
            assert "same number of devices (process 0 has 1, process 1 has 2): on CPUs set JAX_NUM_CPU_DEVICES" in err


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (("host", 2, 0), "--coordinator host: must be HOST:PORT, auto or none"),
        ((":1", 2, 0), "--coordinator :1: must be HOST:PORT"),
        (("host:99999", 2, 0), "HOST:PORT"),
        (("host:1", None, 0), "needs --num-processes and --process-id"),
        (("host:1", 2, 2), "--process-id 2: must be from 0 to 1"),
        ((None, 2, None), "--num-processes and --process-id need --coordinator"),
        (("auto", None, 1), "need --coordinator HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit(fields, named):
    with pytest.raises(UserError, match=named):
        Processes(*fields)
    assert Processes("[::1]:80", 2, 1).process_id == 1


def test_processes_of_a_cluster_are_found():
    assert is_clusters_process({"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"})
    assert is_clusters_process({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://host:1"})
    assert not is_clusters_process({"OMPI_COMM_WORLD_SIZE": "2"})  # JAX would not find its address
    assert is_clusters_process({"TPU_WORKER_HOSTNAMES": "a,b"})
    for alone in ({}, {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, {"TPU_WORKER_HOSTNAMES": "localhost"}):
        assert not is_clusters_process(alone)


def test_xlas_messages_are_hidden_from_several_processes(monkeypatch):
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    silence_xla(["train", "--seed", "1"])
    assert "TF_CPP_MIN_LOG_LEVEL" not in os.environ
    silence_xla(["train", "--coordinator=a:1"])
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "4"


@pytest.mark.parametrize(
    ("visible", "named", "ids"), [("3", None, [0]), ("0,1", None, None), (None, None, None), ("3", "1", None)]
)
def test_a_task_of_a_cluster_takes_the_one_gpu_that_it_sees(visible, named, ids, monkeypatch):
    """As under srun --gpus-per-task=1, where JAX would take the GPU of the task's number."""
    given = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: given.append(options))
    for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("JAX_LOCAL_DEVICE_IDS", named)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    processes._initialize(Processes("auto"))
    assert given[0].get("local_device_ids") == ids


@pytest.mark.parametrize("reuse", [False, True])
def test_a_port_that_is_in_use_is_refused(reuse, monkeypatch):
    """Also one of another coordinator, which allows its reuse: the runs would mix."""
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("it connects"))
    with socket.socket() as other:
        if reuse:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("0.0.0.0", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(UserError, match=f"--coordinator {address}: another program uses this port: name another"):
            processes._initialize(Processes(address, 2, 0))
    check_port(Processes(address, 2, 0))  # free again


def test_processes_of_a_launcher_that_jax_does_not_know_are_refused(tmp_path, run_command, monkeypatch):
    """Each would train by itself, in the same folder."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    status, _, error = run_command(train.main, "quickstart", "--workdir", tmp_path / "run")
    assert (status, error.count("\n")) == (2, 1)
    assert "--process-id $OMPI_COMM_WORLD_RANK" in error
    assert not (tmp_path / "run").exists()
    for environment in ({"OMPI_COMM_WORLD_SIZE": "1"}, {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "x"}):
        refuse_unknown_launcher(environment)
    with connected(Processes("none")):
        pass


def test_processes_compare_their_code(tiny_config, tmp_path, monkeypatch):
    """Every commit has the same version."""
    package, without = Path(cifar_jax.__file__).parent, shutil.ignore_patterns("*.safetensors")
    shutil.copytree(package, tmp_path / "cifar_jax", ignore=without)
    before = train._facts(tiny_config)
    monkeypatch.setattr(cifar_jax, "__file__", str(tmp_path / "cifar_jax" / "__init__.py"))
    assert train._facts(tiny_config) == before
    with (tmp_path / "cifar_jax" / "ops" / "cpu.py").open("a") as file:
        file.write("# another line")
    assert train._facts(tiny_config) != before


def test_one_process_agrees_with_itself():
    for flags in (Processes(), Processes("none")):
        with connected(flags):
            assert not jax.distributed.is_initialized()
    assert (on_main(lambda: 1), agree(lambda: 2), any_of(True), any_of(False)) == (1, 2, True, False)
    assert broadcast([3]) == [3]
    check_same("recipe", lambda: pytest.fail("nothing to compare with"))


def test_a_cluster_that_jax_does_not_find_is_said(monkeypatch):
    def fail(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with (
        pytest.raises(UserError, match=r"can't connect .*coordinator_address.*: check --coordinator; none trains"),
        connected(Processes("auto")),
    ):
        pass


@pytest.mark.long
def test_the_benchmark_of_processes(tmp_path, monkeypatch, run_command):
    """With short runs of the tiny network, and one kill."""
    monkeypatch.setattr(benchmarks.processes, "RUN", [str(TESTS / "tiny_command.py"), "tiny"])
    monkeypatch.setattr(benchmarks.processes, "LAYOUTS", ((1, 2), (2, 1)))
    monkeypatch.setattr(benchmarks.processes, "NUM_DEVICES", "2")
    monkeypatch.setenv("PYTHONPATH", str(TESTS.parent))
    flags = ["--out", tmp_path, "--kills", "1", "--num-epochs", "30"]
    assert run_command(benchmarks.processes.main, *flags)[::2] == (0, "")
    result = json.loads((tmp_path / "processes.json").read_text())
    one, two = result["runs"]
    assert (one["largest_difference"], len(one["test_loss"]), two["processes"]) == (0, 30, 2)
    assert two["largest_difference"] < 1e-2
    (kill,) = result["kills"]
    assert (len(kill["lines"]), len(kill["resumed"])) == (1, 1)
    status, _, err = run_command(benchmarks.processes.main, "--out", tmp_path, "--num-epochs", "1")
    assert status == 2
    assert "--num-epochs 1: must be 2 or more" in err
