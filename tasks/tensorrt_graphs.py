"""The graphs that TensorRT builds from: strongly typed, so float16 and explicit Q and DQ are in the graph itself."""

from pathlib import Path

from tasks.built import Built, InputRange
from tasks.calibrate import Batches
from tasks.export import ONNX_NAME
from tasks.graph import Graph
from tasks.half import convert_to_fp16
from tasks.onnx_builds import make_qdq
from tasks.progress import Advance


def write_fp16(source: Path, folder: Path, batches: Batches, advance: Advance) -> Built:
    """The encoder in float16."""
    advance(1)
    return _save(Graph.load(source), folder)


def write_int8(source: Path, folder: Path, batches: Batches, advance: Advance) -> Built:
    """INT8 linears, symmetric as TensorRT wants them, in a float16 encoder."""
    graph = Graph.load(source)
    ranges = make_qdq(graph, batches, "int8", advance)
    return _save(graph, folder, ranges)


def write_fp8(source: Path, folder: Path, batches: Batches, advance: Advance) -> Built:
    """E4M3 linears in a float16 encoder."""
    graph = Graph.load(source)
    ranges = make_qdq(graph, batches, "fp8", advance)
    return _save(graph, folder, ranges)


def _save(graph: Graph, folder: Path, ranges: tuple[InputRange, ...] = ()) -> Built:
    convert_to_fp16(graph)
    graph.save(folder / ONNX_NAME)
    return Built(ONNX_NAME, ranges=ranges)
