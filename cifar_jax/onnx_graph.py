"""Translates a traced function into an ONNX graph, with one rule for each JAX primitive that inference uses.

Images are NHWC in JAX and NCHW in ONNX, so each convolution and pool is put between two transpositions. Runtimes remove
those that cancel. jax2onnx translates any JAX program, but version 0.17.1 needs an older Orbax than this package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from cifar_jax.errors import UserError

NOT_INSTALLED = "export needs more packages: pip install 'cifar_jax[export]'"
OPSET, IR_VERSION = 17, 8  # of 2022: read by every runtime in use
TO_NCHW, TO_NHWC, TO_OIHW = (0, 3, 1, 2), (0, 2, 3, 1), (3, 2, 0, 1)
ELEMENTWISE = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max"}


def import_onnx() -> Any:
    """Returns the onnx package. Raises: UserError if it is not installed."""
    try:
        import onnx
    except ImportError as error:
        raise UserError(NOT_INSTALLED) from error
    return onnx


def to_onnx(function: Callable[[jax.Array], jax.Array], dtype: Any, size: Sequence[int]) -> Any:
    """Translates images → logits [N, classes], for any number of images N. Returns: an onnx.ModelProto.

    Args: function: of images [N, *size] of this dtype. The graph's input is 'images', its output 'logits'.
    Raises: UserError if onnx is not installed, or the function uses a primitive without a rule here.
    """
    onnx = import_onnx()
    (count,) = jax.export.symbolic_shape("n")
    program = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((count, *size), dtype))
    graph = _Graph(onnx.helper, onnx.numpy_helper)
    (result,) = graph.run(program, ["images"])
    graph.nodes.append(onnx.helper.make_node("Identity", [graph.name(result)], ["logits"]))
    describe = lambda name, aval: onnx.helper.make_tensor_value_info(
        name, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(aval.dtype)), ["N", *aval.shape[1:]]
    )
    inputs, outputs = [describe("images", program.in_avals[0])], [describe("logits", program.out_avals[0])]
    body = onnx.helper.make_graph(graph.nodes, "network", inputs, outputs, graph.constants)
    opset = onnx.helper.make_opsetid("", OPSET)
    model = onnx.helper.make_model(body, opset_imports=[opset], ir_version=IR_VERSION, producer_name="cifar_jax")
    onnx.checker.check_model(model, full_check=True)
    return model


class _Graph:
    """Nodes and constants so far. A value is a constant, as a numpy array, or the name of a node's result."""

    def __init__(self, helper: Any, numpy_helper: Any) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._helper, self._numpy_helper = helper, numpy_helper
        self._count = 0

    def _new_name(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def name(self, value: Any) -> str:
        """Returns a value's name. A constant becomes one of the graph's."""
        if isinstance(value, str):
            return value
        name = self._new_name()
        self.constants.append(self._numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, kind: str, *inputs: Any, **attributes: Any) -> str:
        """Adds a node. Returns: its result's name."""
        result = self._new_name()
        self.nodes.append(self._helper.make_node(kind, [self.name(value) for value in inputs], [result], **attributes))
        return result

    def run(self, program: ClosedJaxpr, inputs: Sequence[Any]) -> list[Any]:
        """Adds the nodes of a traced program. Returns: the values of its results."""
        jaxpr = program.jaxpr
        values = dict(zip(jaxpr.constvars, map(np.asarray, program.consts))) | dict(zip(jaxpr.invars, inputs))
        read = lambda atom: np.asarray(atom.val) if isinstance(atom, Literal) else values[atom]
        for equation in jaxpr.eqns:
            results = self._translate(equation, [read(atom) for atom in equation.invars])
            values |= dict(zip(equation.outvars, results))
        return [read(atom) for atom in jaxpr.outvars]

    def _translate(self, equation: Any, inputs: list[Any]) -> list[Any]:
        """Adds the nodes of one equation. Returns: the values of its results."""
        name, params, (first, *rest) = equation.primitive.name, equation.params, [*inputs, None]
        shape = equation.outvars[0].aval.shape
        if name in ("jit", "pjit", "closed_call", "custom_jvp_call"):
            return self.run(params.get("jaxpr") or params["call_jaxpr"], inputs)
        if name == "platform_index":
            return [None]
        if name == "cond" and "branches_platforms" in params:  # lax.platform_dependent: the form that is not the CPU's
            return self.run(params["branches"][params["branches_platforms"].index(None)], inputs[1:])
        if name in ELEMENTWISE:
            return [self.add(ELEMENTWISE[name], first, rest[0])]
        if name == "convert_element_type":
            return [self.add("Cast", first, to=self._helper.np_dtype_to_tensor_dtype(np.dtype(params["new_dtype"])))]
        if name == "reshape":
            return [self._reshape(first, shape)]
        if name == "broadcast_in_dim":  # ONNX repeats an axis of size 1 where the value is used
            axes = dict(zip(params["broadcast_dimensions"], equation.invars[0].aval.shape))
            return [self._reshape(first, [axes.get(axis, 1) for axis in range(len(shape))])]
        if name == "dot_general" and params["dimension_numbers"] == (((1,), (0,)), ((), ())):
            return [self.add("MatMul", first, rest[0])]
        if name == "reduce_sum":
            return [self.add("ReduceSum", first, np.asarray(params["axes"], np.int64), keepdims=0)]
        if name == "convolution":
            kernel = self._transpose(rest[0], TO_OIHW)
            return [self._as_nchw("Conv", first, kernel, pads=_pads(params["pads"]))]
        if name == "reduce_window_max":
            sides = {"kernel_shape": params["window_dimensions"][1:3], "strides": params["window_strides"][1:3]}
            return [self._as_nchw("MaxPool", first, pads=_pads(params["padding"][1:3]), **sides)]
        raise UserError(f"this network can't be written as ONNX: there is no rule for JAX's {name}")

    def _as_nchw(self, kind: str, images: Any, *inputs: Any, **attributes: Any) -> Any:
        return self._transpose(self.add(kind, self._transpose(images, TO_NCHW), *inputs, **attributes), TO_NHWC)

    def _transpose(self, value: Any, axes: Sequence[int]) -> Any:
        if isinstance(value, np.ndarray):
            return np.ascontiguousarray(value.transpose(axes))
        return self.add("Transpose", value, perm=axes)

    def _reshape(self, value: Any, shape: Sequence[Any]) -> Any:
        """The only axis of unknown size is that of the images."""
        known = [size if isinstance(size, int) else -1 for size in shape]
        return value.reshape(known) if isinstance(value, np.ndarray) else self.add("Reshape", value, np.array(known))


def _pads(pairs: Sequence[tuple[int, int]]) -> list[int]:
    """ONNX's order: the starts of all axes, then their ends."""
    return [pair[end] for end in (0, 1) for pair in pairs]
