"""Reads what a layer of a Keras architecture computes. Fields that are not read must have a neutral value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cifar_jax.errors import UserError

# Layers that don't change a test image. (RandomCrop does: it crops the centre.)
NEUTRAL = {
    "Dropout", "SpatialDropout2D", "GaussianDropout", "GaussianNoise", "AlphaDropout", "ActivityRegularization",
    "RandomFlip", "RandomRotation", "RandomTranslation", "RandomZoom", "RandomContrast", "RandomBrightness",
}  # fmt: skip
# Fields that do not change what a trained layer computes.
HARMLESS = {
    "name", "trainable", "dtype", "batch_input_shape", "batch_shape", "input_dtype", "seed", "optional",
    "kernel_initializer", "bias_initializer", "kernel_regularizer", "bias_regularizer", "activity_regularizer",
    "kernel_constraint", "bias_constraint",
}  # fmt: skip
# Fields that the readers below use, by layer.
READ = {
    "Conv2D": {"filters", "kernel_size", "strides", "padding", "data_format", "dilation_rate", "groups", "activation",
               "use_bias"},
    "Dense": {"units", "activation", "use_bias"},
    "MaxPooling2D": {"pool_size", "strides", "padding", "data_format"},
    "GlobalAveragePooling2D": {"data_format", "keepdims"},
    "Flatten": {"data_format"},
    "InputLayer": {"shape", "input_shape", "sparse", "ragged", "batch_size", "input_tensor"},
    "Activation": {"activation"},
    "ReLU": {"max_value", "negative_slope", "threshold"},
    "Softmax": {"axis"},
    "Rescaling": {"scale", "offset"},
    "Normalization": {"axis", "mean", "variance", "invert"},
}  # fmt: skip
DTYPES = ("float32", "float64", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16")
WORDS = {"Convolution2D": "Conv2D", "MaxPool2D": "MaxPooling2D", "GlobalAvgPool2D": "GlobalAveragePooling2D"}


@dataclasses.dataclass
class Architecture:
    """What a network computes.

    `steps`: descriptions of its layers in order, without layers that don't change a test image and a last softmax.
    `paths`: paths of its layers with weights in Keras 3's files, in order. `flatten`: "HWC" or "CHW". `scale` and
    `offset`: pixels become scale · pixel + offset, per channel. `normalization`: whether the file's mean and variance
    apply next. `dtype`: computation type.
    """

    steps: list[str] = dataclasses.field(default_factory=list)
    paths: list[str] = dataclasses.field(default_factory=list)
    flatten: str = "HWC"
    channels_first: bool = False
    scales: bool = False
    scale: np.ndarray = dataclasses.field(default_factory=lambda: np.ones(3))
    offset: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(3))
    normalization: bool = False
    dtype: str = "float32"

    @property
    def first_is_padded(self) -> bool:
        return not self.steps or ", valid," not in self.steps[0]


def read_layer(layer: Mapping[str, Any], result: Architecture, place: str) -> None:
    """Adds a layer to `result`. Raises: UserError; TypeError and others for malformed fields."""
    kind, fields = WORDS.get(layer["class_name"], layer["class_name"]), layer["config"]
    module, registered = layer.get("module"), layer.get("registered_name")
    if (module and not module.startswith(("keras.", "tf_keras."))) or registered not in (None, layer["class_name"]):
        raise UserError(f"its layer {kind} is a custom class ({registered or module}), which is not supported")
    policy = fields.get("dtype") or "float32"
    policy = policy["config"]["name"] if isinstance(policy, dict) else policy
    if policy not in DTYPES:
        raise UserError(f"its layer {kind} computes in {policy}, which is not supported")
    if policy not in ("float32", "float64") and kind in ("Conv2D", "Dense"):
        result.dtype = policy
    if kind in NEUTRAL:
        return
    if kind not in READ:
        raise UserError(f"its layer {kind} is in no supported network")
    if "nb_filter" in fields or "border_mode" in fields:
        raise UserError("written by Keras 1: load and save it with Keras 2")
    for name, value in fields.items():
        if name not in READ[kind] | HARMLESS and value not in (None, False):
            raise UserError(f"its layer {kind} has {name} = {str(value)[:50]}, unlike any supported network")
    for name in ("batch_input_shape", "batch_shape"):
        if fields.get(name):
            _input_shape(fields[name][1:], result)
    if "data_format" in READ[kind] and kind != "Flatten":
        first = (fields.get("data_format") or "channels_last") == "channels_first"
        if result.steps and first != result.channels_first:
            raise UserError("some of its layers have channels first and others channels last")
        result.channels_first = first
    READERS[kind](fields, result, place)


def _input_shape(shape: Any, result: Architecture) -> None:
    sides = [side for side in shape if side is not None]
    if 3 not in sides or [side for side in sides if side != 3] not in ([32, 32], []) or len(shape) != 3:
        raise UserError(f"takes images of shape {str(shape)[:50]}, not 32×32×3")
    result.channels_first = result.channels_first or (shape[0] == 3 and shape[2] != 3)


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return int(first), int(second)


def _activation(value: Any, result: Architecture) -> None:
    """Adds an activation. It moves before a max pool, which computes the same, and a second ReLU is left out."""
    if isinstance(value, dict):
        if value.get("class_name") in ("ReLU", "Softmax"):
            return READERS[value["class_name"]](value["config"], result, "")
        value = value.get("class_name") if isinstance(value.get("config"), dict) else value.get("config")
    name = str(value)[:50]
    if name not in ("linear", "None"):
        at = len(result.steps) - (bool(result.steps) and result.steps[-1].startswith("max pool"))
        if not (name == "relu" and at and result.steps[at - 1] == "relu"):
            result.steps.insert(at, name)
    return None


def _convolution(fields: Mapping[str, Any], result: Architecture, place: str) -> None:
    if fields.get("groups", 1) != 1 or not fields.get("use_bias", True):
        raise UserError("one of its convolutions has groups or no bias, unlike any supported network")
    size = _pair(fields["kernel_size"])
    padding = "valid" if size == (1, 1) else str(fields.get("padding", "valid"))  # a 1×1 kernel needs no padding
    strides, dilation = _pair(fields.get("strides") or 1), _pair(fields.get("dilation_rate") or 1)
    result.steps.append(f"convolution of {size} to {int(fields['filters'])}, {padding}, strides {strides}, "
                        f"dilation {dilation}")  # fmt: skip
    result.paths.append(place)
    _activation(fields.get("activation"), result)


def _dense(fields: Mapping[str, Any], result: Architecture, place: str) -> None:
    if not fields.get("use_bias", True):
        raise UserError("one of its dense layers has no bias, unlike any supported network")
    result.steps.append(f"dense {int(fields['units'])}")
    result.paths.append(place)
    _activation(fields.get("activation"), result)


def _max_pool(fields: Mapping[str, Any], result: Architecture, place: str) -> None:
    size = _pair(fields["pool_size"])
    strides = _pair(fields.get("strides") or size)
    result.steps.append(f"max pool {size}, strides {strides}, {fields.get('padding', 'valid')}")


def _mean(fields: Mapping[str, Any], result: Architecture, place: str) -> None:
    if fields.get("keepdims"):
        raise UserError("its GlobalAveragePooling2D keeps dimensions, unlike any supported network")
    result.steps.append("mean")


def _flatten(fields: Mapping[str, Any], result: Architecture, place: str) -> None:
    first = (fields.get("data_format") or "channels_last") == "channels_first"
    if first and not result.channels_first:
        raise UserError("its Flatten has channels first, but earlier layers have channels last")
    result.flatten = "CHW" if result.channels_first and not first else "HWC"  # Flatten(channels_first) moves them last


def _input(fields: Mapping[str, Any], result: Architecture, place: str) -> None:
    if fields.get("sparse") or fields.get("ragged"):
        raise UserError("takes sparse or ragged images")
    for name in ("shape", "input_shape"):
        if fields.get(name):
            _input_shape(fields[name], result)


def _relu(fields: Mapping[str, Any], result: Architecture, place: str) -> None:
    changed = any(np.any(fields.get(name) or 0) for name in ("max_value", "negative_slope", "threshold"))
    _activation("another relu" if changed else "relu", result)


def _softmax(fields: Mapping[str, Any], result: Architecture, place: str) -> None:
    if fields.get("axis", -1) not in (-1, 1, [-1], [1]):
        raise UserError("its Softmax is not over the classes")
    _activation("softmax", result)


def _by_channel(value: Any, result: Architecture) -> np.ndarray:
    """Returns a constant as float64 [3], after broadcasting it to an image. Raises: ValueError if pixels differ."""
    shape = (3, 2, 2) if result.channels_first else (2, 2, 3)
    array = np.broadcast_to(np.asarray(value, np.float64), shape)
    array = np.moveaxis(array, 0, -1) if result.channels_first else array
    if not np.isfinite(array).all() or (array != array[0, 0]).any():
        raise ValueError("a scaling that is not per channel")
    return array[0, 0].copy()


def _before_the_layers(result: Architecture) -> None:
    if result.steps or result.normalization:
        raise UserError("one of its scaling layers is not at the input")
    result.scales = True


def _rescaling(fields: Mapping[str, Any], result: Architecture, place: str) -> None:
    _before_the_layers(result)
    scale, offset = (_by_channel(fields.get(name, default), result) for name, default in (("scale", 1), ("offset", 0)))
    result.scale, result.offset = result.scale * scale, result.offset * scale + offset


def _normalization(fields: Mapping[str, Any], result: Architecture, place: str) -> None:
    _before_the_layers(result)
    axis = fields.get("axis", -1)
    axis = axis if isinstance(axis, (list, tuple)) else [axis]
    if fields.get("invert") or any(
        x not in ((1,) if result.channels_first else (-1, 3)) for x in axis if x is not None
    ):
        raise UserError("its Normalization is inverted or not per channel")
    if fields.get("mean") is None:
        result.normalization = True
        return
    mean, variance = (np.asarray(fields[name], np.float64).reshape(-1) for name in ("mean", "variance"))
    normalize(result, mean, variance)


def normalize(result: Architecture, mean: np.ndarray, variance: np.ndarray) -> None:
    """Appends (x - mean) / deviation to the scaling, as Keras' Normalization computes it."""
    deviation = np.maximum(np.sqrt(variance), 1e-7)
    result.scale, result.offset = result.scale / deviation, (result.offset - mean) / deviation
    if result.scale.shape != (3,) or not (np.isfinite(result.scale).all() and np.isfinite(result.offset).all()):
        raise ValueError("a normalization that is not per channel")


READERS: dict[str, Callable[[Mapping[str, Any], Architecture, str], None]] = {
    "Conv2D": _convolution, "Dense": _dense, "MaxPooling2D": _max_pool, "GlobalAveragePooling2D": _mean,
    "Flatten": _flatten, "InputLayer": _input, "Activation": lambda fields, result, _: _activation(
        fields["activation"], result), "ReLU": _relu, "Softmax": _softmax, "Rescaling": _rescaling,
    "Normalization": _normalization,
}  # fmt: skip
