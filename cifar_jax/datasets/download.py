"""Downloads the official archive and verifies its checksum."""

from __future__ import annotations

import sys
from pathlib import Path

from cifar_jax.console import say
from cifar_jax.datasets.cifar import Cifar
from cifar_jax.datasets.partial import partial_folder
from cifar_jax.errors import UserError


def download(info: Cifar, folder: Path) -> Path:
    """Downloads the archive into `folder`. An interrupted download leaves no file under the final name.

    Returns: the archive's path. Raises: UserError if the download fails.
    """
    import pooch  # imported here because neither is needed once the data are present
    import requests

    hint = f"download {info.url} elsewhere and name its folder with --data-dir"
    fetch = pooch.HTTPDownloader(progressbar=bool(sys.stderr and sys.stderr.isatty()), timeout=30)
    pooch.get_logger().setLevel("WARNING")  # its messages name the temporary folder
    say(f"downloading {info.url} to {folder}", error=True)
    try:
        with partial_folder(folder) as partial:
            name = info.python.archive
            pooch.retrieve(info.url, info.checksum, fname=name, path=partial, downloader=fetch)
            (partial / name).chmod(partial.stat().st_mode & 0o666)  # pooch makes it private
            return (partial / name).rename(folder / name)
    except requests.exceptions.RequestException as error:
        raise UserError(
            f"{info.title} was not found on this machine, and the download failed ({_cause(error)}): {hint}"
        ) from error
    except (OSError, ValueError) as error:  # full disk, folder not writable, wrong checksum
        raise UserError(f"can't download {info.title} to {folder} ({error}): {hint}") from error


def _cause(error: BaseException) -> str:
    """Returns the innermost reason. requests wraps it in three layers of multi-line text."""
    while (inner := getattr(error, "reason", None) or next(iter(error.args), None)) and isinstance(inner, Exception):
        error = inner
    return str(error).rpartition(": ")[2] or type(error).__name__
