"""A program that reads a Keras file in a separate process, because libhdf5 crashes or hangs on some damaged files.

Usage: python -I hdf5_worker.py FILE FOLDER…, with the folders of numpy and h5py. It does not import this project.
Standard output: the length of a JSON text (8 bytes, little-endian), the text, and the bytes of all tensors.
The JSON is {'error': line}, or {'config': text or null, 'backend': [name], 'order': 'stated' or 'none',
'metadata': text or null, 'tensors': [[name, type, shape], …]}.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
import struct
import sys
import zipfile
from collections.abc import Iterator
from typing import Any

MAX_BYTES = 2**27  # limit of all weights and of an archive's member; weights and optimizer state have about 20 MB
MAX_VALUES = 2**22  # limit of one tensor; the largest has 331,776
MAX_TENSORS = 1000
MAX_CONFIG = 2**23
MEMORY = 2**28  # bytes in addition to the libraries' memory; more than a valid file needs
CPU_SECONDS = 4  # a valid file takes 0.1
METADATA = "cifar_jax"  # attribute with the metadata of files that cifar_jax writes
SIGNATURE = b"\x89HDF\r\n\x1a\n"


class Refused(Exception):
    """A file is refused. The text is a line for the user."""


def limit() -> None:
    """Limits this process' CPU time and memory as far as the system supports it."""
    try:
        import resource
    except ImportError:
        return
    amounts = {
        resource.RLIMIT_CORE: lambda: 0,
        resource.RLIMIT_CPU: lambda: CPU_SECONDS,
        resource.RLIMIT_AS: lambda: pages_in_use() * resource.getpagesize() + MEMORY,
    }
    for kind, amount in amounts.items():
        with contextlib.suppress(OSError, ValueError):  # no /proc, or a limit that can't be set
            hard = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (amount() if hard == resource.RLIM_INFINITY else min(amount(), hard), hard))


def pages_in_use() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0])


def member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """Reads a member and counts its bytes, because the size in its header can be wrong."""
    info = next((info for info in archive.infolist() if info.filename.replace("\\", "/") == name), None)
    if info is None:
        raise Refused(f"{name} is missing in the archive")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Refused(f"{name} in the archive has a compression that Keras does not use")
    parts, total = [], 0
    with archive.open(info) as file:
        while part := file.read(2**18):
            parts.append(part)
            total += len(part)
            if total > limit:
                raise Refused(f"{name} in the archive has more than {limit // 2**20} MiB")
    return b"".join(parts)


def text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def find(h5py: Any, group: Any, name: str) -> Any:
    """Returns the dataset or group of this name; None if it is missing or its path contains a link."""
    for part in [part for part in name.split("/") if part]:
        if not isinstance(group, h5py.Group) or not isinstance(group.get(part, getlink=True), h5py.HardLink):
            return None
        group = group[part]
    return group


def listed(attribute: Any) -> list[str]:
    if len(attribute) > MAX_TENSORS:
        raise Refused(f"lists {len(attribute)} names, many more than any supported network has")
    return [text(name) for name in attribute]


def names_by_attributes(h5py: Any, root: Any) -> list[str]:
    """Names in files of Keras 2 and .h5 files of Keras 3. Attributes list the tensors in the network's order."""
    names = []
    for layer in listed(root.attrs["layer_names"]):
        group = find(h5py, root, layer)
        if group is None:
            raise Refused(f"layer {layer} is missing")
        names += [f"{layer}/{name}" for name in listed(group.attrs["weight_names"])]
    return names


def names_by_paths(h5py: Any, root: Any) -> list[str]:
    r"""Names in .weights.h5 and .keras files: layers/conv2d_1/vars/0, or layers\conv2d_1\vars/0 from Windows."""
    names, left, seen = [], [("", root)], 0
    while left:
        path, group = left.pop()
        for name in group:
            seen += 1
            if seen > 50 * MAX_TENSORS:
                raise Refused("has many more groups than any supported network")
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                names.append(f"{path}{name}")  # reported as missing when it is read
                continue
            item = group[name]
            if isinstance(item, h5py.Group) and path.count("/") < 20:
                left.append((f"{path}{name}/", item))
            elif isinstance(item, h5py.Dataset):
                names.append(f"{path}{name}")
    kept = lambda name: not re.match(r"(optimizer|metrics|_metrics|compile_metrics|_optimizer|seed_generator)\b", name)
    clean = lambda name: name.replace("\\", "/")
    return sorted(name for name in names if kept(clean(name)) and "seed_generator" not in name)


def describe(h5py: Any, name: str, dataset: Any, file: Any) -> tuple[str, str, Any]:
    if not isinstance(dataset, h5py.Dataset) or dataset.file.filename != file.filename:
        raise Refused(f"tensor {name} is missing")
    if dataset.external or dataset.is_virtual:
        raise Refused(f"tensor {name} is stored in another file")
    values = 1 if dataset.shape == () else dataset.size
    if values is None or values > MAX_VALUES or dataset.dtype.itemsize > 8:
        raise Refused(f"tensor {name} has shape {dataset.shape}, larger than in any supported network")
    kind = dataset.dtype
    if kind.kind == "V" and kind.itemsize == 2 and text(dataset.attrs.get("dtype", "")) == "bfloat16":
        return name, "bfloat16", dataset
    if kind.kind not in "fiub" or (dataset.id.get_type().get_class() == h5py.h5t.ENUM and kind.kind != "b"):
        raise Refused(f"tensor {name} has type {kind}, must be a floating-point type")
    chunk = kind.itemsize
    for side in dataset.chunks or ():
        chunk *= side
    if chunk > MAX_BYTES:
        raise Refused(f"tensor {name} has chunks of {chunk} bytes, larger than any supported network")
    return name, kind.newbyteorder("<").str, dataset


def read(path: str, h5py: Any, numpy: Any) -> tuple[dict[str, Any], list[Any]]:
    """Returns (header, arrays) of a Keras file. Raises: Refused."""
    config = None
    with open(path, "rb") as file:
        source: Any = path
        if zipfile.is_zipfile(file) and not file.seek(0) and file.read(8) != SIGNATURE:
            with zipfile.ZipFile(file) as archive:
                config = member(archive, "config.json", MAX_CONFIG).decode()
                source = io.BytesIO(member(archive, "model.weights.h5", MAX_BYTES))
    with h5py.File(source, "r") as file:
        if config is None and "model_config" in file.attrs:
            config = text(file.attrs["model_config"])
        metadata = text(file.attrs[METADATA]) if METADATA in file.attrs else None
        root = find(h5py, file, "model_weights") if "model_weights" in file else file
        if not isinstance(root, h5py.Group):
            raise Refused("its model_weights are not a group")
        stated = "layer_names" in root.attrs
        names = names_by_attributes(h5py, root) if stated else names_by_paths(h5py, root)
        if len(names) > MAX_TENSORS:
            raise Refused(f"has {len(names)} tensors, many more than any supported network")
        described = [describe(h5py, name, find(h5py, root, name), file) for name in names]
        if sum(dataset.size * dataset.dtype.itemsize for _, _, dataset in described) > MAX_BYTES:
            raise Refused(f"its tensors have more than {MAX_BYTES // 2**20} MiB")
        arrays = [dataset[()] for _, _, dataset in described]
        backend = [text(group.attrs["backend"]) for group in (file, root) if "backend" in group.attrs]
    kinds = [kind for _, kind, _ in described]
    arrays = [
        array.view(numpy.uint16) if kind == "bfloat16" else numpy.asarray(array, kind)
        for kind, array in zip(kinds, arrays)
    ]
    tensors = [[name, kind, list(array.shape)] for (name, kind, _), array in zip(described, arrays)]
    header = {"config": config, "backend": backend[:1], "order": "stated" if stated else "none", "tensors": tensors}
    header["metadata"] = metadata
    return header, arrays


def answer(path: str, h5py: Any, numpy: Any) -> Iterator[bytes]:
    """Yields the parts of the output."""
    arrays: list[Any] = []
    try:
        header, arrays = read(path, h5py, numpy)
    except Refused as error:
        header = {"error": str(error)}
    except Exception as error:  # h5py and zipfile can raise anything for a damaged file
        header = {"error": f"damaged or not a Keras file ({str(error).strip() or type(error).__name__:.200})"}
    encoded = json.dumps(header).encode()
    yield struct.pack("<Q", len(encoded)) + encoded
    for array in arrays:
        yield numpy.ascontiguousarray(array).tobytes()


def main() -> None:
    # A batch system may signal all processes: the parent ends this one.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    path, *folders = sys.argv[1:]
    sys.path += folders
    import h5py
    import numpy

    limit()
    for part in answer(path, h5py, numpy):
        sys.stdout.buffer.write(part)


if __name__ == "__main__":
    main()
