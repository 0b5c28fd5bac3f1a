"""Graphs whose weights lie beside them: the same candidates, whatever the size from which that is done."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from serving.engines.plans import hash_graph, weights_of
from tasks.evaluate import open_candidate
from tasks.export import ONNX_NAME, export_onnx
from tasks.graphs import graph_files
from tasks.graphs.graph import Graph
from tasks.quantize import quantize
from tasks.variants import VARIANTS
from tests.forge import CALIBRATION_SIZE, Forge

TEXTS = ["the baker counts bells", "the sailor sells ropes"]
LIMIT = 10_000


@pytest.fixture
def large(forge: Forge, monkeypatch: pytest.MonkeyPatch) -> Forge:
    """From here on the tiny teacher is a large model."""
    monkeypatch.setattr(graph_files, "MAX_INLINE_BYTES", LIMIT)
    return forge


def test_large_export_has_its_weights_beside_it(large: Forge) -> None:
    folder = export_onnx.fn(large.study.teacher).folder  # which compares with sentence-transformers itself
    assert {path.name for path in folder.iterdir()} == {ONNX_NAME, f"{ONNX_NAME}.data", "tokenizer.json"}
    light, own = Graph.load(folder / ONNX_NAME), Graph.load(large.exported.folder / ONNX_NAME)
    assert (folder / ONNX_NAME).stat().st_size < weights_of(folder / ONNX_NAME).stat().st_size
    assert [linear.weight for linear in light.linears] == [linear.weight for linear in own.linears]
    assert all(np.array_equal(light.array(each.weight), own.array(each.weight)) for each in own.linears)


@pytest.mark.parametrize("name", ["fp32-onnx", "int8-dynamic", "int8-static", "int8-openvino"])
def test_large_graph_becomes_the_same_candidate(name: str, large: Forge) -> None:
    exported = export_onnx.fn(large.study.teacher)
    candidate = quantize.fn(VARIANTS[name], exported, 48, large.study.corpus, CALIBRATION_SIZE)
    rows = []
    for each in (candidate, large.study.find(name).candidate):
        encode, engine = open_candidate(each)
        rows.append(encode(TEXTS, lambda steps: None))
        engine.close()
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)
    assert candidate.disk_bytes >= large.study.find(name).candidate.disk_bytes
    assert weights_of(candidate.artifact.folder / candidate.engine.file).is_file() == (name != "int8-openvino")


@pytest.mark.parametrize("name", ["fp8-onnx", "int4-small", "int8-tensorrt", "fp8-tensorrt"])
def test_large_graph_is_rewritten_as_a_small_one_is(name: str, large: Forge, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = export_onnx.fn(large.study.teacher)
    beside = quantize.fn(VARIANTS[name], exported, 48, large.study.corpus, CALIBRATION_SIZE).artifact.folder
    monkeypatch.undo()
    monkeypatch.setenv("THORFORGE_HOME", str(large.state))
    inside = quantize.fn(VARIANTS[name], large.exported, 48, large.study.corpus, CALIBRATION_SIZE).artifact.folder
    assert weights_of(beside / ONNX_NAME).is_file()
    assert not weights_of(inside / ONNX_NAME).is_file()
    one, other = onnx.load(beside / ONNX_NAME).graph, onnx.load(inside / ONNX_NAME).graph
    assert [node.name for node in one.node] == [node.name for node in other.node]
    for first, second in zip(one.initializer, other.initializer, strict=True):
        values, expected = onnx.numpy_helper.to_array(first), onnx.numpy_helper.to_array(second)
        assert np.array_equal(values.view(np.uint8), expected.view(np.uint8)), first.name


def test_hash_of_a_graph_sees_its_weights(tmp_path: Path) -> None:
    graph = tmp_path / ONNX_NAME
    graph.write_bytes(b"nodes")
    alone = hash_graph(graph)
    weights_of(graph).write_bytes(b"weights")
    beside = hash_graph(graph)
    weights_of(graph).write_bytes(b"weighte")
    assert len({alone, beside, hash_graph(graph)}) == 3


def test_small_graph_leaves_no_weights_of_an_earlier_one_beside_it(large: Forge, tmp_path: Path) -> None:
    graph = Graph.load(large.exported.folder / ONNX_NAME)
    graph.save(tmp_path / ONNX_NAME)
    assert weights_of(tmp_path / ONNX_NAME).is_file()
    for linear in graph.linears:
        graph.replace_weight(linear, np.zeros((1, 1)))
    for name in [tensor.name for tensor in graph.model.graph.initializer]:
        graph.put(name, np.zeros(1, dtype=np.float32))
    graph.save(tmp_path / ONNX_NAME)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [ONNX_NAME]
