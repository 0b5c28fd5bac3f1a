"""The exported ONNX graph as quantisation sees it: its linear layers, their weights, and edits to both."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.errors import QuantizationFailed
from tasks.graphs.graph_files import (
    MIN_APART_BYTES,
    Weights,
    attach_weights,
    is_large,
    open_model,
    read_model,
    refer_to,
    write_model,
)

# Ends the name of a product that stays in float whatever is quantised around it.
FLOAT_SUFFIX = "/float"
CONTRIB = "com.microsoft"  # domain of onnxruntime's own operators


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix product with a constant weight [K, N]: the node, the tensor it reads and the weight's name."""

    node: str
    input: str
    weight: str

    @property
    def label(self) -> str:
        """The node's name without its ends, as a person knows the layer: `layer.0/attention/self/query`."""
        parts = [part for part in self.node.split("/") if part not in {"", "encoder", "MatMul"}]
        return "/".join(parts) or self.node


class Graph:
    """An ONNX model in memory, its tensors by name.

    `model` has the nodes; of constants from 1 KiB on it has a reference alone, so that a model of any size is copied
    and handed to onnx's own tools at once.
    """

    def __init__(self, model: Any, weights: Weights) -> None:
        """Wrap `model`, a ModelProto that this object may change, and what it refers to."""
        self._weights = weights
        self.replace(model)

    @classmethod
    def load(cls, path: Path) -> "Graph":
        """Read the graph at `path`. Raises QuantizationFailed for NaN or Inf weights."""
        graph = cls(*read_model(path))
        graph._read_constants_directly()
        graph._check_finite()
        return graph

    @property
    def is_large(self) -> bool:
        """Whether its weights are kept in a file of their own."""
        return is_large(self._weights)

    def copy(self) -> "Graph":
        """A graph of its own with the same content."""
        twin = type(self.model)()
        twin.CopyFrom(self.model)
        return Graph(twin, dict(self._weights))

    def whole(self) -> Any:
        """A ModelProto of its own that holds the weights: for tools that look at them."""
        return attach_weights(self.model, self._weights)

    def save(self, path: Path) -> None:
        """Write the graph, large weights beside it; what no node reads any more is left out."""
        self.drop_unused()
        write_model(self.model, self._weights, path)

    def open(self, options: Any = None) -> Any:
        """An onnxruntime session of the graph on the CPU; unless told otherwise as it is written.

        Fusions would swallow tensors that are asked for, and their arithmetic depends on the processor.
        """
        import onnxruntime as ort  # noqa: PLC0415  a cached run need not load it

        if options is None:
            options = ort.SessionOptions()
            options.log_severity_level = 3
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        return open_model(self.model, self._weights, options)

    def replace(self, model: Any) -> None:
        """Take `model` in place of what was there; it refers to the same weights."""
        self.model = model
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    @property
    def linears(self) -> list[Linear]:
        """Every linear layer that may be quantised, in the order of the graph."""
        return [
            Linear(node.name, node.input[0], node.input[1])
            for node in self.model.graph.node
            if node.op_type == "MatMul" and node.input[1] in self._tensors and not node.name.endswith(FLOAT_SUFFIX)
        ]

    def array(self, name: str) -> NDArray[Any]:
        """The values of a constant tensor."""
        from onnx import numpy_helper  # noqa: PLC0415  a cached run need not load it

        return self._weights[name] if name in self._weights else numpy_helper.to_array(self._tensors[name])

    def put(self, name: str, values: NDArray[Any]) -> str:
        """Store `values` as the constant tensor `name`, in place of what had that name; returns the name."""
        from onnx import numpy_helper  # noqa: PLC0415  a cached run need not load it

        values = np.ascontiguousarray(values)
        if values.nbytes < MIN_APART_BYTES:
            self._weights.pop(name, None)
            tensor = numpy_helper.from_array(values, name)
        else:
            self._weights[name] = values
            tensor = refer_to(name, values)
        if name in self._tensors:
            self._tensors[name].CopyFrom(tensor)
        else:
            self.model.graph.initializer.append(tensor)
            self._tensors[name] = self.model.graph.initializer[-1]
        return name

    def replace_weight(self, linear: Linear, weight: NDArray[Any]) -> None:
        """Give one layer another weight; layers that share the old one keep it."""
        self.node(linear.node).input[1] = self.put(f"{linear.node}_weight", weight.astype(np.float32))

    def is_constant(self, name: str) -> bool:
        """Whether `name` is a constant tensor."""
        return name in self._tensors

    def node(self, name: str) -> Any:
        """The node of that name."""
        return next(node for node in self.model.graph.node if node.name == name)

    def readers(self, tensor: str) -> list[Any]:
        """The nodes that read a tensor."""
        return [node for node in self.model.graph.node if tensor in node.input]

    def producer(self, tensor: str) -> Any | None:
        """The node that makes a tensor, or None for an input or a constant."""
        return next((node for node in self.model.graph.node if tensor in node.output), None)

    def insert(self, nodes: Sequence[Any], neighbour: Any, after: bool = False) -> None:
        """Put `nodes` before (or after) `neighbour`: a graph's nodes are in the order in which they run."""
        place = [node.name for node in self.model.graph.node].index(neighbour.name) + after
        for offset, node in enumerate(nodes):
            self.model.graph.node.insert(place + offset, node)

    def use_contrib(self) -> None:
        """Declare onnxruntime's own operators."""
        from onnx import helper  # noqa: PLC0415  a cached run need not load it

        if all(entry.domain != CONTRIB for entry in self.model.opset_import):
            self.model.opset_import.append(helper.make_opsetid(CONTRIB, 1))

    def drop_unused(self, but: Collection[str] = ()) -> None:
        """Remove constant tensors that no node reads, and those in `but`."""
        read = {name for node in self.model.graph.node for name in node.input}.difference(but)
        kept = [tensor for tensor in self.model.graph.initializer if tensor.name in read]
        if len(kept) < len(self.model.graph.initializer):
            kept = [type(tensor).FromString(tensor.SerializeToString()) for tensor in kept]
            del self.model.graph.initializer[:]
            self.model.graph.initializer.extend(kept)
            self.replace(self.model)
            self._weights = {name: values for name, values in self._weights.items() if name in self._tensors}

    def _read_constants_directly(self) -> None:
        """The exporter stores equal weights once and gives the other layers an Identity of it."""
        nodes = self.model.graph.node
        alias = {n.output[0]: n.input[0] for n in nodes if n.op_type == "Identity" and n.input[0] in self._tensors}
        for node in nodes:
            for place, name in enumerate(node.input):
                node.input[place] = alias.get(name, name)
        for node in [node for node in nodes if node.op_type == "Identity" and node.output[0] in alias]:
            nodes.remove(node)

    def _check_finite(self) -> None:
        for name, tensor in self._tensors.items():
            if tensor.data_type == tensor.FLOAT:
                bad = int(np.count_nonzero(~np.isfinite(self.array(name))))
                if bad:
                    raise QuantizationFailed(
                        f"weight {name} holds {bad} values that are NaN or infinite: fetch or train the model again"
                    )
