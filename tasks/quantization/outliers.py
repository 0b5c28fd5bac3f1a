"""Outliers of activations, tamed before INT8: moved into the weights (SmoothQuant), or computed apart in float."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.graphs.graph import FLOAT_SUFFIX, Graph, Linear
from tasks.quantization.calibrate import Activations

# SmoothQuant's alpha, and channels computed apart: docs/log.md has what other values gave.
_ALPHA = 0.7
_NUM_APART = 8
_LAYOUT_OPS = frozenset({"Reshape", "Transpose"})
_Values = NDArray[np.float32]


def tame_outliers(graph: Graph, seen: Mapping[str, Activations]) -> None:
    """Rewrite the inputs of linear layers in place so that one scale fits them all; the graph computes what it did.

    What LayerNorm gives is smoothed by a product of its own: in a post-norm BERT it also feeds a residual, which must
    stay as it was. What attention gives is smoothed inside the value projection, at no cost. What an activation
    function gives has few channels ten times as large as the rest: they take a small product in float.
    """
    groups: dict[str, list[Linear]] = {}
    for linear in graph.linears:
        groups.setdefault(linear.input, []).append(linear)
    for tensor, linears in groups.items():
        channel_max = seen[tensor].channel_max
        value = _value_projection(graph, tensor)
        producer = graph.producer(tensor)
        if value is not None:
            _divide_outputs(graph, value, _move_into_weights(graph, linears, channel_max))
        elif producer is not None and producer.op_type == "LayerNormalization":
            _divide_tensor(graph, tensor, linears, _move_into_weights(graph, linears, channel_max))
        else:
            for linear in linears:
                _compute_apart(graph, linear, channel_max)
    graph.drop_unused()


def _move_into_weights(graph: Graph, linears: list[Linear], channel_max: _Values) -> _Values:
    """Multiply the weights' rows by scales [K] and return these: large where inputs are large and weights small."""
    weights = [graph.array(linear.weight) for linear in linears]
    weight_max = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
    # A channel that is 0 on one side has nothing to move.
    quiet = (channel_max <= 0) | (weight_max <= 0)
    scales = np.where(quiet, 1.0, channel_max) ** _ALPHA / np.where(quiet, 1.0, weight_max) ** (1 - _ALPHA)
    scales = (scales / np.exp(np.log(scales).mean())).astype(np.float32)
    for linear, weight in zip(linears, weights, strict=True):
        graph.replace_weight(linear, weight * scales[:, None])
    return np.asarray(scales)


def _value_projection(graph: Graph, tensor: str) -> tuple[Linear, Any] | None:
    """The linear layer and the node that adds its bias where `tensor` is attention's output, its channels in order."""
    node = _skip_layout(graph, tensor)
    if node is None or node.op_type != "MatMul":
        return None
    bias = _skip_layout(graph, node.input[1])
    if bias is None or bias.op_type != "Add":
        return None
    linears = {linear.node: linear for linear in graph.linears}
    for name in bias.input:
        product = graph.producer(name)
        if product is not None and product.name in linears:
            return linears[product.name], bias
    return None


def _skip_layout(graph: Graph, tensor: str) -> Any | None:
    node = graph.producer(tensor)
    while node is not None and node.op_type in _LAYOUT_OPS:
        node = graph.producer(node.input[0])
    return node


def _divide_outputs(graph: Graph, value: tuple[Linear, Any], scales: _Values) -> None:
    linear, bias = value
    graph.replace_weight(linear, graph.array(linear.weight) / scales[None, :])
    place = next(index for index, name in enumerate(bias.input) if graph.is_constant(name))
    bias.input[place] = graph.put(f"{bias.input[place]}_smoothed", graph.array(bias.input[place]) / scales)


def _divide_tensor(graph: Graph, tensor: str, linears: list[Linear], scales: _Values) -> None:
    from onnx import helper  # noqa: PLC0415  a cached run need not load it

    name = f"{tensor}_smoothed"
    factor = graph.put(f"{tensor}_smoothing", 1 / scales)
    readers = [graph.node(linear.node) for linear in linears]
    graph.insert([helper.make_node("Mul", [tensor, factor], [name], name=f"{name}_Mul")], readers[0])
    for reader in readers:
        reader.input[0] = name


def _compute_apart(graph: Graph, linear: Linear, channel_max: _Values) -> None:
    """Set the largest channels to 0 in the layer's input, and add what they give by a product in float."""
    from onnx import helper  # noqa: PLC0415  a cached run need not load it

    few = np.sort(np.argsort(-channel_max, kind="stable")[:_NUM_APART])
    kept = np.ones_like(channel_max)
    kept[few] = 0
    tensor, prefix, weight = linear.input, linear.node, graph.array(linear.weight)
    node = graph.node(linear.node)
    output = node.output[0]
    graph.replace_weight(linear, weight * kept[:, None])
    factor, places = graph.put(f"{prefix}_kept", kept), graph.put(f"{prefix}_few", few.astype(np.int64))
    rows = graph.put(f"{prefix}_few_weight", weight[few])
    node.input[0], node.output[0] = f"{prefix}_rest", f"{output}_rest"
    before = [
        helper.make_node("Mul", [tensor, factor], [f"{prefix}_rest"], name=f"{prefix}_rest_Mul"),
        helper.make_node("Gather", [tensor, places], [f"{prefix}_few_input"], name=f"{prefix}_few_Gather", axis=-1),
        helper.make_node("MatMul", [f"{prefix}_few_input", rows], [f"{output}_few"], name=f"{prefix}{FLOAT_SUFFIX}"),
    ]
    graph.insert(before, node)
    join = helper.make_node("Add", [f"{output}_rest", f"{output}_few"], [output], name=f"{prefix}_join")
    graph.insert([join], node, after=True)
