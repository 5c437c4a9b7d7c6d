"""Reads labels and PNG files from formats that need native libraries, in a separate process.

A few damaged bytes can make such a library crash, loop or fill the memory, which no `except` can catch.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from cifar_jax.datasets.cifar import IMAGE_SHAPE
from cifar_jax.datasets.png import decode_png
from cifar_jax.errors import UserError

IMPORT_FAILED = 3  # record_reader's exit status if a library can't be imported
_READER = Path(__file__).with_name("record_reader.py")


def read_records(
    request: dict[str, Any], files: Sequence[Path], count: int
) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
    """Runs record_reader on a request for `count` records of `files`.

    Returns: images, uint8 [count, 32, 32, 3]; labels, int64 [count]; the records' keys.
    Raises: ValueError with what is wrong with the files; UserError if a library can't be imported.
    """
    if not files or not all(os.path.isfile(file) for file in files):
        raise ValueError("no such files")
    request = {**request, "count": count, "bytes": sum(file.stat().st_size for file in files)}
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-P", str(_READER), json.dumps(request)]
    with tempfile.TemporaryFile() as errors:
        reader = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            start_new_session=True,  # otherwise Ctrl-C would end it before this process, as if the files were damaged
        )
        assert reader.stdout is not None
        try:
            with reader.stdout:
                return _receive(reader.stdout, count)
        except EOFError as error:
            status = reader.wait()
            reason = _reason(status, errors) or str(error)
            if status == IMPORT_FAILED:
                raise UserError(f"{files[0]}: the package that reads it can't be imported ({reason})") from None
            raise ValueError(reason) from None
        finally:
            reader.kill()
            reader.wait()


def _receive(stream: IO[bytes], count: int) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
    """Reads the program's output. Raises: EOFError if it ends too early; ValueError for a bad PNG file."""
    images, labels, keys = np.empty((count, *IMAGE_SHAPE), np.uint8), np.empty(count, np.int64), []
    for i in range(count):
        head = stream.read(12)
        if len(head) < 12:
            raise EOFError(f"{i} records instead of {count}")
        label, key_length, length = struct.unpack("<qHH", head)
        keys.append(stream.read(key_length))
        data = stream.read(length)
        try:
            labels[i], images[i] = label, decode_png(data)
        except ValueError as error:
            raise ValueError(f"record {i}: {error}") from error
    if stream.read(1):
        raise ValueError(f"more than {count} records")
    return images, labels, keys


def _reason(status: int, errors: IO[bytes]) -> str:
    """Returns why the program ended; empty if it gave no reason."""
    if status == -signal.SIGXCPU:
        return "reading takes too long for the file's size"
    if -status in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # before it could ignore them
        return f"the program that reads it was ended by {signal.Signals(-status).name}"
    if status < 0:
        return f"the library that reads it crashed with {signal.Signals(-status).name}"
    errors.seek(0)
    lines = errors.read(2**20).decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if status and lines else ""
