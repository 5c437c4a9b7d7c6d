"""Reads and writes .h5, .weights.h5 and .keras files of Keras 2 and 3, without Keras.

`hdf5_worker` reads files in a separate process. Written files have the original Keras program's layer names (conv2d_1
…) and an architecture whose fields both Keras 2 and Keras 3 know.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import os
import signal
import struct
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.errors import UserError
from cifar_jax.weights import hdf5_worker, keras
from cifar_jax.weights.pairing import Order
from cifar_jax.weights.params import Named, num_classes_of

TIMEOUT = 60  # seconds of waiting for the disk; hdf5_worker.CPU_SECONDS limits the work
TYPES = ("<f2", "<f4", "<f8", "|i1", "|u1", "|b1", *(f"<{kind}{size}" for kind in "iu" for size in (2, 4, 8)))


@dataclasses.dataclass(frozen=True)
class KerasFile:
    """Content of a Keras file.

    `config`: the architecture as JSON values; `order`: see pairing; `flipped`: convolution kernels are rotated by 180°;
    `metadata`: of files that cifar_jax wrote, see metadata.py.
    """

    tensors: list[Named]
    config: Any
    order: Order
    flipped: bool
    metadata: dict[str, str] | None


def run_worker(path: Path) -> bytes:
    """Returns the output of `hdf5_worker` for a file. Raises: UserError if the process fails or takes too long."""
    folders = {str(Path(str(importlib.util.find_spec(name).origin)).parent.parent) for name in ("numpy", "h5py")}  # type: ignore[union-attr]
    command = [sys.executable, "-I", hdf5_worker.__file__, str(path.absolute()), *folders]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "HDF5_USE_FILE_LOCKING": "FALSE"}
    environment.pop("HDF5_PLUGIN_PATH", None)
    try:
        result = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT,
            start_new_session=True,  # otherwise Ctrl-C would end it before this process, as if the file were damaged
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"reading takes more than {TIMEOUT} seconds: damaged, or on a slow disk") from error
    if result.returncode or len(result.stdout) < 8:
        ended = f"status {result.returncode}" if result.returncode >= 0 else signal.Signals(-result.returncode).name
        line = (result.stderr.decode(errors="replace").strip().splitlines() or [ended])[-1]
        raise UserError(f"damaged or not a Keras file: the process that read it failed ({line:.200})")
    return result.stdout


def read_keras(path: Path) -> KerasFile:
    """Reads a Keras file. Raises: UserError if it is damaged, too large, or takes too long."""
    output = run_worker(path)
    (length,) = struct.unpack("<Q", output[:8])
    header = json.loads(output[8 : 8 + length])
    if "error" in header:
        raise UserError(header["error"])
    config, metadata = (
        _parsed(header[name], what) for name, what in (("config", "architecture"), ("metadata", "metadata"))
    )
    if not isinstance(metadata, (dict, type(None))) or not all(isinstance(x, str) for x in (metadata or {}).values()):
        raise UserError("its metadata are not a dict of strings")
    tensors, at = [], 8 + length
    for name, kind, shape in header["tensors"]:
        dtype = np.dtype("<u2" if kind == "bfloat16" else TYPES[TYPES.index(kind)])
        array = np.frombuffer(output, dtype, int(np.prod(shape)), at).reshape(shape)
        at += array.nbytes
        array = (array.astype(np.uint32) << 16).view(np.float32) if kind == "bfloat16" else array
        tensors.append((name.replace("\\", "/"), array))
    return KerasFile(tensors, config, header["order"], header["backend"] == ["theano"], metadata)


def _parsed(text: str | None, what: str) -> Any:
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"damaged: its {what} is not valid JSON ({type(error).__name__})") from error


def write_keras(
    kind: str, params: Mapping[str, Any], model: str, final_relu: bool, metadata: Mapping[str, str]
) -> bytes:
    """Returns the bytes of an '.h5', '.weights.h5' or '.keras' file. Raises: UserError without a twin in Keras."""
    import h5py

    architecture = keras.architecture(model, final_relu=final_relu, num_classes=num_classes_of(params, model))
    weights = iter(keras.params_to_keras(params, model))
    pairs = {layer["config"]["name"]: (next(weights), next(weights)) for layer in with_weights(architecture)}
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs[hdf5_worker.METADATA] = json.dumps(metadata)
        if kind == ".h5":
            _write_by_attributes(file, architecture, pairs)
        else:
            _write_by_paths(file, architecture, pairs)
    if kind != ".keras":
        return buffer.getvalue()
    archive = io.BytesIO()
    version = {"keras_version": keras.WRITTEN_VERSION, "date_saved": "1980-01-01@00:00:00"}
    with zipfile.ZipFile(archive, "w") as members:
        contents = [json.dumps(text).encode() for text in (version, _with_modules(architecture))] + [buffer.getvalue()]
        for name, content in zip(("metadata.json", "config.json", "model.weights.h5"), contents):
            members.writestr(zipfile.ZipInfo(name), content)  # without a date, so the bytes are reproducible
    return archive.getvalue()


def _with_modules(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Adds each class's module to an architecture, as .keras files need it."""

    def module(name: str, parts: dict[str, Any]) -> dict[str, Any]:
        return {"module": name, "registered_name": None} | parts

    layers = []
    for layer in architecture["config"]["layers"]:
        fields = {name: module("keras.initializers", value) if name.endswith("_initializer") else value
                  for name, value in layer["config"].items()}  # fmt: skip
        layers.append(module("keras.layers", layer | {"config": fields}))
    return module("keras", {**architecture} | {"config": architecture["config"] | {"layers": layers}})


def with_weights(architecture: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [layer for layer in architecture["config"]["layers"] if layer["class_name"] in ("Conv2D", "Dense")]


def _write_by_attributes(file: Any, architecture: Mapping[str, Any], pairs: Mapping[str, Any]) -> None:
    root = file.create_group("model_weights")
    file.attrs["model_config"] = json.dumps(architecture).encode()
    for group in (file, root):
        group.attrs["keras_version"] = keras.WRITTEN_VERSION.encode()
        group.attrs["backend"] = b"tensorflow"
    names = [layer["config"]["name"] for layer in architecture["config"]["layers"][1:]]  # without the InputLayer
    root.attrs["layer_names"] = np.array([name.encode() for name in names])
    for name in [*names, "top_level_model_weights"]:
        group = root.create_group(name)
        parts = [f"{name}/kernel:0", f"{name}/bias:0"] if name in pairs else []
        group.attrs["weight_names"] = np.array([part.encode() for part in parts], "S" if parts else "S1")
        for part, array in zip(parts, pairs.get(name, ())):
            group[part] = array


def _write_by_paths(file: Any, architecture: Mapping[str, Any], pairs: Mapping[str, Any]) -> None:
    file.create_group("vars")  # the network's own variables (none); Keras 2 needs the group
    counts: dict[str, int] = {}
    for layer in architecture["config"]["layers"][1:]:
        kind = keras.snake_case(layer["class_name"])
        number = counts[kind] = counts.get(kind, -1) + 1
        group = file.create_group(f"layers/{kind}_{number}/vars" if number else f"layers/{kind}/vars")
        for i, array in enumerate(pairs.get(layer["config"]["name"], ())):
            group[str(i)] = array
