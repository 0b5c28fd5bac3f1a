"""QDQ graphs: explicit quantisation that TensorRT builds from and onnxruntime fuses, with small weights on disk."""

from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tasks.graphs.graph import Graph, Linear

Format = Literal["uint8", "int8", "fp8"]
Range = tuple[float, float]

# From here on Q and DQ know float8 and float16 scales.
_OPSET_FP8 = 19
_FP8_MAX = 448.0
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


def insert_qdq(graph: Graph, ranges: Mapping[str, Range], activations: Format, skip: Collection[str] = ()) -> None:
    """Quantise the linear layers of `graph` in place, but those whose node is in `skip`.

    Weights are stored quantised, with a DequantizeLinear behind them: int8 symmetric for each output channel, or
    E4M3 with one scale. Inputs pass QuantizeLinear and DequantizeLinear: uint8 with a zero point (onnxruntime),
    int8 symmetric (TensorRT takes no other) or E4M3.
    """
    if activations == "fp8":
        raise_opset(graph, _OPSET_FP8)
    rounded: dict[str, str] = {}
    for linear in graph.linears:
        if linear.node in skip:
            continue
        node = graph.node(linear.node)
        if linear.input not in rounded:
            scale, zero = _put_activation_scale(graph, linear.input, ranges[linear.input], activations)
            rounded[linear.input] = _round_trip(graph, linear.input, scale, zero, node)
        node.input[0] = rounded[linear.input]
        node.input[1] = _dequantized_weight(graph, linear, activations, node)
    graph.drop_unused()


def raise_opset(graph: Graph, version: int) -> None:
    """Convert the graph in place to a later version of the ONNX operators."""
    from onnx import version_converter  # noqa: PLC0415  a cached run need not load it

    if graph.model.opset_import[0].version < version:
        graph.replace(version_converter.convert_version(graph.model, version))


def quantize_weight(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 [K, N] and the scale of each output channel [N]."""
    scale = np.maximum(np.abs(weight).max(axis=0) / 127, _SMALLEST_SCALE).astype(np.float32)
    return np.clip(np.rint(weight / scale), -127, 127).astype(np.int8), scale


def _put_activation_scale(graph: Graph, tensor: str, limits: Range, kind: Format) -> tuple[str, str]:
    """Store scale and zero point of a tensor; returns their names."""
    low, high = limits
    names = f"{tensor}_scale", f"{tensor}_zero_point"
    if kind == "uint8":
        scale = max((high - low) / 255, _SMALLEST_SCALE)
        zero = np.array(np.clip(np.rint(-low / scale), 0, 255), dtype=np.uint8)
    else:
        scale = max(max(-low, high) / (127 if kind == "int8" else _FP8_MAX), _SMALLEST_SCALE)
        zero = np.array(0, dtype=np.int8 if kind == "int8" else _float8())
    return graph.put(names[0], np.array(scale, dtype=np.float32)), graph.put(names[1], zero)


def _round_trip(graph: Graph, tensor: str, scale: str, zero: str, reader: Any) -> str:
    """Q and DQ of a tensor, before `reader`; returns the name of what comes out."""
    from onnx import helper  # noqa: PLC0415  a cached run need not load it

    narrow, wide = f"{tensor}_quantized", f"{tensor}_dequantized"
    graph.insert(
        [
            helper.make_node("QuantizeLinear", [tensor, scale, zero], [narrow], name=f"{tensor}_QuantizeLinear"),
            helper.make_node("DequantizeLinear", [narrow, scale, zero], [wide], name=f"{tensor}_DequantizeLinear"),
        ],
        reader,
    )
    return wide


def _dequantized_weight(graph: Graph, linear: Linear, kind: Format, reader: Any) -> str:
    """Store the quantised weight and its DQ, before `reader`; returns the name of what comes out."""
    from onnx import helper  # noqa: PLC0415  a cached run need not load it

    weight = graph.array(linear.weight)
    narrow: NDArray[Any]
    if kind == "fp8":
        scale = np.array(max(np.abs(weight).max() / _FP8_MAX, _SMALLEST_SCALE), dtype=np.float32)
        narrow, axis = (weight / scale).astype(_float8()), {}
    else:
        narrow, scale = quantize_weight(weight)
        axis = {"axis": 1}
    zero = np.zeros(scale.shape, dtype=narrow.dtype)
    prefix = f"{linear.node}_weight"
    inputs = [
        graph.put(f"{prefix}_quantized", narrow),
        graph.put(f"{prefix}_scale", scale),
        graph.put(f"{prefix}_zero_point", zero),
    ]
    wide = f"{prefix}_dequantized"
    graph.insert(
        [helper.make_node("DequantizeLinear", inputs, [wide], name=f"{prefix}_DequantizeLinear", **axis)], reader
    )
    return wide


def _float8() -> Any:
    import ml_dtypes  # noqa: PLC0415  a cached run need not load it

    return ml_dtypes.float8_e4m3fn
