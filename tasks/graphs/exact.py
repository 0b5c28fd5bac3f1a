"""The exact twin of a graph with integer products: its arithmetic, not what a processor's int8 kernels make of it."""

from pathlib import Path
from typing import Any

import numpy as np

from tasks.graphs.graph import Graph


def write_exact_twin(source: Path, target: Path) -> None:
    """Write the graph at `source` to `target` with its integer products (MatMulInteger) in float32.

    Inputs are rounded as before, by the range of each run; what float32 multiplies and adds are the same integers,
    which is exact to 1e-7. Kernels of processors without VNNI add them up in 16 bits and saturate.
    """
    graph = Graph.load(source)
    widened: dict[str, str] = {}
    for node in [node for node in graph.model.graph.node if node.op_type == "MatMulInteger"]:
        tensor, weight, zero, weight_zero = node.input
        if tensor not in widened:
            widened[tensor] = _widen(graph, tensor, zero, node)
        values = graph.array(weight).astype(np.float32) - graph.array(weight_zero).astype(np.float32)
        node.input[:] = [widened[tensor], graph.put(f"{weight}_float", values)]
        node.op_type = "MatMul"
    del graph.model.graph.value_info[:]
    graph.save(target)


def _widen(graph: Graph, tensor: str, zero: str, reader: Any) -> str:
    """A tensor of integers without its zero point as float32, before `reader`; returns the name of what comes out."""
    from onnx import TensorProto, helper  # noqa: PLC0415  a cached run need not load it

    names = f"{tensor}_float", f"{zero}_float"
    casts = [
        helper.make_node("Cast", [narrow], [wide], name=f"{wide}_Cast", to=TensorProto.FLOAT)
        for narrow, wide in zip((tensor, zero), names, strict=True)
    ]
    centred = f"{tensor}_centred"
    graph.insert([*casts, helper.make_node("Sub", list(names), [centred], name=f"{centred}_Sub")], reader)
    return centred
