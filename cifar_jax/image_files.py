"""Image files that a user names: finds them in folders and by patterns, and reads them for the networks."""

from __future__ import annotations

import glob
import io
import os
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps

from cifar_jax.errors import UserError
from cifar_jax.io import user_path

STDIN = Path("-")
_IDENTIFIED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # formats of which Pillow knows the header alone


def find_images(names: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """Returns (files, failures): the files that the names stand for, and a line for each folder that can't be read.

    A name is a file, a folder, a pattern or -. Files come in the order of the names, and those of a folder and its
    subfolders in alphabetical order. Links to subfolders are not followed, as they may lead back.
    Raises: UserError if a folder, with its subfolders, or a pattern has no image file.
    """
    found: list[Path] = []
    failures: list[str] = []
    for name in names:
        path, unreadable = user_path(name), len(failures)
        if not os.path.lexists(path) and glob.has_magic(str(path)):
            paths = map(Path, sorted(glob.glob(str(path), recursive=True)))
            matches = list(dict.fromkeys(file for match in paths for file in _files(match, failures)))  # ** finds twice
        else:
            matches = _files(path, failures)
        if not matches and len(failures) == unreadable:
            raise UserError(f"{path}: no image file there")
        found += matches
    return found, list(dict.fromkeys(failures))  # ** finds a folder again below each that it is in


def _files(path: Path, failures: list[str]) -> list[Path]:
    """Returns a folder's image files, also in its subfolders, or any other path itself."""
    if not os.path.isdir(path):
        return [path]
    PIL.Image.init()
    formats = {*PIL.Image.OPEN, "MPO"} - _IDENTIFIED  # JPEG's reader opens MPO
    endings = {ending for ending, kind in PIL.Image.EXTENSION.items() if kind in formats}  # .pdf is only written
    fail = lambda error: failures.append(f"{error.filename}: {error.strerror}")
    below = [Path(folder) / file for folder, _, files in os.walk(path, onerror=fail) for file in files]
    return sorted(file for file in below if file.suffix.lower() in endings)


def load_image(path: Path) -> np.ndarray:
    """Reads an image file for the networks: uint8 [32, 32, 3]. The path - is standard input.

    EXIF rotation is applied, transparency becomes white, and the central square is resized to 32×32 pixels.
    Raises: UserError if the file can't be read, or is an image of one channel with more than 8 bits.
    """
    path = user_path(path)
    content = _standard_input() if path == STDIN else _regular_file(path)
    try:
        with PIL.Image.open(content) as image:
            deep = image.mode.startswith(("I", "F"))  # convert would clip them at 255
            upright = PIL.ImageOps.exif_transpose(image).convert("RGBA")
    except PermissionError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except PIL.UnidentifiedImageError as error:
        raise UserError(f"{path}: not an image that Pillow can read: convert it to PNG or JPEG") from error
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"{path}: can't be read ({error}): convert it to PNG or JPEG") from error
    if deep:
        raise UserError(f"{path}: more than 8 bits per channel: save it with 8")
    opaque = PIL.Image.alpha_composite(PIL.Image.new("RGBA", upright.size, "white"), upright)
    return np.asarray(PIL.ImageOps.fit(opaque.convert("RGB"), (32, 32)))


def _standard_input() -> io.BytesIO:
    if sys.stdin is None:
        raise UserError("-: standard input is closed")
    return io.BytesIO(sys.stdin.buffer.read())


def _regular_file(path: Path) -> Path:
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        regular = False
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    if not regular:
        raise UserError(f"{path}: no such file")
    return path
