"""Huge pages: Linux maps large blocks of memory in pages of 2 MiB. This module does not import JAX."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from pathlib import Path

_TUNABLE = "glibc.malloc.hugetlb"
_RESTARTED = "CIFAR_JAX_RESTARTED"  # holds the process' id: glibc may have erased GLIBC_TUNABLES
_SETTINGS = "/sys/kernel/mm/transparent_hugepage"


def has_huge_pages() -> bool:
    """Whether Linux maps large blocks of memory in pages of 2 MiB, which takes little time.

    The system is set to use them for all blocks, or for those for which a program asks. glibc asks, from version 2.35
    on, if the process was started with GLIBC_TUNABLES=glibc.malloc.hugetlb=1. Setting the variable later has no effect.
    """
    setting = _setting()
    if setting != "madvise":
        return setting == "always"
    started_with = _read("/proc/self/environ").split("\0")
    tunables = next((line.partition("=")[2] for line in started_with if line.startswith("GLIBC_TUNABLES=")), "")
    return _glibc_can_ask() and f"{_TUNABLE}=1" in tunables.split(":")


def restart_with_huge_pages(module: str, script: str | None = None) -> None:
    """Starts this command again, in the same process, so that glibc asks for huge pages.

    It does so once, if the system waits to be asked and glibc can ask.
    GLIBC_TUNABLES=glibc.malloc.hugetlb=0 forbids it.
    It does nothing if the process is another program, such as a notebook, a debugger or a profiler.
    Args: module, script: the command, as `python -m MODULE` or as an installed script.
    """
    tunables, number = os.environ.get("GLIBC_TUNABLES", ""), str(os.getpid())
    if _TUNABLE in tunables or os.environ.get(_RESTARTED) == number or not _is_command(module, script):
        return
    if _setting() != "madvise" or not _glibc_can_ask():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, f"{_TUNABLE}=1"]))
    os.environ[_RESTARTED] = number
    with contextlib.suppress(OSError):  # it goes on as it is
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_command(module: str, script: str | None) -> bool:
    """Tells whether this process was started as the command and has done nothing yet."""
    if "jax" in sys.modules or not sys.executable or sys.gettrace() or sys.getprofile():
        return False
    arguments = sys.argv[1:]
    start = sys.orig_argv[1 : len(sys.orig_argv) - len(arguments)]
    if sys.orig_argv[1 + len(start) :] != arguments:
        return False
    flags = list(itertools.takewhile(lambda word: word.startswith("-") and word != "-m", start))
    name = start[len(flags) :]
    return name == ["-m", module] or (name == [sys.argv[0]] and Path(sys.argv[0]).name == script)


def _setting() -> str:
    """Returns when the system uses pages of 2 MiB: always, madvise (when asked) or never."""
    if _read(f"{_SETTINGS}/hpage_pmd_size").strip() != str(2**21):  # others are too large to be cheap
        return "never"
    if "THP_enabled:\t0" in _read("/proc/self/status"):  # forbidden for this process
        return "never"
    return next((word for word in ("always", "madvise") if f"[{word}]" in _read(f"{_SETTINGS}/enabled")), "never")


def _read(path: str) -> str:
    """Returns a system file's text; without such a file nothing."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _glibc_can_ask() -> bool:
    """Tells whether memory comes from a glibc that asks. LD_PRELOAD may have put another allocator in its place."""
    try:
        library, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        asks = library == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)
        return asks and not os.environ.get("LD_PRELOAD")
    except (OSError, ValueError, AttributeError):  # another C library or system
        return False
