"""Decodes one CIFAR image from a PNG file."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np

SIZE_LIMIT = 2**14  # bytes; the pixels have 3,072, and PNG adds little
_CHUNK_LIMIT = 100
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER = struct.pack(">IIBBBB", 32, 32, 8, 2, 0, 0)  # width, height, bits, RGB, deflate, filters; interlaced or not


def decode_png(data: bytes) -> np.ndarray:
    """Decodes a PNG file of 32×32 8-bit RGB pixels to uint8 [32, 32, 3]. Raises: ValueError if it is anything else.

    Pillow gets only the chunks needed for pixels, with verified checksums. A file can't cost more than its pixels.
    """
    import PIL.Image  # imported here because official archives do without it

    if len(data) > SIZE_LIMIT or not data.startswith(_SIGNATURE):
        raise ValueError("not a PNG file of 32×32 pixels")
    kept, position = [_SIGNATURE], len(_SIGNATURE)
    for _ in range(_CHUNK_LIMIT):
        chunk = data[position : position + 12 + int.from_bytes(data[position : position + 4], "big")]
        kind, body, position = chunk[4:8], chunk[8:-4], position + len(chunk)
        if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
            raise ValueError("a damaged PNG file")
        if kind == b"IHDR" and not body.startswith(_HEADER):
            raise ValueError("not a PNG file of 32×32 8-bit RGB pixels")
        if kind in (b"IHDR", b"IDAT", b"IEND"):
            kept.append(chunk)
        if kind == b"IEND":
            break
    else:
        raise ValueError("a PNG file with too many chunks")
    try:
        with PIL.Image.open(io.BytesIO(b"".join(kept)), formats=("PNG",)) as image:
            pixels = np.asarray(image)
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, …
        raise ValueError(f"a damaged PNG file ({error})") from error
    if pixels.shape != (32, 32, 3) or pixels.dtype != np.uint8:
        raise ValueError("not a PNG file of 32×32 8-bit RGB pixels")
    return pixels
