import dataclasses
import types

import jax
import pytest

from cifar_jax import host
from cifar_jax.configs import RECIPES
from cifar_jax.errors import UserError


def test_freed_memory_is_kept_and_released_where_the_library_can(monkeypatch):
    calls = []
    function = lambda *arguments: calls.append(arguments)
    library = types.SimpleNamespace(mallopt=function, malloc_trim=function)
    monkeypatch.setattr(host.ctypes, "CDLL", lambda name: library)
    host.keep_memory()
    assert calls == [(-4, 0), (-1, -1), (-2, 2**28)]  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
    host.release_memory()
    assert calls[3:] == [(0,)]
    monkeypatch.setattr(host.ctypes, "CDLL", lambda name: object())
    host.keep_memory()
    host.release_memory()


@pytest.mark.parametrize(("batch_size", "num_devices", "limited"), [(256, 1, True), (520, 1, False), (520, 2, True)])
def test_temporary_arrays_come_in_blocks_that_are_kept(batch_size, num_devices, limited, monkeypatch):
    """The option is set only on a CPU, for single steps, without huge pages, and if no array exceeds it, as XLA would
    print a warning."""
    monkeypatch.setattr(host, "has_huge_pages", lambda: False)
    lenet5, gpus = RECIPES["lenet5"], [types.SimpleNamespace(platform="gpu")] * num_devices
    options = host.compiler_options(lenet5, batch_size, jax.local_devices()[:num_devices])
    assert options == ({"xla_multiheap_size_constraint_per_heap": 60 * 2**20} if limited else {})
    assert not host.compiler_options(lenet5, batch_size, gpus)
    deterministic = dataclasses.replace(lenet5, deterministic=True)
    assert host.compiler_options(deterministic, batch_size, gpus) == {"xla_gpu_deterministic_ops": True}
    assert host.compiler_options(deterministic, batch_size, jax.local_devices()[:num_devices]) == options
    assert not host.compiler_options(lenet5, batch_size, jax.local_devices()[:num_devices], steps_per_call=16)
    monkeypatch.setattr(host, "has_huge_pages", lambda: True)
    assert not host.compiler_options(lenet5, batch_size, jax.local_devices()[:num_devices])


ASKED = "glibc.malloc.check=3:glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(
    ("setting", "tunables", "library", "huge"),
    [
        ("[always] madvise never", None, "glibc 2.28", True),
        ("always [madvise] never", None, "glibc 2.36", False),
        ("always [madvise] never", ASKED, "glibc 2.36", True),
        ("always [madvise] never", ASKED, "glibc 2.34", False),
        ("always [madvise] never", ASKED, None, False),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", "glibc 2.36", False),
        ("always madvise [never]", ASKED, "glibc 2.36", False),
        (None, ASKED, "glibc 2.36", False),
    ],
)
def test_huge_pages_are_seen(setting, tunables, library, huge, tmp_path, monkeypatch):
    """What the process was started with counts, not what the environment has now."""
    enabled, environ = tmp_path / "enabled", tmp_path / "environ"
    if setting is not None:
        enabled.write_text(f"{setting}\n")
    environ.write_text("A=1\0" + (f"GLIBC_TUNABLES={tunables}\0" if tunables else ""))
    files = {"/sys/kernel/mm/transparent_hugepage/enabled": enabled, "/proc/self/environ": environ}
    monkeypatch.setattr(host, "Path", files.get)
    monkeypatch.setattr(host.os, "confstr", lambda name: library, raising=False)
    monkeypatch.setenv("GLIBC_TUNABLES", ASKED)
    assert host.has_huge_pages() == huge


def test_huge_pages_are_not_expected_of_another_library(monkeypatch):
    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(host.os, "confstr", unknown, raising=False)
    files = {
        "/sys/kernel/mm/transparent_hugepage/enabled": "[madvise]",
        "/proc/self/environ": f"GLIBC_TUNABLES={ASKED}",
    }
    monkeypatch.setattr(host, "Path", lambda name: types.SimpleNamespace(read_text=lambda **_: files[name]))
    assert not host.has_huge_pages()


@pytest.mark.parametrize(
    ("limit", "slurm", "cores"),
    [("max 100000", None, 8), ("150000 100000", None, 2), ("20000 100000", "4", 1), (None, "3", 3), (None, "x", 8)],
)
def test_a_containers_or_slurms_limit_of_cores(limit, slurm, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(host, "_CPU_LIMIT", tmp_path / "cpu.max")
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    if limit is not None:
        (tmp_path / "cpu.max").write_text(f"{limit}\n")
    if slurm is not None:
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", slurm)
    assert host.cpu_cores() == cores


def test_every_core_becomes_a_device_unless_the_user_says_otherwise(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "_CPU_LIMIT", tmp_path / "none")
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    updates = []
    monkeypatch.setattr(jax.config, "update", lambda *arguments: updates.append(arguments))
    for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    host.use_cpu_cores()
    assert updates == [("jax_num_cpu_devices", 3)]
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    host.use_cpu_cores()
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    host.use_cpu_cores()
    assert len(updates) == 1


def test_a_platform_that_is_not_there(monkeypatch):
    def absent():
        raise AssertionError

    monkeypatch.setattr(jax, "local_devices", absent)
    monkeypatch.setattr(host, "keep_memory", lambda: None)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError, match="JAX_PLATFORMS=cuda"):
        host.prepare_host()
