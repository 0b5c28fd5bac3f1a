"""The smallest files: few-bit weights, packed as planes of bits, that onnxruntime widens once while it loads."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.graphs.graph import Graph, Linear
from tasks.graphs.table import quantize_tables
from tasks.progress import Advance
from tasks.quantization.built import LayerDamage
from tasks.quantization.calibrate import Batches, observe
from tasks.quantization.rounding import FewBits, round_weight
from tasks.quantization.sensitivity import WeightProbe, choose_bits, measure_damage

_TABLE_BITS, _TABLE_BLOCK = 4, 128
_LEVELS = range(4, 7)


def squeeze(graph: Graph, target: float, batches: Batches, advance: Advance) -> tuple[LayerDamage, ...]:
    """Store linear layers in 4 to 6 bits, the fewest bytes whose mean cosine on calibration texts is `target`.

    The embedding table takes 4 bits. In place; returns what each layer does and got.
    """
    linears = {linear.node: linear for linear in graph.linears}
    seen = observe(graph, [linear.input for linear in linears.values()], batches, advance, with_products=True)
    rounded = {b: {n: _round(graph, linear, seen, b) for n, linear in linears.items()} for b in _LEVELS}
    probe = WeightProbe(graph, batches)

    def is_enough(bits: Mapping[str, int]) -> bool:
        return probe.cosine({node: rounded[b][node].widen() for node, b in bits.items()}) >= target

    damage = measure_damage(probe, {node: each.widen() for node, each in rounded[_LEVELS[0]].items()})
    sizes = {node: graph.array(linear.weight).size for node, linear in linears.items()}
    bits = choose_bits(damage, sizes, _LEVELS, is_enough)
    for node, linear in linears.items():
        put_packed(graph, linear, rounded[bits[node]][node])
    quantize_tables(graph, _TABLE_BITS, _TABLE_BLOCK)
    graph.drop_unused()
    return tuple(
        LayerDamage(layer=linear.label, damage=damage[node], bits=bits[node]) for node, linear in linears.items()
    )


def pack_planes(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Plane i holds bit i of all values, eight to a byte, first value highest [bits, M, 1]."""
    planes = [np.packbits((values.ravel() >> bit) & 1) for bit in range(bits)]
    return np.stack(planes)[:, :, None]


def put_packed(graph: Graph, linear: Linear, weight: FewBits) -> None:
    """Replace a layer's weight by its planes and the nodes that widen them; constant folding runs those at load."""
    from onnx import helper  # noqa: PLC0415  a cached run need not load it

    rows, columns = weight.values.shape
    prefix, wide = f"{linear.node}_packed", f"{linear.node}_packed_weight"
    powers = 2.0 ** np.arange(weight.bits, dtype=np.float32)[:, None, None]
    steps: list[tuple[str, list[str], dict[str, Any]]] = [
        ("BitShift", [graph.put("bit_places", np.arange(8, dtype=np.uint8))], {"direction": "LEFT"}),
        ("BitShift", [graph.put("bit_last", np.array([7], dtype=np.uint8))], {"direction": "RIGHT"}),
        ("Cast", [], {"to": 1}),
        ("Mul", [graph.put(f"bit_values_{weight.bits}", powers)], {}),
        ("ReduceSum", [graph.put("bit_axis", np.array([0], dtype=np.int64))], {"keepdims": 0}),
        ("Reshape", [_shape(graph, rows * columns + -(rows * columns) % 8)], {}),
        ("Slice", [_shape(graph, 0), _shape(graph, rows * columns)], {}),
        ("Reshape", [_shape(graph, rows // weight.block, weight.block, columns)], {}),
        ("Sub", [graph.put(f"bit_middle_{weight.bits}", np.array(1 << (weight.bits - 1), dtype=np.float32))], {}),
        ("Mul", [f"{prefix}_scale"], {}),
        ("Reshape", [_shape(graph, rows, columns)], {}),
    ]
    scale = graph.put(f"{prefix}_scale_fp16", weight.scales[:, None, :])
    nodes = [helper.make_node("Cast", [scale], [f"{prefix}_scale"], name=f"{prefix}_scale_Cast", to=1)]
    tensor = graph.put(prefix, pack_planes(weight.values, weight.bits))
    for index, (kind, more, attributes) in enumerate(steps):
        output = wide if index == len(steps) - 1 else f"{prefix}_{index}"
        nodes.append(helper.make_node(kind, [tensor, *more], [output], name=f"{prefix}_{index}_{kind}", **attributes))
        tensor = output
    reader = graph.node(linear.node)
    reader.input[1] = wide
    graph.insert(nodes, reader)


def _round(graph: Graph, linear: Linear, seen: Any, bits: int) -> FewBits:
    products = seen[linear.input].products
    assert products is not None, "observed with products"
    return round_weight(graph.array(linear.weight), products, bits)


def _shape(graph: Graph, *sizes: int) -> str:
    return graph.put("shape_" + "_".join(map(str, sizes)), np.array(sizes, dtype=np.int64))
