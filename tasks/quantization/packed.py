"""Graph nodes that widen what was packed on a trellis: linear layers once at load, rows of a table as they are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.graphs.graph import Graph, Linear
from tasks.quantization.rounding import FewBits
from tasks.quantization.trellis import States, codebook, pack_states, window_kernel

_FLOAT, _INT32 = 1, 6  # of ONNX's types


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a table from `first` on, in order: states [V, K] of `bits` bits each."""

    first: int
    states: States
    bits: int


@dataclass(frozen=True, slots=True)
class FewBitTable:
    """A table: its rows in parts, the scale of each [V, 1], and for some rows what is added: `steps` int8 [F, K].

    A step of row `often[i]` is worth `step_sizes[i]` [F, 1].
    """

    parts: Sequence[Rows]
    scales: NDArray[np.float16]
    often: NDArray[np.int64]
    steps: NDArray[np.int8]
    step_sizes: NDArray[np.float16]


class _Chain:
    """Nodes in a row. Their names are short: hundreds of them are in the file."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.nodes = graph, list[Any]()
        self.prefix = f"packed_{len(graph.model.graph.node)}"  # which grows with every chain

    def add(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """A node of `kind`; returns its output."""
        from onnx import helper  # noqa: PLC0415  a cached run need not load it

        name = f"{self.prefix}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output or name], name=name, **attributes))
        return output or name

    def put(self, name: str, values: Any, dtype: Any = np.int64) -> str:
        """A constant that chains share."""
        return self.graph.put(name, np.asarray(values, dtype=dtype))

    def own(self, name: str, values: NDArray[Any]) -> str:
        """A constant of this chain; float16 is widened."""
        tensor = self.graph.put(f"{self.prefix}_{name}", values)
        return self.add("Cast", tensor, to=_FLOAT) if values.dtype == np.float16 else tensor

    def sizes(self, *sizes: int) -> str:
        """A constant shape."""
        return self.put("sizes_" + "_".join(map(str, sizes)), sizes)

    def widen(self, packed: str, bits: int, length: int) -> str:
        """Planes [..., bits, L / 8, 1] to the values that their states stand for [R, 1, L], the first `length`."""
        kernel = window_kernel(bits)
        # Not BitShift: OpenVINO divides for it, and rounds.
        shifts = self.put("bit_shifts", 0.5 ** np.arange(7, -1, -1), np.float32)
        planes = self.add("Floor", self.add("Mul", self.add("Cast", packed, to=_FLOAT), shifts))
        planes = self.add("Mod", planes, self.put("bit_base", 2, np.float32), fmod=1)
        planes = self.add("Reshape", planes, self.sizes(-1, bits, length + -length % 8))
        states = self.add("Conv", planes, self.put(f"window_{bits}", kernel, np.float32), pads=[kernel.shape[2] - 1, 0])
        if length % 8:
            states = self.add("Slice", states, self.sizes(0), self.sizes(length), self.sizes(2))
        states = self.add("Cast", states, to=_INT32)
        return self.add("Gather", self.put(f"codebook_{bits}", codebook(bits), np.float32), states)


def put_packed(graph: Graph, linear: Linear, weight: FewBits) -> None:
    """Replace a layer's weight by its planes and the nodes that widen them; constant folding runs those at load."""
    rows, columns, runs = len(weight.factors), len(weight.scales), len(weight.states)
    chain = _Chain(graph)
    planes = chain.own("planes", pack_states(weight.states, weight.bits)[..., None])
    values = chain.widen(planes, weight.bits, weight.states.shape[1])
    values = chain.add("Reshape", values, chain.sizes(runs, rows, columns // runs))
    values = chain.add("Transpose", values, perm=[1, 0, 2])
    values = chain.add("Reshape", values, chain.sizes(rows, columns))
    values = chain.add("Mul", values, chain.own("factors", weight.factors[:, None]))
    values = chain.add("Mul", values, chain.own("scales", weight.scales))
    if len(weight.places):
        flat = chain.add("Reshape", values, chain.sizes(-1))
        exact = chain.own("exact", weight.exact)
        flat = chain.add("ScatterElements", flat, chain.own("places", weight.places), exact, axis=0)
        values = chain.add("Reshape", flat, chain.sizes(rows, columns))
    reader = graph.node(linear.node)
    reader.input[1] = values
    graph.insert(chain.nodes, reader)


def put_table(graph: Graph, lookup: Any, table: FewBitTable) -> None:
    """Replace `lookup`, a Gather of rows by ids, by the nodes that widen the rows it would give."""
    ids, width = lookup.input[1], table.parts[0].states.shape[1]
    chain = _Chain(graph)
    shape = chain.add("Concat", chain.add("Shape", ids), chain.sizes(width), axis=0)
    places = chain.add("Unsqueeze", ids, chain.sizes(-1))
    values = ""
    for part in table.parts:
        rows = chain.own(f"rows_{part.first}", pack_states(part.states, part.bits)[..., None])
        last = chain.put(f"id_{len(part.states) - 1}", len(part.states) - 1)
        first = chain.put(f"id_{part.first}", part.first)
        own = chain.add("Clip", chain.add("Sub", ids, first), chain.put("id_0", 0), last)
        wide = chain.add("Reshape", chain.widen(chain.add("Gather", rows, own), part.bits, width), shape)
        values = chain.add("Where", chain.add("Less", places, first), values, wide) if values else wide
    scales = chain.graph.put(f"{chain.prefix}_scales", table.scales)
    values = chain.add("Mul", values, chain.add("Cast", chain.add("Gather", scales, ids), to=_FLOAT))
    is_often = chain.add("Cast", chain.add("Equal", places, chain.own("often", table.often)), to=_FLOAT)
    steps = chain.add("Cast", chain.own("steps", table.steps), to=_FLOAT)
    steps = chain.add("Mul", steps, chain.own("step_sizes", table.step_sizes))
    chain.add("Add", values, chain.add("MatMul", is_often, steps), output=lookup.output[0])
    graph.insert(chain.nodes, lookup)
    graph.model.graph.node.remove(lookup)
