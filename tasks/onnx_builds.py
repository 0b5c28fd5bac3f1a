"""Variants that onnxruntime runs: the graph as exported, INT8 dynamic and static, and E4M3."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.calibrate import Batches, choose_range, observe
from tasks.export import ONNX_NAME
from tasks.graph import FLOAT_SUFFIX, Graph
from tasks.outliers import tame_outliers
from tasks.progress import Advance
from tasks.qdq import Format, insert_qdq
from tasks.table import quantize_tables

_TABLE_BITS, _TABLE_BLOCK = 8, 128  # cosine 0.99999: the table costs nothing at 8 bits


def keep_fp32(source: Path, folder: Path, batches: Batches, advance: Advance) -> str:
    """The exported graph itself."""
    (folder / ONNX_NAME).write_bytes(source.read_bytes())
    advance(1)
    return ONNX_NAME


def quantize_dynamic(source: Path, folder: Path, batches: Batches, advance: Advance) -> str:
    """Linears in INT8, per channel; inputs get the range of each run, after their outliers were tamed."""
    from onnxruntime.quantization import QuantType  # noqa: PLC0415  a cached run need not load it
    from onnxruntime.quantization import quantize_dynamic as quantize  # noqa: PLC0415

    graph = tame(Graph.load(source), batches, advance)
    with _root_logger_silent():
        quantize(
            graph.model,
            folder / ONNX_NAME,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=[node.name for node in graph.model.graph.node if node.name.endswith(FLOAT_SUFFIX)],
        )
    graph = Graph.load(folder / ONNX_NAME)
    quantize_tables(graph, _TABLE_BITS, _TABLE_BLOCK)
    graph.save(folder / ONNX_NAME)
    return ONNX_NAME


def quantize_static(source: Path, folder: Path, batches: Batches, advance: Advance) -> str:
    """QDQ with MinMax ranges: int8 weights per channel, uint8 inputs, after their outliers were tamed."""
    graph = make_qdq(Graph.load(source), batches, "uint8", advance)
    quantize_tables(graph, _TABLE_BITS, _TABLE_BLOCK)
    graph.save(folder / ONNX_NAME)
    return ONNX_NAME


def quantize_fp8(source: Path, folder: Path, batches: Batches, advance: Advance) -> str:
    """QDQ in E4M3 with max calibration: what a GPU computes, in exact arithmetic here."""
    make_qdq(Graph.load(source), batches, "fp8", advance).save(folder / ONNX_NAME)
    return ONNX_NAME


def make_qdq(graph: Graph, batches: Batches, kind: Format, advance: Advance) -> Graph:
    """Quantise every linear layer of `graph` explicitly over the range its inputs had in the calibration batches.

    Outliers are tamed first for integers; E4M3 has the range for them.
    """
    if kind != "fp8":
        tame(graph, batches, lambda steps: None)
    seen = observe(graph, [linear.input for linear in graph.linears], batches, advance)
    insert_qdq(graph, {name: choose_range(found, "minmax") for name, found in seen.items()}, kind)
    return graph


def tame(graph: Graph, batches: Batches, advance: Advance) -> Graph:
    """Tame the outliers that the calibration batches show, in place."""
    tame_outliers(graph, observe(graph, [linear.input for linear in graph.linears], batches, advance))
    return graph


@contextmanager
def _root_logger_silent() -> Iterator[None]:
    """Drop what onnxruntime's quantiser logs on the root logger: advice to do what was just done."""

    def refuse(record: logging.LogRecord) -> bool:
        return False

    logging.getLogger().addFilter(refuse)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(refuse)
