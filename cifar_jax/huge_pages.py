"""Huge pages: Linux maps large blocks of memory in pages of 2 MiB. This module does not import JAX."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

_TUNABLE = "glibc.malloc.hugetlb"


def has_huge_pages() -> bool:
    """Whether Linux maps large blocks of memory in pages of 2 MiB, which takes little time.

    The system is set to use them for all blocks, or for those for which a program asks. glibc asks, from version 2.35
    on, if the process was started with GLIBC_TUNABLES=glibc.malloc.hugetlb=1. Setting the variable later has no effect.
    """
    setting = _read("/sys/kernel/mm/transparent_hugepage/enabled")
    if "[madvise]" not in setting:
        return "[always]" in setting
    started_with = _read("/proc/self/environ").split("\0")
    tunables = next((line.partition("=")[2] for line in started_with if line.startswith("GLIBC_TUNABLES=")), "")
    return _glibc_can_ask() and f"{_TUNABLE}=1" in tunables.split(":")


def restart_with_huge_pages() -> None:
    """Starts this command again, in the same process, so that glibc asks for huge pages.

    It does so once, before JAX is imported, if the system waits to be asked and glibc can ask.
    GLIBC_TUNABLES=glibc.malloc.hugetlb=0 forbids it.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    waits = "[madvise]" in _read("/sys/kernel/mm/transparent_hugepage/enabled")
    started = "jax" in sys.modules or not sys.executable  # called by a program that has done something already
    if started or not waits or not _glibc_can_ask() or _TUNABLE in tunables:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, f"{_TUNABLE}=1"]))
    with contextlib.suppress(OSError):  # it goes on as it is
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _read(path: str) -> str:
    """Returns a system file's text; without such a file nothing."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _glibc_can_ask() -> bool:
    try:
        library, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return library == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)
    except (ValueError, AttributeError):  # another C library or system
        return False
