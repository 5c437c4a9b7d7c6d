"""The formats of `export`: each returns a file's content, and a function that runs the content in its own runtime."""

from __future__ import annotations

import dataclasses
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax.batches import pixel_statistics, scale_images
from cifar_jax.errors import UserError
from cifar_jax.onnx_graph import NOT_INSTALLED, import_onnx, to_onnx
from cifar_jax.sources import Source
from cifar_jax.weights import keras, pytorch
from cifar_jax.weights.files import Weights, encode_weights, load_weights

SIZE = (32, 32, 3)
PLATFORMS = ("cpu", "cuda", "tpu")

Run = Callable[[np.ndarray], np.ndarray]  # images [N, 32, 32, 3] → logits [N, classes]


@dataclasses.dataclass(frozen=True)
class Network:
    """What is exported: a function from images [N, 32, 32, 3] of type `dtype` to logits, or the weights.

    `metadata` describes the function for users.
    """

    function: Callable[[jax.Array], jax.Array]
    dtype: Any
    metadata: dict[str, str]
    weights: Weights


def create_network(source: Source, uint8: bool) -> Network:
    """Returns a source's network in float32. Args: uint8: the function scales uint8 images itself."""
    mean, std = pixel_statistics(source.config.input_scaling, source.config.dataset)
    weights = source.weights()
    module = weights.create_module()

    def apply(images: jax.Array) -> Any:
        return module.apply({"params": weights.params}, images)

    metadata = {
        "class_names": json.dumps(source.class_names),
        "input": "uint8 [N, 32, 32, 3]" if uint8 else "(pixel / 255 - mean) / std, float32 [N, 32, 32, 3]",
        "mean": json.dumps(list(mean)),
        "std": json.dumps(list(std)),
    }
    metadata |= {} if source.temperature is None else {"temperature": repr(source.temperature)}
    if uint8:
        return Network(lambda images: apply(scale_images(images, mean, std)), jnp.uint8, metadata, weights)
    return Network(apply, jnp.float32, metadata, weights)


def onnx_file(network: Network, ending: str) -> tuple[bytes, Run]:
    """Returns an ONNX file, run by ONNX Runtime. Raises: UserError if a package is missing."""
    onnx = import_onnx()
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(NOT_INSTALLED) from error
    model = to_onnx(network.function, network.dtype, SIZE)
    onnx.helper.set_model_props(model, network.metadata)
    data = model.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return data, lambda images: session.run(["logits"], {"images": images})[0]


def stablehlo_file(network: Network, ending: str) -> tuple[bytes, Run]:
    """Returns jax.export's file for all PLATFORMS, run by JAX. Raises: UserError without flatbuffers."""
    (count,) = jax.export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((count, *SIZE), network.dtype)
    exported = jax.export.export(jax.jit(network.function), platforms=PLATFORMS)(images)
    try:
        data = bytes(exported.serialize())
    except ImportError as error:  # flatbuffers
        raise UserError(NOT_INSTALLED) from error
    call = jax.jit(jax.export.deserialize(bytearray(data)).call)
    return data, lambda images: np.asarray(call(images))


def safetensors_file(network: Network, ending: str) -> tuple[bytes, Run]:
    """Returns this package's weight file, read by its own loader and run by JAX."""
    data = encode_weights(".safetensors", network.weights)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        path.write_bytes(data)
        loaded = load_weights(path)
    apply = jax.jit(loaded.create_module().apply)
    return data, lambda images: np.asarray(apply({"params": loaded.params}, images))


def pytorch_file(network: Network, ending: str) -> tuple[bytes, Run]:
    """Returns a PyTorch state_dict, read and run by PyTorch. Raises: UserError if it is not installed."""
    torch, weights = pytorch.import_torch(), network.weights
    data = encode_weights(".pth", weights)
    twin = pytorch.create_model(weights.model, final_relu=weights.final_relu, num_classes=weights.num_classes).eval()
    state_dict = torch.load(io.BytesIO(data), weights_only=True)
    twin.load_state_dict({name: state_dict[name] for name in twin.state_dict()})  # without the notebook's copy

    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return twin(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()

    return data, run


def keras_file(network: Network, ending: str) -> tuple[bytes, Run]:
    """Returns a Keras file, read and run by Keras. Raises: UserError if it is not installed, or for another ending."""
    if not ending:
        raise UserError(f"Keras opens only files that end in {', '.join(FORMATS['keras'].endings)}: use one of these")
    library, weights = keras.import_keras(), network.weights
    data = encode_weights(ending, weights)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"network{ending}"
        path.write_bytes(data)
        if ending == ".weights.h5":
            model = keras.create_model(weights.model, None, weights.final_relu, weights.num_classes)
            model.load_weights(path)
        else:
            model = library.models.load_model(path, compile=False)
    return data, model.predict_on_batch


@dataclasses.dataclass(frozen=True)
class Format:
    """`create`: (network, ending of the file's name, "" if it is none of `endings`) → (content, how to run it).

    `runtime`: the package that runs it; `holds_weights`: the file has the weights for scaled pixels, and no program.
    """

    create: Callable[[Network, str], tuple[bytes, Run]]
    runtime: str
    endings: tuple[str, ...]
    holds_weights: bool = True


FORMATS = {
    "onnx": Format(onnx_file, "onnxruntime", (".onnx",), holds_weights=False),
    "stablehlo": Format(stablehlo_file, "jax", (".stablehlo",), holds_weights=False),
    "safetensors": Format(safetensors_file, "jax", (".safetensors",)),
    "pytorch": Format(pytorch_file, "torch", (".pth", ".pt")),
    "keras": Format(keras_file, "keras", (".keras", ".weights.h5", ".h5")),
}


def choose_format(output: Path, name: str | None) -> tuple[str, str]:
    """Returns (a format's name, the file's ending). Args: name: None: found by the ending.

    Raises: UserError if the ending belongs to no format, or to another one than `name`.
    """
    endings = {ending: key for key, value in FORMATS.items() for ending in value.endings}
    ending = next((ending for ending in endings if output.name.endswith(ending)), "")
    if name is None and not ending:
        raise UserError(f"{output}: must end in {', '.join(endings)}, or use --format")
    if name is not None and ending and endings[ending] != name:
        raise UserError(f"{output}: --format {name} needs a name that ends in {' or '.join(FORMATS[name].endings)}")
    return name or endings[ending], ending
