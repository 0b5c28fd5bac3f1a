"""Graph edits of quantisation, on the tiny teacher's exported graph and on the processor's exact arithmetic."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from serving.tokenizer import TextTokenizer, pad_batch
from tasks.export import ONNX_NAME
from tasks.graphs.graph import Graph
from tasks.graphs.half import convert_to_fp16
from tasks.graphs.qdq import Format, insert_qdq, quantize_weight
from tasks.graphs.table import pack_rows, quantize_tables
from tasks.quantization.calibrate import Activations, Batches, choose_range, observe
from tasks.quantization.outliers import tame_outliers
from tests.forge import Forge
from tests.texts import make_sentences


@pytest.fixture
def batches(forge: Forge) -> Batches:
    ids = TextTokenizer.from_folder(forge.exported.folder, 48).encode(make_sentences(12))
    return [pad_batch([row]) for row in ids]


@pytest.fixture
def graph(forge: Forge) -> Graph:
    return Graph.load(forge.exported.folder / ONNX_NAME)


def run(graph: Graph, batches: Batches, level: str = "ORT_ENABLE_BASIC") -> NDArray[np.float32]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    session = graph.open(options)
    feeds = [{"input_ids": ids, "attention_mask": mask} for ids, mask in batches]
    return np.concatenate([session.run(None, feed)[0] for feed in feeds])


def cosines(own: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray((own * other).sum(axis=1))


def weight_bytes(graph: Graph) -> int:
    return sum(graph.array(tensor.name).nbytes for tensor in graph.model.graph.initializer)


def observe_linears(graph: Graph, batches: Batches, with_histogram: bool = False) -> dict[str, Activations]:
    names = [linear.input for linear in graph.linears]
    return observe(graph, names, batches, lambda steps: None, with_histogram)


def test_graph_finds_six_linears_a_layer(graph: Graph) -> None:
    assert [linear.label for linear in graph.linears][:6] == [
        "layer.0/attention/self/query",
        "layer.0/attention/self/key",
        "layer.0/attention/self/value",
        "layer.0/attention/output/dense",
        "layer.0/intermediate/dense",
        "layer.0/output/dense",
    ]
    assert len(graph.linears) == 12


def test_observe_sees_every_value(graph: Graph, batches: Batches) -> None:
    for found in observe_linears(graph, batches, with_histogram=True).values():
        assert found.histogram is not None
        tokens = sum(ids.size for ids, _ in batches)
        assert found.histogram.sum() == tokens * len(found.channel_max)
        assert found.limit == pytest.approx(float(found.channel_max.max()))


def test_choose_range_cuts_what_is_rare_and_keeps_zero_inside() -> None:
    values = np.concatenate([np.linspace(1, 2, 100_000), [50.0]]).astype(np.float32)
    counts, _ = np.histogram(values, bins=4096, range=(-50, 50))
    found = Activations(1.0, 50.0, np.array([50.0], dtype=np.float32), counts)
    assert choose_range(found, "minmax") == (0.0, 50.0)
    for low, high in (choose_range(found, "percentile"), choose_range(found, "entropy")):
        assert low == 0
        assert 1.9 < high < 5


@pytest.mark.parametrize(("kind", "limit"), [("uint8", 0.999), ("int8", 0.998), ("fp8", 0.99)])
def test_insert_qdq_stays_near_and_shrinks_weights(kind: Format, limit: float, graph: Graph, batches: Batches) -> None:
    expected, before = run(graph, batches), weight_bytes(graph)
    ranges = {name: choose_range(found, "minmax") for name, found in observe_linears(graph, batches).items()}
    skipped = graph.linears[5]
    insert_qdq(graph, ranges, kind, skip={skipped.node})
    assert cosines(run(graph, batches), expected).min() > limit
    assert [linear.node for linear in graph.linears] == [skipped.node]
    assert weight_bytes(graph) < before - 2 * len(ranges) * 32 * 32


def test_quantize_weight_rounds_to_half_a_step() -> None:
    weight = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    weight[:, 1] = 0
    narrow, scale = quantize_weight(weight)
    assert np.abs(narrow * scale - weight).max() <= scale.max() / 2 + 1e-7
    assert np.abs(narrow[:, [0, 2]]).max(axis=0).tolist() == [127, 127]


def test_tame_outliers_changes_nothing_but_the_largest_input(graph: Graph, batches: Batches) -> None:
    expected, before = run(graph, batches), observe_linears(graph, batches)
    scaled = graph.node(graph.linears[5].node).input[0]
    tame_outliers(graph, before)
    assert np.abs(run(graph, batches) - expected).max() < 1e-5
    after = observe_linears(graph, batches)
    assert scaled not in after  # the second product of the feed-forward reads what was left of its input
    assert after[f"{graph.linears[5].node}_rest"].limit < before[scaled].limit


def test_convert_to_fp16_keeps_inputs_outputs_and_embeddings(graph: Graph, batches: Batches) -> None:
    expected = run(graph, batches)
    kinds = [value.type.tensor_type.elem_type for value in (*graph.model.graph.input, *graph.model.graph.output)]
    convert_to_fp16(graph)
    assert cosines(run(graph, batches), expected).min() > 0.9999
    assert kinds == [v.type.tensor_type.elem_type for v in (*graph.model.graph.input, *graph.model.graph.output)]
    assert {graph.array(linear.weight).dtype for linear in graph.linears} == {np.dtype(np.float16)}


def test_convert_to_fp16_survives_a_text_that_is_all_padding_but_one(graph: Graph, batches: Batches) -> None:
    ids = np.zeros((2, 40), dtype=np.int64)
    mask = np.zeros_like(ids)
    mask[:, 0] = 1
    convert_to_fp16(graph)
    assert np.isfinite(run(graph, [(ids, mask)])).all()


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.9999), (4, 0.98)])
def test_quantize_tables_packs_the_vocabulary(bits: int, limit: float, graph: Graph, batches: Batches) -> None:
    table = "encoder.embeddings.word_embeddings.weight"
    expected, rows = run(graph, batches), len(graph.array(table))
    quantize_tables(graph, bits, 16)
    graph.drop_unused()
    assert cosines(run(graph, batches), expected).min() > limit
    assert graph.array(f"{table}_packed").nbytes == rows * 32 * bits / 8
    assert not graph.is_constant(table)


def test_pack_rows_takes_rows_that_blocks_do_not_divide() -> None:
    table = np.random.default_rng(0).standard_normal((3, 24)).astype(np.float32)
    packed, scale = pack_rows(table, 8, 16)
    assert (packed.shape, scale.shape) == ((3, 24), (3, 2))
    restored = (packed.astype(np.float32) - 128) * np.repeat(scale, 16, axis=1)[:, :24]
    assert np.abs(restored - table).max() <= scale.max() / 2 + 1e-6


def test_graph_saves_without_weights_that_nobody_reads(graph: Graph, tmp_path: Path) -> None:
    graph.put("nobody", np.zeros(100_000, dtype=np.float32))
    graph.save(tmp_path / ONNX_NAME)
    assert not Graph.load(tmp_path / ONNX_NAME).is_constant("nobody")
