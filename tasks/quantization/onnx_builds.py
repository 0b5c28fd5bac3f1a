"""Variants that onnxruntime runs: the graph as exported, INT8 dynamic and static, and E4M3."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from serving.tokenizer import Ids
from tasks.export import ONNX_NAME
from tasks.graphs.graph import FLOAT_SUFFIX, Graph
from tasks.graphs.graph_files import copy_model_files
from tasks.graphs.qdq import Format, insert_qdq
from tasks.graphs.table import quantize_tables
from tasks.progress import Advance
from tasks.quantization.built import Built, InputRange, Ranking
from tasks.quantization.calibrate import Batches, choose_range, observe
from tasks.quantization.few_bit_table import Split
from tasks.quantization.outliers import tame_outliers
from tasks.quantization.sensitivity import QdqProbe, rank_layers
from tasks.quantization.squeeze import squeeze
from tasks.settings import QdqConfig

# What linear layers are expected to cost of the mean cosine; the table costs as much again, or more.
_GATE_BUDGET, _CAUTION_BUDGET = 0.002, 0.007
_GATE_TABLE: Split = ((0.4, 4), (1.0, 3))
_CAUTION_TABLE: Split = ((0.4, 3), (1.0, 2))
_TABLE_BITS, _TABLE_BLOCK = 8, 128  # cosine 0.99999: the table costs nothing at 8 bits

# Seconds for the linears of a small model, 10 M weights of MiniLM; minutes for those of a large one.
_MAX_DRAWN_WEIGHTS = 25_000_000


def keep_fp32(source: Path, folder: Path, batches: Batches, advance: Advance) -> Built:
    """The exported graph itself."""
    copy_model_files(source, folder)
    advance(1)
    return Built(ONNX_NAME)


def quantize_dynamic(source: Path, folder: Path, batches: Batches, advance: Advance) -> Built:
    """Linears in INT8, per channel; inputs get the range of each run, after their outliers were tamed."""
    from onnxruntime.quantization import QuantType  # noqa: PLC0415  a cached run need not load it
    from onnxruntime.quantization import quantize_dynamic as quantize  # noqa: PLC0415

    graph = tame(Graph.load(source), batches, advance)
    with _root_logger_silent():
        quantize(
            graph.whole(),
            folder / ONNX_NAME,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["MatMul"],
            use_external_data_format=graph.is_large,
            nodes_to_exclude=[node.name for node in graph.model.graph.node if node.name.endswith(FLOAT_SUFFIX)],
        )
    graph = Graph.load(folder / ONNX_NAME)
    quantize_tables(graph, _TABLE_BITS, _TABLE_BLOCK)
    graph.save(folder / ONNX_NAME)
    return Built(ONNX_NAME)


def quantize_static(source: Path, folder: Path, batches: Batches, advance: Advance, qdq: QdqConfig) -> Built:
    """QDQ: int8 weights per channel, uint8 inputs, after their outliers were tamed."""
    graph = Graph.load(source)
    built = make_qdq(graph, batches, "uint8", advance, qdq)
    quantize_tables(graph, _TABLE_BITS, _TABLE_BLOCK)
    graph.save(folder / ONNX_NAME)
    return built


def quantize_fp8(source: Path, folder: Path, batches: Batches, advance: Advance, qdq: QdqConfig) -> Built:
    """QDQ in E4M3: what a GPU computes, in exact arithmetic here."""
    graph = Graph.load(source)
    built = make_qdq(graph, batches, "fp8", advance, qdq)
    quantize_tables(graph, _TABLE_BITS, _TABLE_BLOCK)
    graph.save(folder / ONNX_NAME)
    return built


def squeeze_for_gate(source: Path, folder: Path, batches: Batches, advance: Advance, texts: Sequence[Ids]) -> Built:
    """A small file that stays within the gate's cosine, nDCG and recall: rare pieces in 3 bits, others in 4."""
    return _squeeze(source, folder, _GATE_BUDGET, _GATE_TABLE, batches, texts, advance)


def squeeze_for_caution(source: Path, folder: Path, batches: Batches, advance: Advance, texts: Sequence[Ids]) -> Built:
    """The smallest file that the gate does not fail outright on cosine: rare pieces in 2 bits, others in 3."""
    return _squeeze(source, folder, _CAUTION_BUDGET, _CAUTION_TABLE, batches, texts, advance)


def _squeeze(
    source: Path, folder: Path, budget: float, split: Split, batches: Batches, texts: Sequence[Ids], advance: Advance
) -> Built:
    graph = Graph.load(source)
    damages = squeeze(graph, budget, split, batches, texts, advance)
    graph.save(folder / ONNX_NAME)
    return Built(ONNX_NAME, damages=damages)


def make_qdq(graph: Graph, batches: Batches, kind: Format, advance: Advance, qdq: QdqConfig) -> Built:
    """Quantise the linear layers of `graph` in place and explicitly, over the range of their calibration inputs.

    Outliers are tamed first for integers; E4M3 has the range for them. Where the embeddings would be further from the
    original's than `qdq` allows, the fewest layers that bring them back stay in float.
    """
    if kind != "fp8":
        tame(graph, batches, lambda steps: None)
    labels: dict[str, str] = {}
    for linear in graph.linears:
        labels.setdefault(linear.input, linear.label)
    seen = observe(graph, labels, batches, advance, with_histogram=True)
    ranges = {name: choose_range(found, qdq.calibration) for name, found in seen.items()}
    found = Ranking({}, ())
    if qdq.min_cosine is not None:
        nodes = {linear.node: linear.label for linear in graph.linears}
        is_small = sum(graph.array(linear.weight).size for linear in graph.linears) <= _MAX_DRAWN_WEIGHTS
        found = rank_layers(QdqProbe(graph, ranges, kind, batches), nodes, qdq.min_cosine, is_drawn=is_small)
    insert_qdq(graph, ranges, kind, skip={node for node, layer in found.damages.items() if layer.is_float})
    shown = tuple(
        InputRange(layer=labels[n], low=low, high=high, limit=seen[n].limit, counts=seen[n].coarse_histogram())
        for n, (low, high) in ranges.items()
    )
    return Built(ONNX_NAME, tuple(found.damages.values()), found.curve, shown)


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
