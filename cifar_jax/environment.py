"""Describes how a number was measured: command, hardware, versions, date."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import cifar_jax

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "flax", "optax", "orbax-checkpoint")
PRODUCTS = {"gpu": "TensorFloat-32 where it can", "tpu": "bfloat16"}  # how JAX multiplies float32 if nothing is said
VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX"}  # flags of /proc/cpuinfo, the widest first


def describe_command(program: str, arguments: Sequence[str]) -> str:
    """Formats a command line. Absolute paths are cut to their last part, because other machines lack their folders."""
    words = [Path(word).name if word.startswith("/") else word for word in arguments]
    return shlex.join(["python", *program.split(), *words])


def _processor() -> str:
    """Returns the CPU's architecture and, on Linux, its model name and its widest vector instructions, if on x86."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    flags = found.get("flags", "").split()
    vectors = next((title for flag, title in VECTORS.items() if flag in flags), None)
    return ", ".join(part for part in (platform.machine(), found.get("model name"), vectors) if part)


def code_checksum() -> str:
    """Returns the SHA-256 of this package's Python files, because its version is the same at different commits."""
    folder, digest = Path(cifar_jax.__file__).parent, hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def describe_environment(devices: Sequence[jax.Device], packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Returns {'hardware', 'versions', 'date'} for a measurement on these devices. Omits packages not installed."""
    versions = {"cifar_jax": cifar_jax.__version__, "python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = f"{len(devices)} × {devices[0].device_kind}"
    if (default := PRODUCTS.get(devices[0].platform)) is not None:
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
        device += f" (float32 products: {precision or default})"
    return {
        "hardware": f"{device}, {os.cpu_count()} CPU cores ({_processor()})",
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }
