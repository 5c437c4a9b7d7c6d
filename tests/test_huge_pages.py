import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from cifar_jax import huge_pages

ASKED = "glibc.malloc.check=3:glibc.malloc.hugetlb=1"
SETTINGS = "/sys/kernel/mm/transparent_hugepage"
SIZE = {f"{SETTINGS}/hpage_pmd_size": "2097152\n"}


@pytest.fixture
def system(monkeypatch):
    """Fakes the system's files and the version of the C library."""

    def fake(setting, started_with=None, library="glibc 2.36", **files):
        variables = "A=1\0" + (f"GLIBC_TUNABLES={started_with}\0" if started_with else "")
        files = SIZE | {f"{SETTINGS}/enabled": setting, "/proc/self/environ": variables} | files

        class File(types.SimpleNamespace):
            def __init__(self, name):
                super().__init__(name=name.rpartition("/")[2])
                self.path = name

            def read_text(self, **_):
                if files.get(self.path) is None:
                    raise FileNotFoundError(self.path)
                return files[self.path]

        def confstr(_):
            if isinstance(library, Exception):
                raise library
            return library

        monkeypatch.setattr(huge_pages, "Path", File)
        monkeypatch.setattr(huge_pages.os, "confstr", confstr, raising=False)

    for name in ("LD_PRELOAD", "CIFAR_JAX_RESTARTED", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    return fake


@pytest.mark.parametrize(
    ("setting", "tunables", "library", "huge"),
    [
        ("[always] madvise never", None, "glibc 2.28", True),
        ("always [madvise] never", None, "glibc 2.36", False),
        ("always [madvise] never", ASKED, "glibc 2.36", True),
        ("always [madvise] never", ASKED, "glibc 2.34", False),
        ("always [madvise] never", ASKED, None, False),
        ("always [madvise] never", ASKED, ValueError("unrecognized configuration name"), False),
        ("always [madvise] never", ASKED, OSError("Invalid argument"), False),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", "glibc 2.36", False),
        ("always madvise [never]", ASKED, "glibc 2.36", False),
        (None, ASKED, "glibc 2.36", False),
    ],
)
def test_huge_pages_are_seen(setting, tunables, library, huge, system, monkeypatch):
    """What the process was started with counts, not what the environment has now."""
    system(setting, tunables, library)
    monkeypatch.setenv("GLIBC_TUNABLES", ASKED)
    assert huge_pages.has_huge_pages() == huge


@pytest.mark.parametrize(
    "files",
    [
        {f"{SETTINGS}/hpage_pmd_size": "536870912\n"},  # of a kernel whose small pages have 64 KiB
        {f"{SETTINGS}/hpage_pmd_size": None},
        {"/proc/self/status": "Name:\tpython\nTHP_enabled:\t0\n"},
    ],
)
def test_huge_pages_that_a_process_does_not_get(files, system):
    system("[always] madvise never", **files)
    assert not huge_pages.has_huge_pages()


@pytest.fixture
def restarts(system, monkeypatch):
    """Makes this process look like `python -m cifar_jax.train lenet5`; returns what is executed in its place."""
    calls = []
    execute = lambda *arguments: calls.append((*arguments, os.environ["GLIBC_TUNABLES"]))
    system("always [madvise] never")
    monkeypatch.setattr(huge_pages.os, "execv", execute)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-O", "-m", "cifar_jax.train", "lenet5", "-m"])
    monkeypatch.setattr(sys, "argv", ["train.py", "lenet5", "-m"])
    monkeypatch.setattr(sys, "gettrace", lambda: None)  # the tests may themselves be traced
    monkeypatch.delitem(sys.modules, "jax")
    return calls


def restart():
    huge_pages.restart_with_huge_pages("cifar_jax.train", script="cifar-jax")


@pytest.mark.parametrize(("tunables", "asked"), [(None, "glibc.malloc.hugetlb=1"), ("glibc.malloc.check=3", ASKED)])
def test_a_command_restarts_to_ask(tunables, asked, restarts, monkeypatch):
    if tunables:
        monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    restart()
    command = [sys.executable, "-O", "-m", "cifar_jax.train", "lenet5", "-m"]
    assert restarts == [(sys.executable, command, asked)]


def test_an_installed_script_restarts(restarts, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["/bin/python", "/bin/cifar-jax", "train"])
    monkeypatch.setattr(sys, "argv", ["/bin/cifar-jax", "train"])
    restart()
    assert [command for _, command, _ in restarts] == [[sys.executable, "/bin/cifar-jax", "train"]]


def test_it_restarts_once(restarts, monkeypatch):
    """Even if glibc erases the variable, as it does for setuid programs. A child of the process may restart."""
    restart()
    monkeypatch.delenv("GLIBC_TUNABLES")
    restart()
    assert len(restarts) == 1
    monkeypatch.setattr(huge_pages.os, "getpid", lambda: -1)
    restart()
    assert len(restarts) == 2


def test_it_goes_on_if_it_cannot_restart(restarts, monkeypatch):
    def fail(*_):
        raise OSError("Argument list too long")

    monkeypatch.setattr(huge_pages.os, "execv", fail)
    restart()


@pytest.mark.parametrize("setting", ["[always] madvise never", "always madvise [never]", None])
def test_it_does_not_restart_where_nobody_waits_to_be_asked(setting, restarts, system):
    system(setting)
    restart()
    assert not restarts


@pytest.mark.parametrize(
    ("name", "value"), [("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0"), ("LD_PRELOAD", "/malloc.so")]
)
def test_it_does_not_restart_against_the_environment(name, value, restarts, monkeypatch):
    monkeypatch.setenv(name, value)
    restart()
    assert not restarts


@pytest.mark.parametrize(
    "started",
    [
        ["python", "-"],  # a script on standard input, which is read only once
        ["python", "script.py", "lenet5", "-m"],
        ["python", "-c", "…", "lenet5", "-m"],
        ["python", "-m", "pdb", "-m", "cifar_jax.train", "lenet5", "-m"],
        ["python", "-m", "ipykernel_launcher", "-f", "kernel.json"],
        ["python", "-m", "cifar_jax.train", "all_cnn", "-m"],
        ["python"],
    ],
)
def test_another_program_is_not_restarted(started, restarts, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", started)
    restart()
    assert not restarts


def test_a_traced_program_is_not_restarted(restarts, monkeypatch):
    monkeypatch.setattr(sys, "gettrace", lambda: print)
    restart()
    assert not restarts


def test_a_program_that_has_started_jax_is_not_restarted(restarts, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", types.ModuleType("jax"))
    restart()
    assert not restarts


@pytest.mark.parametrize(
    "command", [["cifar_jax.train"], ["cifar_jax", "train"], ["benchmarks.throughput"], ["benchmarks.accuracy"]]
)
def test_commands_restart_before_they_import_jax(command, tmp_path):
    """In a process of their own, in which Python's sitecustomize fakes the system."""
    fake = f"""
import os, pathlib, sys
files = {SIZE | {f"{SETTINGS}/enabled": "always [madvise] never"}!r}
read = pathlib.Path.read_text
pathlib.Path.read_text = lambda path, **kwargs: files.get(str(path)) or read(path, **kwargs)
os.confstr = lambda _: "glibc 2.36"
def execute(program, words):
    print(*words[1:], os.environ["GLIBC_TUNABLES"], "jax" in sys.modules, flush=True)
    os._exit(0)
os.execv = execute
"""
    (tmp_path / "sitecustomize.py").write_text(fake)
    ours = ("GLIBC_TUNABLES", "LD_PRELOAD", "CIFAR_JAX_RESTARTED")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    arguments = ["-m", *command, "--help"]
    output = subprocess.run(
        [sys.executable, *arguments],
        cwd=Path(__file__).parents[1],
        env=environment | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output == f"{' '.join(arguments)} glibc.malloc.hugetlb=1 False\n"
