import sys
import types

import pytest

from cifar_jax import huge_pages

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
    monkeypatch.setattr(huge_pages, "Path", files.get)
    monkeypatch.setattr(huge_pages.os, "confstr", lambda name: library, raising=False)
    monkeypatch.setenv("GLIBC_TUNABLES", ASKED)
    assert huge_pages.has_huge_pages() == huge


def test_huge_pages_are_not_expected_of_another_library(monkeypatch):
    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(huge_pages.os, "confstr", unknown, raising=False)
    files = {
        "/sys/kernel/mm/transparent_hugepage/enabled": "[madvise]",
        "/proc/self/environ": f"GLIBC_TUNABLES={ASKED}",
    }
    monkeypatch.setattr(huge_pages, "Path", lambda name: types.SimpleNamespace(read_text=lambda **_: files[name]))
    assert not huge_pages.has_huge_pages()


@pytest.mark.parametrize(
    ("setting", "tunables", "imported", "asked"),
    [
        ("always [madvise] never", None, False, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.check=3", False, ASKED),
        ("always [madvise] never", ASKED, False, None),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", False, None),
        ("always [madvise] never", None, True, None),
        ("[always] madvise never", None, False, None),
        ("always madvise [never]", None, False, None),
    ],
)
@pytest.mark.parametrize("fails", [False, True])
def test_a_command_restarts_once_to_ask(setting, tunables, imported, asked, fails, tmp_path, monkeypatch):
    def execute(*arguments):
        calls.append((*arguments, huge_pages.os.environ["GLIBC_TUNABLES"]))
        if fails:
            raise OSError("cannot be executed")

    calls = []
    (tmp_path / "enabled").write_text(setting)
    monkeypatch.setattr(huge_pages, "Path", lambda _: tmp_path / "enabled")
    monkeypatch.setattr(huge_pages.os, "confstr", lambda _: "glibc 2.36", raising=False)
    monkeypatch.setattr(huge_pages.os, "execv", execute)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "cifar_jax.train", "lenet5"])
    monkeypatch.setenv("GLIBC_TUNABLES", tunables or "")
    if not imported:
        monkeypatch.delitem(sys.modules, "jax")
    huge_pages.restart_with_huge_pages()
    expected = [(sys.executable, [sys.executable, "-m", "cifar_jax.train", "lenet5"], asked)] if asked else []
    assert calls == expected
