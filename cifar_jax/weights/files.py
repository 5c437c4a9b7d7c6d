"""Loads and saves weight files. The content decides how a file is read, its name how it is written.

| name | content | reader |
| --- | --- | --- |
| .safetensors | cifar_jax: Flax params with metadata; or a PyTorch state_dict | safetensors |
| .pth, .pt | PyTorch state_dict | does not need PyTorch |
| .h5, .hdf5 | Keras 2 or 3: a full model, or only weights | does not need Keras; a separate process |
| .weights.h5, .keras | Keras 2.13 or newer, and Keras 3 | the same |

Nothing in a file is executed. No file takes much more memory or time than a file of the largest network.
"""

from __future__ import annotations

import dataclasses
import io
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import flax.linen as nn
import jax
import numpy as np

from cifar_jax.batches import InputScaling
from cifar_jax.console import say
from cifar_jax.errors import UserError
from cifar_jax.io import check_new_file, write_atomically
from cifar_jax.models import get_model
from cifar_jax.weights import pytorch, safetensors_files
from cifar_jax.weights.keras_files import read_keras, write_keras
from cifar_jax.weights.keras_import import Found, check_architecture, import_keras_file, load_architecture
from cifar_jax.weights.keras_layers import Architecture
from cifar_jax.weights.metadata import FORMAT, read_metadata, write_metadata
from cifar_jax.weights.params import create_module, has_final_relu, num_classes_of
from cifar_jax.weights.pytorch_files import LEGACY_MAGIC, is_bookkeeping, read_tensors

NAMES = (".safetensors", ".pth", ".pt", ".weights.h5", ".h5", ".hdf5", ".keras")


@dataclasses.dataclass(frozen=True)
class Weights:
    """A trained network.

    `params`: Flax params as float32 numpy arrays; `input_scaling`: the scaling of pixels that it needs; `dataset`,
    `class_names`: of its training data, None if unknown; `temperature`: logits / temperature give calibrated
    probabilities, None if it was not fitted.
    """

    model: str
    params: Any
    input_scaling: InputScaling
    final_relu: bool = False
    dataset: str | None = None
    class_names: tuple[str, ...] | None = None
    temperature: float | None = None

    @property
    def num_classes(self) -> int:
        return num_classes_of(self.params, self.model)

    def create_module(self, **fields: Any) -> nn.Module:
        """Returns the Flax network that these weights fit. Args: fields: its other fields (dropout_rates, dtype)."""
        return create_module(self.model, self.num_classes, self.final_relu, **fields)


def load_weights(
    path: Path,
    model: str | None = None,
    architecture: Path | None = None,
    input_scaling: InputScaling | None = None,
    dataset: str | None = None,
) -> Weights:
    """Reads a weight file. Notes on stderr report assumed facts, and dropped or reordered tensors.

    Args: model: None: found by the tensors' shapes; architecture: Keras JSON for an `.h5` that holds only weights,
    which tells whether there is a final ReLU (.keras and full-model files contain it); input_scaling: None: the one
    stored in the file, else the one of the model's original program; dataset: None: the one stored in the file.
    Raises: UserError naming the file, and the tensor if one is missing, surplus, misshapen or not finite; OSError if
    the file can't be opened.
    """
    if model is not None:
        get_model(model)
    declared = None if architecture is None else load_architecture(architecture)
    _check_place(path)
    try:
        found = _read(path, model, declared, dataset)
        if found.scales and input_scaling not in (None, found.input_scaling):
            raise UserError(f"its own layers scale pixels ({found.input_scaling}): omit --input-scaling")
        if found.final_relu and not has_final_relu(found.model):
            raise UserError(f"has a final ReLU, which {found.model} can't have")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    final_relu = found.final_relu
    if declared is not None:
        try:
            final_relu = check_architecture(declared, found.params, found.model)
        except UserError as error:
            raise UserError(f"{architecture}: {error}") from error
    original = get_model(found.model).INPUT_SCALING
    notes = list(found.notes)
    if not input_scaling and not found.input_scaling:
        notes.append(f"does not store the scaling of pixels: assuming {original}, as in {found.model}'s original")
    if final_relu is None and has_final_relu(found.model):
        notes.append("does not tell whether it has a final ReLU: assuming none, or use --architecture")
    for note in notes:
        say(f"{path}: {note}", error=True)
    params = jax.tree.map(lambda array: array.astype(np.float32), found.params)
    scaling = cast("InputScaling", input_scaling or found.input_scaling or original)
    names = (found.dataset, found.class_names) if dataset in (None, found.dataset) else (dataset, None)
    return Weights(found.model, params, scaling, bool(final_relu), *names, found.temperature)


def save_weights(path: Path, weights: Weights) -> None:
    """Writes a weight file in the format of its name. Raises: UserError if it exists or can't be written."""
    check_weight_file(path)
    write_atomically(path, encode_weights(kind_of_name(path), weights))


def check_weight_file(path: Path) -> None:
    """Checks that a weight file can be created. Raises: UserError if not, or if its format or a package is missing."""
    check_new_file(path)
    if kind_of_name(path) == ".pth":
        pytorch.import_torch()


def encode_weights(kind: str, weights: Weights) -> bytes:
    """Returns the content of a weight file. Args: kind: see kind_of_name. Raises: UserError if PyTorch is missing."""
    rest = weights.num_classes, weights.dataset, weights.class_names, weights.temperature
    metadata = write_metadata(weights.model, weights.final_relu, weights.input_scaling, *rest)
    if kind == ".safetensors":
        return safetensors_files.write_safetensors(weights.params, metadata)
    if kind != ".pth":
        return write_keras(kind, weights.params, weights.model, weights.final_relu, metadata)
    buffer = io.BytesIO()
    pytorch.import_torch().save(pytorch.file_state_dict(weights.params, weights.model), buffer)
    return buffer.getvalue()


def kind_of_name(path: Path) -> str:
    """Returns the format of a file name: .safetensors, .pth, .weights.h5, .h5 or .keras. Raises: UserError."""
    name = next((name for name in NAMES if path.name.endswith(name)), None)
    if name is None:
        raise UserError(f"{path}: unknown format: use .safetensors, .pth, .h5, .weights.h5 or .keras")
    return {".pt": ".pth", ".hdf5": ".h5"}.get(name, name)


def is_saved_model(path: Path) -> bool:
    """Tells whether a folder is TensorFlow's SavedModel, which `load_weights` refuses with advice."""
    return (path / "saved_model.pb").is_file()


def _check_place(path: Path) -> None:
    if is_saved_model(path):
        raise UserError(f"{path}: is a SavedModel: load it with Keras 2 and save it as .h5 or .keras")
    if path.is_dir():
        raise UserError(f"{path}: is a folder: name a file in it, or use --workdir for a run")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    path.open("rb").close()  # reports a missing permission, which would look like damage below


def _read(path: Path, model: str | None, declared: Architecture | None, dataset: str | None) -> Found:
    """Reads a file by the format of its content."""
    with path.open("rb") as file:
        head = file.read(4096)
        members = _members(file) if head.startswith(b"PK") else []
    is_hdf5 = any(head[start:].startswith(b"\x89HDF\r\n\x1a\n") for start in (0, 512, 1024, 2048))
    if is_hdf5 or {"config.json", "model.weights.h5"} & set(members):
        return import_keras_file(read_keras(path), model, declared, dataset)
    if any(name.endswith("data.pkl") for name in members) or head.startswith(LEGACY_MAGIC):
        tensors, notes = read_tensors(path)
        params, found, more = pytorch.params_from_arrays(tensors, model)
        return Found(found, params, notes=(*notes, *more))
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return _read_safetensors(path, model)
    raise UserError(_what_it_is(path, head, members))


def _members(file: IO[bytes]) -> list[str]:
    """Returns the names of a zip archive's members."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.namelist()
    except Exception as error:  # zipfile can raise anything for a damaged archive
        raise UserError(f"damaged: the zip archive's table of contents can't be read ({error})") from error


def _read_safetensors(path: Path, model: str | None) -> Found:
    tensors, metadata = safetensors_files.read_safetensors(path)
    if metadata.get("format") != FORMAT:
        if not any(name.endswith((".weight", ".bias")) for name in tensors):
            raise UserError("neither written by cifar_jax nor a PyTorch state_dict")
        dropped = list(filter(is_bookkeeping, tensors))
        named = [(name, tensor) for name, tensor in tensors.items() if name not in dropped]
        params, found, notes = pytorch.params_from_arrays(named, model)
        return Found(found, params, notes=(*(f"dropped tensor {name}" for name in dropped), *notes))
    params, found = safetensors_files.own_params(tensors, metadata)
    if model not in (None, found):
        raise UserError(f"holds weights of {found}, not of {model}: use --model {found}")
    return Found(found, params, **read_metadata(metadata, num_classes_of(params, found)))


def _what_it_is(path: Path, head: bytes, members: list[str]) -> str:
    """Describes a file that can't be read as weights, and what to do."""
    if not head:
        return "is empty"
    if members:
        return f"a zip archive without Keras or PyTorch weights ({members[0][:50]} …): save model.state_dict()"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")) or head[257:262] == b"ustar":
        return "is compressed or an archive: unpack it and name the weight file in it"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer: fetch the file itself with git lfs pull"
    if head.startswith(b"\x80"):
        return "a pickle that torch.save did not write, or a damaged one: save model.state_dict() with torch.save"
    if path.name.endswith(NAMES):
        return f"damaged, or not a {''.join(path.suffixes[-2:])[-20:]} file"
    return "unknown format: must be .safetensors, .pth, .h5, .weights.h5 or .keras"
