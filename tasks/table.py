"""The embedding table in few bits: more than half of a small model's bytes, and the cheapest to squeeze."""

import numpy as np
from numpy.typing import NDArray

from tasks.graph import CONTRIB, Graph

_MIN_ROWS = 128  # positions and token types are not worth their scales
_SMALLEST_SCALE = float(np.finfo(np.float16).tiny)


def quantize_tables(graph: Graph, bits: int, block: int) -> None:
    """Store every embedding table of `graph` in `bits` (4 or 8), each `block` values of a row with their own scale.

    onnxruntime looks rows up in the packed table and widens those alone (GatherBlockQuantized). In place.
    """
    from onnx import helper  # noqa: PLC0415  a cached run need not load it

    for node in list(graph.model.graph.node):
        if node.op_type == "Gather" and graph.is_constant(node.input[0]):
            table = graph.array(node.input[0])
            if table.ndim == 2 and table.dtype == np.float32 and len(table) >= _MIN_ROWS:
                packed, scale = pack_rows(table, bits, block)
                name = node.input[0]
                inputs = [graph.put(f"{name}_packed", packed), node.input[1], graph.put(f"{name}_scale", scale)]
                attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": block, "bits": bits}
                node.CopyFrom(
                    helper.make_node(
                        "GatherBlockQuantized", inputs, node.output, name=node.name, domain=CONTRIB, **attributes
                    )
                )
    graph.use_contrib()


def pack_rows(table: NDArray[np.float32], bits: int, block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Symmetric integers around 2 ** (bits - 1), two to a byte where they have 4 bits, low half first; and scales."""
    middle = 1 << (bits - 1)
    blocks = np.pad(table, ((0, 0), (0, -table.shape[1] % block))).reshape(len(table), -1, block)
    scale = np.maximum(np.abs(blocks).max(axis=2) / (middle - 1), _SMALLEST_SCALE)
    values = (np.rint(blocks / scale[:, :, None]) + middle).astype(np.uint8).reshape(len(table), -1)
    values = values[:, : table.shape[1]]
    if bits == 4:
        values = values[:, ::2] | (values[:, 1::2] << 4)
    return values, np.asarray(scale, dtype=np.float32)
