"""float16 graphs, for engines that take their types from the graph: TensorRT 11 knows no other way to fp16."""

from typing import Any

import numpy as np

from tasks.graphs.graph import Graph
from tasks.graphs.qdq import raise_opset

_OPSET = 19  # the first whose Q and DQ take float16 scales
_ENCODER = "/encoder/"
_LARGEST, _SMALLEST = 65504.0, 6e-8  # of float16: masks of -3.4e38 and epsilons of 1e-12 are brought inside


def convert_to_fp16(graph: Graph) -> None:
    """Turn weights and arithmetic of the encoder to float16 in place; pooling and normalisation stay float32.

    A sum over 512 tokens and the square of a norm are where float16 would lose digits. Inputs and outputs keep types.
    """
    raise_opset(graph, _OPSET)
    floats = _float_tensors(graph)
    casts: dict[tuple[str, bool], str] = {}
    made = {output: node for node in graph.model.graph.node for output in node.output}
    for node in list(graph.model.graph.node):
        inside = node.name.startswith(_ENCODER)
        if inside:
            _convert_attributes(node)
        for place, tensor in enumerate(node.input):
            if graph.is_constant(tensor) and inside and graph.array(tensor).dtype == np.float32:
                node.input[place] = graph.put(f"{tensor}_fp16", _narrow(graph.array(tensor)))
            elif tensor in floats and tensor in made and made[tensor].name.startswith(_ENCODER) != inside:
                node.input[place] = _cast(graph, casts, tensor, inside, node)
    del graph.model.graph.value_info[:]
    graph.drop_unused()


def _float_tensors(graph: Graph) -> set[str]:
    """Names of the float32 tensors that nodes make."""
    import onnx  # noqa: PLC0415  a cached run need not load it

    typed = onnx.shape_inference.infer_shapes(graph.model)
    return {v.name for v in typed.graph.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}


def _convert_attributes(node: Any) -> None:
    """float32 constants and casts of a node become float16; epsilons of LayerNormalization are no tensors and stay."""
    from onnx import TensorProto, numpy_helper  # noqa: PLC0415  a cached run need not load it

    for attribute in node.attribute:
        if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
        elif attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(numpy_helper.from_array(_narrow(numpy_helper.to_array(attribute.t))))


def _cast(graph: Graph, casts: dict[tuple[str, bool], str], tensor: str, to_half: bool, reader: Any) -> str:
    """The tensor in the other type; cast once, before its first reader."""
    from onnx import TensorProto, helper  # noqa: PLC0415  a cached run need not load it

    if (tensor, to_half) not in casts:
        name = f"{tensor}_{'fp16' if to_half else 'fp32'}"
        kind = TensorProto.FLOAT16 if to_half else TensorProto.FLOAT
        graph.insert([helper.make_node("Cast", [tensor], [name], name=f"{name}_Cast", to=kind)], reader)
        casts[tensor, to_half] = name
    return casts[tensor, to_half]


def _narrow(values: Any) -> Any:
    """float16 of float32 values: what is too large is cut, what would become 0 is the smallest there is."""
    kept = np.where((values != 0) & (np.abs(values) < _SMALLEST), np.copysign(_SMALLEST, values), values)
    return np.clip(kept, -_LARGEST, _LARGEST).astype(np.float16)
