"""The graphs that TensorRT builds from: strongly typed, so float16 and explicit Q and DQ are in the graph itself."""

from pathlib import Path

from tasks.export import ONNX_NAME
from tasks.graphs.graph import Graph
from tasks.graphs.half import convert_to_fp16
from tasks.progress import Advance
from tasks.quantization.built import Built
from tasks.quantization.calibrate import Batches
from tasks.quantization.onnx_builds import make_qdq
from tasks.settings import QdqConfig


def write_fp16(source: Path, folder: Path, batches: Batches, advance: Advance) -> Built:
    """The encoder in float16; onnxruntime on a CPU widens its weights and computes in float32."""
    advance(1)
    _save(Graph.load(source), folder)
    return Built(ONNX_NAME)


def write_int8(source: Path, folder: Path, batches: Batches, advance: Advance, qdq: QdqConfig) -> Built:
    """INT8 linears, symmetric as TensorRT wants them, in a float16 encoder."""
    graph = Graph.load(source)
    built = make_qdq(graph, batches, "int8", advance, qdq)
    _save(graph, folder)
    return built


def write_fp8(source: Path, folder: Path, batches: Batches, advance: Advance, qdq: QdqConfig) -> Built:
    """E4M3 linears in a float16 encoder."""
    graph = Graph.load(source)
    built = make_qdq(graph, batches, "fp8", advance, qdq)
    _save(graph, folder)
    return built


def _save(graph: Graph, folder: Path) -> None:
    convert_to_fp16(graph)
    graph.save(folder / ONNX_NAME)
