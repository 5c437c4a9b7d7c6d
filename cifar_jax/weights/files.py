"""Weight files of every framework, read and written by the file's name.

| name | what it is | read with |
| --- | --- | --- |
| .safetensors | our own: Flax params, metadata says model, final_relu and input_scaling | safetensors |
| .pth, .pt | a PyTorch state_dict | torch, weights_only=True |
| .h5, .hdf5 | Keras 2 or 3, weights alone or the full model | h5py |
| .weights.h5, .keras | Keras 3 | h5py |

Nothing in a file is executed: tensors are found by order (.safetensors' by name), and checked for number, shape, type
and finiteness.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import re
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import flax.linen as nn
import h5py
import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from cifar_jax.configs import RECIPES
from cifar_jax.configs.base import InputScaling, ModelName
from cifar_jax.errors import UserError
from cifar_jax.io import write_atomically
from cifar_jax.models import MODELS
from cifar_jax.weights import keras as interop_keras
from cifar_jax.weights import pytorch as interop_pytorch
from cifar_jax.weights.params import Params, expected_shapes, layers_from_params

MAX_BYTES = 2**26  # of the weights in a .keras archive: with an optimizer's state about 20 MB
MAX_VALUES = 2**22  # of one tensor: the largest has 331,776


@dataclasses.dataclass(frozen=True)
class Weights:
    """A trained network. `params`: Flax, float32 numpy; `input_scaling`: how pixels must be scaled for it."""

    model: ModelName
    params: Params
    input_scaling: InputScaling
    final_relu: bool = False

    def create_module(self, **fields: Any) -> nn.Module:
        """The Flax network that these weights fit, with these fields (dropout_rates, dtype)."""
        return MODELS[self.model](**fields, **({"final_relu": True} if self.final_relu else {}))


def load_weights(
    path: Path,
    model: str | None = None,
    architecture: Path | None = None,
    input_scaling: InputScaling | None = None,
) -> Weights:
    """Reads a weight file.

    Args: model: None guesses it from the number of tensors. architecture: the Keras JSON that lies beside an `.h5` of
    weights alone, which says whether there is a final ReLU (.keras and full-model files hold it). input_scaling: None
    takes the file's own word for it (.safetensors), else the scaling of the model's original program.
    Raises: UserError naming the file, and the tensor if one is missing, too many, misshapen or not finite; OSError if
    the file can't be opened.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder: name a file in it, or a run with --workdir")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    path.open("rb").close()  # else a file that may not be read would seem damaged
    try:
        scaling, final_relu, config = None, None, None
        if path.name.endswith(".safetensors"):
            params, metadata = _read_safetensors(path)
            scaling = metadata.get("input_scaling")
            final_relu = {"True": True, "False": False}.get(str(metadata.get("final_relu")))
            if scaling not in (None, *get_args(InputScaling)):
                raise UserError(f"its metadata have an unknown input_scaling {scaling!r}")
        elif path.name.endswith((".pth", ".pt")):
            params = interop_pytorch.params_from_pytorch(_read_pytorch(path), model)
        elif path.name.endswith((".h5", ".hdf5", ".keras")):
            tensors, config = _read_keras(path)
            params = interop_keras.params_from_keras(tensors, model)
        else:
            raise UserError("unknown kind of file: name a .safetensors, .pth, .pt, .h5, .hdf5, .weights.h5 or .keras")
        _, found = layers_from_params(params)
        if model not in (None, found):
            raise UserError(f"holds the weights of {found}, not of {model}")
        if config:
            final_relu = _has_final_relu(config, found)
        if final_relu and found != "all_cnn":
            raise UserError(f"has a final ReLU, which {found} can't have")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if architecture is not None:
        try:
            final_relu = _has_final_relu(json.loads(architecture.read_text()), found)
        except UserError as error:
            raise UserError(f"{architecture}: {error}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{architecture}: not a Keras architecture ({error})") from error
    original = RECIPES[f"{found}_reference"].input_scaling
    chosen = input_scaling or cast("InputScaling | None", scaling) or original
    if not input_scaling and not scaling:
        print(f"{path}: does not say how pixels are scaled: {original}, as in {found}'s original", file=sys.stderr)
    if final_relu is None and found == "all_cnn":
        print(f"{path}: does not say whether its last layer has a ReLU: none, or use --architecture", file=sys.stderr)
    params = jax.tree.map(lambda array: array.astype(np.float32), params)
    return Weights(cast(ModelName, found), params, chosen, bool(final_relu))


def save_weights(path: Path, weights: Weights) -> None:
    """Writes a weight file of the kind that its name asks for. Raises UserError if it exists or can't be written."""
    if os.path.lexists(path):
        raise UserError(f"{path} exists: remove it, or name another file")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")
    if path.name.endswith(".safetensors"):
        metadata = {"format": "cifar_jax", "model": weights.model, "input_scaling": weights.input_scaling}
        tensors = traverse_util.flatten_dict(weights.params, sep="/")
        data = safetensors.numpy.save(tensors, metadata | {"final_relu": str(weights.final_relu)})
    elif path.name.endswith((".pth", ".pt")):
        torch = interop_pytorch.import_torch()
        state_dict = interop_pytorch.params_to_pytorch(weights.params)
        buffer = io.BytesIO()
        torch.save({name: torch.tensor(array) for name, array in state_dict.items()}, buffer)
        data = buffer.getvalue()
    elif path.name.endswith((".h5", ".hdf5", ".keras")):
        interop_keras.import_keras().config.set_floatx("float32")  # whatever the user's keras.json says
        network = interop_keras.create_model(weights.model, final_relu=weights.final_relu)
        network.set_weights(interop_keras.params_to_keras(weights.params))
        save = network.save_weights if path.name.endswith(".weights.h5") else network.save
        try:
            with tempfile.TemporaryDirectory() as folder:
                partial = Path(folder) / path.name
                save(partial)
                data = partial.read_bytes()
        except (OSError, RuntimeError) as error:  # h5py's
            raise UserError(f"can't write {path} by way of {tempfile.gettempdir()}: {error}") from error
    else:
        raise UserError(f"{path}: unknown kind of file: name a .safetensors, .pth, .h5, .weights.h5 or .keras")
    write_atomically(path, data)


def _read_safetensors(path: Path) -> tuple[Params, dict[str, str]]:
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"damaged or not a safetensors file ({error})") from error
    if metadata.get("format") != "cifar_jax":
        raise UserError("not written by cifar_jax (convert a PyTorch state_dict from its .pth)")
    wrong = [name for name in tensors if not re.fullmatch(r"(Conv|Dense)_\d/(kernel|bias)", name)]
    if wrong:
        raise UserError(f"tensor {wrong[0]} is none of these networks'")
    return traverse_util.unflatten_dict(tensors, sep="/"), metadata


def _read_pytorch(path: Path) -> Mapping[str, Any]:
    torch = interop_pytorch.import_torch()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of a foreign pickle, before it refuses it
            state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a cut pickle can raise anything
        raise UserError("damaged, or holds more than tensors: save model.state_dict()") from error
    if not isinstance(state_dict, Mapping) or not all(isinstance(x, torch.Tensor) for x in state_dict.values()):
        raise UserError("not a state_dict: save model.state_dict(), not the model or a checkpoint around it")
    for name, tensor in state_dict.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
            raise UserError(f"tensor {name} is sparse, quantized, nested or without data: it must be dense")
        if tensor.numel() > MAX_VALUES:
            raise UserError(f"tensor {name} has {tensor.numel()} values, more than any of these networks'")
    return state_dict


def _read_keras(path: Path) -> tuple[list[tuple[str, np.ndarray]], Any]:
    """The (name, tensor) in the order of the network, and its architecture or None."""
    try:
        if path.suffix != ".keras":
            with h5py.File(path) as file:
                return _read_hdf5(file)
        with zipfile.ZipFile(path) as archive:
            config = json.loads(_read_member(archive, "config.json"))
            with h5py.File(io.BytesIO(_read_member(archive, "model.weights.h5"))) as file:
                return _read_hdf5(file)[0], config
    except UserError:
        raise
    except Exception as error:  # of a damaged file h5py, zipfile and its decoders raise anything
        raise UserError(f"damaged or not a Keras file ({str(error).strip() or type(error).__name__})") from error


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).file_size > MAX_BYTES:
        raise UserError(f"{name} in it has more than {MAX_BYTES // 2**20} MiB")
    return archive.read(name)


def _read_hdf5(file: h5py.File) -> tuple[list[tuple[str, np.ndarray]], Any]:
    as_text = lambda name: name.decode() if isinstance(name, bytes) else str(name)
    config = json.loads(as_text(file.attrs["model_config"])) if "model_config" in file.attrs else None
    root = file.get("model_weights", file)
    if not isinstance(root, h5py.Group):
        raise UserError("its model_weights are no group")
    names: list[str] = []
    if "layer_names" in root.attrs:  # Keras 2, and Keras 3's .h5: attributes list the tensors in order
        for layer in map(as_text, root.attrs["layer_names"]):
            names += [f"{layer}/{as_text(weight)}" for weight in root[layer].attrs["weight_names"]]
    else:  # Keras 3: layers/conv2d_1/vars/0, numbered by class; convolutions come first in both networks
        root.visit(names.append)  # follows no links
        names = [name for name in names if re.search(r"/vars/\d+$", name) and "seed_generator" not in name]
        names = [name for name in names if not name.startswith("optimizer")]
        if not all(re.search(r"(^|/)(conv2d|dense)(_\d+)?/vars/[01]$", name) for name in names):
            raise UserError("its layers are named by attributes, in no order: save the full model as .keras or .h5")
        names.sort(key=lambda name: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name)])
    tensors = []
    for name in names:
        dataset = root.get(name)
        if not isinstance(dataset, h5py.Dataset) or dataset.file.filename != file.filename:
            raise UserError(f"tensor {name} is missing")
        if dataset.external or dataset.is_virtual:
            raise UserError(f"tensor {name} is in another file")
        if dataset.size is None or dataset.size > MAX_VALUES or dataset.dtype.itemsize > 8:
            raise UserError(f"tensor {name} has shape {dataset.shape}, larger than any of these networks")
        tensors.append((name, dataset[()]))
    return tensors, config


def _has_final_relu(config: Any, model: str) -> bool:
    """Whether a Keras architecture has a ReLU after its last layer with weights.

    Raises: UserError if for the rest it computes something else than `model`.
    """
    try:
        steps = _steps(config)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"not a Keras architecture ({type(error).__name__} {error})") from error
    expected = _expected_steps(model)
    if model == "all_cnn" and steps == [*expected[:-1], "relu", expected[-1]]:  # before the mean
        return True
    for found, wanted in itertools.zip_longest(steps, expected, fillvalue="the end"):
        if found != wanted:
            raise UserError(f"its layers are not those of {model}: there is {found} where there must be {wanted}")
    return False


def _steps(config: Any) -> list[str]:
    """What a Keras architecture computes, in order, but for what does nothing to a test image and a last softmax."""
    layers = config["config"] if isinstance(config["config"], list) else config["config"]["layers"]
    steps: list[str] = []
    for layer in layers:
        kind, options = layer["class_name"], layer["config"]
        sides = lambda value: (value, value) if isinstance(value, int) else tuple(value)
        strides, padding, activation = options.get("strides") or 1, options.get("padding", "valid"), "linear"
        if kind in ("Conv2D", "Convolution2D"):
            shape = (*sides(options["kernel_size"]), options["filters"])
            steps.append(_convolution(shape, sides(strides), padding, sides(options.get("dilation_rate", 1))))
            activation = options["activation"]
        elif kind == "Dense":
            steps.append(f"dense {options['units']}")
            activation = options["activation"]
        elif kind == "MaxPooling2D":
            size = sides(options["pool_size"])
            steps.append(f"max pool {size}, strides {sides(options.get('strides') or size)}, {padding}")
        elif kind == "GlobalAveragePooling2D":
            steps.append("mean")
        elif kind == "ReLU":
            changed = any(options.get(name) for name in ("max_value", "negative_slope", "threshold"))
            activation = "another relu" if changed else "relu"
        elif kind in ("Activation", "Softmax"):
            activation = options.get("activation", "softmax")
        elif kind not in ("InputLayer", "Dropout", "Flatten") and not kind.startswith("Random"):
            raise UserError(f"its layer {kind} is none of these networks'")
        if activation not in ("linear", None):  # before a max pool or after it is the same
            steps.insert(len(steps) - steps[-1].startswith("max pool"), str(activation))
    return steps[:-1] if steps[-1] == "softmax" else steps


def _convolution(shape: tuple[int, ...], strides: tuple[int, ...], padding: str, dilation: tuple[int, ...]) -> str:
    padding = "same" if shape[:2] == (1, 1) else padding  # which is no padding, too
    return f"convolution {shape}, strides {strides}, {padding}, dilation {dilation}"


def _expected_steps(model: str) -> list[str]:
    """The same of our own networks."""
    steps = []
    pool_after, pool = {
        "all_cnn": ((2, 5), "max pool (3, 3), strides (2, 2), valid"),
        "lenet5": ((0, 1), "max pool (2, 2), strides (2, 2), valid"),
    }[model]
    for number, (_, kernel, _) in enumerate(expected_shapes(model)):
        padding = "same" if model == "all_cnn" and number != 4 else "valid"
        convolution = len(kernel) == 4 and _convolution((*kernel[:2], kernel[3]), (1, 1), padding, (1, 1))
        steps += [convolution or f"dense {kernel[1]}", "relu"]
        if number in pool_after:
            steps.append(pool)
    return [*steps[:-1], "mean"] if model == "all_cnn" else steps[:-1]
