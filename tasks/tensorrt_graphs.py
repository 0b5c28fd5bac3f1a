"""The graphs that TensorRT builds from: strongly typed, so float16 and explicit Q and DQ are in the graph itself."""

from pathlib import Path

from tasks.calibrate import Batches, observe
from tasks.export import ONNX_NAME
from tasks.graph import Graph, Linear
from tasks.half import convert_to_fp16
from tasks.progress import Advance
from tasks.qdq import Format, insert_qdq


def write_fp16(source: Path, folder: Path, batches: Batches, advance: Advance) -> str:
    """The encoder in float16."""
    graph = Graph.load(source)
    advance(1)
    return _save(graph, folder)


def write_int8(source: Path, folder: Path, batches: Batches, advance: Advance) -> str:
    """INT8 linears in a float16 encoder; what GELU feeds stays float16, as its symmetric range wastes half of INT8."""
    graph = Graph.load(source)
    _quantize(graph, "int8", batches, advance, {linear.node for linear in graph.linears if _is_ffn_down(linear)})
    return _save(graph, folder)


def write_fp8(source: Path, folder: Path, batches: Batches, advance: Advance) -> str:
    """E4M3 linears in a float16 encoder, ranges by the largest value seen."""
    graph = Graph.load(source)
    _quantize(graph, "fp8", batches, advance, set())
    return _save(graph, folder)


def _quantize(graph: Graph, kind: Format, batches: Batches, advance: Advance, skip: set[str]) -> None:
    seen = observe(graph, [linear.input for linear in graph.linears], batches, advance)
    insert_qdq(graph, {name: (found.low, found.high) for name, found in seen.items()}, kind, skip)


def _is_ffn_down(linear: Linear) -> bool:
    return linear.label.endswith("/output/dense") and not linear.label.endswith("/attention/output/dense")


def _save(graph: Graph, folder: Path) -> str:
    convert_to_fp16(graph)
    graph.save(folder / ONNX_NAME)
    return ONNX_NAME
