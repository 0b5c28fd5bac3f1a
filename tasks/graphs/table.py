"""The embedding table in few bits: more than half of a small model's bytes, and the cheapest to squeeze."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.graphs.graph import CONTRIB, Graph

_MIN_ROWS = 128  # positions and token types are not worth their scales
TOKENS = "input_ids"
_CLIPS = np.linspace(0.7, 1.0, 7)
_SMALLEST = 1e-3  # of a block's largest value, whose scale is then still a normal float16


def quantize_tables(graph: Graph, bits: int, block: int) -> None:
    """Store every embedding table of `graph` in place, each `block` values of a row with a float16 scale of their own.

    The vocabulary takes `bits` (4 or 8), positions 8. onnxruntime looks rows up in the packed table and widens those
    alone (GatherBlockQuantized).
    """
    from onnx import helper  # noqa: PLC0415  a cached run need not load it

    for node in list_tables(graph):
        name, own_bits = node.input[0], bits if node.input[1] == TOKENS else 8
        packed, scale = pack_rows(graph.array(name), own_bits, block)
        inputs = [graph.put(f"{name}_packed", packed), node.input[1], graph.put(f"{name}_scale", scale)]
        attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": block, "bits": own_bits}
        half = f"{node.output[0]}_fp16"
        cast = helper.make_node("Cast", [half], node.output, name=f"{node.name}_Cast", to=1)
        graph.insert([cast], node, after=True)
        node.CopyFrom(
            helper.make_node("GatherBlockQuantized", inputs, [half], name=node.name, domain=CONTRIB, **attributes)
        )
    graph.use_contrib()


def list_tables(graph: Graph) -> list[Any]:
    """The nodes that look up rows of a float table worth packing."""
    found = []
    for node in graph.model.graph.node:
        if node.op_type == "Gather" and graph.is_constant(node.input[0]):
            table = graph.array(node.input[0])
            if table.ndim == 2 and table.dtype == np.float32 and len(table) >= _MIN_ROWS:
                found.append(node)
    return found


def pack_rows(table: NDArray[np.float32], bits: int, block: int) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Integers around 2 ** (bits - 1), two to a byte where they have 4 bits, low half first; and scales [V, K / block].

    Few bits are worth a scale that clips what is largest: of seven, the one with the least error.
    """
    middle = 1 << (bits - 1)
    blocks = np.pad(table, ((0, 0), (0, -table.shape[1] % block))).reshape(len(table), -1, block)
    limit = np.maximum(np.abs(blocks).max(axis=2), _SMALLEST)
    best, least = np.zeros(limit.shape, dtype=np.float16), np.full(limit.shape, np.inf, dtype=np.float32)
    for clip in _CLIPS if bits < 8 else (1.0,):
        scale = (limit * clip / (middle - 0.5)).astype(np.float16)
        restored = _round_blocks(blocks, scale, middle) * scale[:, :, None].astype(np.float32)
        error = ((restored - blocks) ** 2).sum(axis=2)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    values = (_round_blocks(blocks, best, middle) + middle).astype(np.uint8).reshape(len(table), -1)
    values = values[:, : table.shape[1]]
    if bits == 4:
        values = (values[:, ::2] | (values[:, 1::2] << 4)).astype(np.uint8)
    return values, best


def _round_blocks(blocks: NDArray[np.float32], scale: NDArray[np.float16], middle: int) -> NDArray[np.float32]:
    steps = np.rint(blocks / scale[:, :, None].astype(np.float32))
    return np.clip(steps, -middle, middle - 1)
