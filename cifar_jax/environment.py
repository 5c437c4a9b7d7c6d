"""What a measured number must stand beside: hardware, versions, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from typing import Any

import jax

import cifar_jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def describe_environment(devices: Sequence[jax.Device], packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """{'hardware', 'versions', 'date'} of a measurement on these devices, without packages that aren't installed."""
    versions = {"cifar_jax": cifar_jax.__version__, "python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "hardware": f"{len(devices)} × {devices[0].device_kind}, {os.cpu_count()} CPU cores ({platform.machine()})",
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }
