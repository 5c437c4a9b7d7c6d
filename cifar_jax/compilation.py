"""JAX's persistent compilation cache, in the user's cache folder: a second start compiles little or nothing.

JAX compiles again where an entry is missing or unreadable, and works without a cache where the folder can't be written.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import warnings
import zlib
from pathlib import Path

import jax

from cifar_jax.datasets.files import cache_folder
from cifar_jax.errors import UserError

MAX_BYTES = 256 * 2**20  # of all entries; a recipe's are about 2 MB
_MIN_COMPILE_SECONDS = 0.0  # JAX's default of 1 second leaves out programs that add up to seconds


def use_compilation_cache() -> None:
    """Keeps compiled programs, unless the user has set JAX_COMPILATION_CACHE_DIR or there is no cache folder."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        if (cache := cache_folder()) is None:
            return
        folder = cache / "compiled" / processor_id()
        folder.mkdir(parents=True, exist_ok=True)
        prune(folder)
    except (OSError, UserError):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)
    # A full disk, or another process that removes an entry: the program is compiled, and nothing else is lost.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry", UserWarning)


def processor_id() -> str:
    """Identifies the processor: a program compiled for another may use instructions that this one lacks."""
    lines = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(errors="replace")
        lines += sorted({line for line in text.splitlines() if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def prune(folder: Path, max_bytes: int = MAX_BYTES) -> None:
    """Removes damaged entries, which JAX would neither read nor replace, and the oldest ones above max_bytes."""
    entries, total = [], 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process prunes too
            entries.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    for _, size, path in sorted(entries, reverse=True):
        total += size
        with contextlib.suppress(OSError):
            if total > max_bytes or _is_damaged(path):
                path.unlink()


def _is_damaged(path: Path) -> bool:
    """Whether a zlib stream is cut or altered. Entries in zstandard's format are checked by JAX as it reads them."""
    data = path.read_bytes()
    if not data.startswith(b"\x78") and data:
        return False
    decompressor = zlib.decompressobj()
    try:
        decompressor.decompress(data)
    except zlib.error:
        return True
    return not decompressor.eof
