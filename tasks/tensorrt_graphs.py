"""The graphs that TensorRT builds from: strongly typed, so float16 and explicit Q and DQ are in the graph itself."""

from pathlib import Path

from tasks.calibrate import Batches
from tasks.export import ONNX_NAME
from tasks.graph import Graph
from tasks.half import convert_to_fp16
from tasks.onnx_builds import make_qdq
from tasks.progress import Advance


def write_fp16(source: Path, folder: Path, batches: Batches, advance: Advance) -> str:
    """The encoder in float16."""
    advance(1)
    return _save(Graph.load(source), folder)


def write_int8(source: Path, folder: Path, batches: Batches, advance: Advance) -> str:
    """INT8 linears, symmetric as TensorRT wants them, in a float16 encoder."""
    return _save(make_qdq(Graph.load(source), batches, "int8", advance), folder)


def write_fp8(source: Path, folder: Path, batches: Batches, advance: Advance) -> str:
    """E4M3 linears in a float16 encoder."""
    return _save(make_qdq(Graph.load(source), batches, "fp8", advance), folder)


def _save(graph: Graph, folder: Path) -> str:
    convert_to_fp16(graph)
    graph.save(folder / ONNX_NAME)
    return ONNX_NAME
