"""INT8 against the gate: ranges by three methods, and the layers that stay in float where the cosine asks for it."""

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from registry.gate import GateLimits
from serving.tokenizer import TextTokenizer, pad_batch
from tasks.evaluate import evaluate, open_candidate
from tasks.export import ONNX_NAME
from tasks.graphs.graph import Graph
from tasks.graphs.qdq import Format, insert_qdq
from tasks.quantization.sensitivity import QdqProbe
from tasks.quantize import Candidate, quantize
from tasks.reporting.quantization_plots import plot_sensitivity
from tasks.settings import CalibrationMethod, QdqConfig
from tasks.variants import VARIANTS, Recipe, Variant
from tests.forge import CALIBRATION_SIZE, Forge
from tests.texts import make_sentences

SEVERE = 0.999997


def build(forge: Forge, variant: Variant) -> Candidate:
    return quantize.fn(variant, forge.exported, 48, forge.study.corpus, CALIBRATION_SIZE)


def num_int8(candidate: Candidate) -> int:
    """Linear layers that are quantised: each has a weight that is widened where it is used."""
    nodes = onnx.load(candidate.artifact.folder / ONNX_NAME).graph.node
    return sum(node.name.endswith("_weight_DequantizeLinear") for node in nodes)


def within(name: str, cosine: float) -> Variant:
    return VARIANTS[name].within(GateLimits(cosine_mean_pass=cosine, cosine_mean_caution=0))


def test_all_layers_are_int8_where_the_gate_bears_it(forge: Forge) -> None:
    candidate = build(forge, within("int8-static", 0.9))
    assert [layer.bits for layer in candidate.damages] == [8] * 12
    assert all(abs(layer.damage) < 0.1 for layer in candidate.damages)
    assert candidate.method == candidate.variant.method  # which names no layer
    assert num_int8(candidate) == 12
    assert candidate.artifact.digest == forge.study.find("int8-static").candidate.artifact.digest


def test_fewest_most_sensitive_layers_stay_in_float_until_the_cosine_is_reached(forge: Forge) -> None:
    plain = forge.study.find("int8-static")
    assert plain.quality.metrics["cosine_mean"].low < SEVERE
    candidate = build(forge, within("int8-static", SEVERE))
    kept = [layer for layer in candidate.damages if layer.is_float]
    rounded = [layer for layer in candidate.damages if not layer.is_float]
    assert 0 < len(kept) < 12
    assert num_int8(candidate) == len(rounded)
    assert min(layer.damage for layer in kept) >= max(layer.damage for layer in rounded)
    mixed = evaluate.fn(candidate, forge.study.corpus, forge.teacher_embeddings, "here")
    assert mixed.metrics["cosine_mean"].value > plain.quality.metrics["cosine_mean"].value
    account = candidate.quantization("docs:", 0.999)
    assert account is not None
    assert account.method.endswith("in float: " + ", ".join(layer.layer for layer in kept))


def test_curve_rises_with_the_layers_kept_and_says_where_the_limit_is_met(forge: Forge) -> None:
    candidate = build(forge, within("int8-static", SEVERE))
    num_kept = sum(layer.is_float for layer in candidate.damages)
    points = {point.num_kept: point for point in candidate.curve}
    assert {0, 1, 2, 4, 8, num_kept} <= points.keys()
    assert list(points) == sorted(points)
    assert points[0].cosine < points[8].cosine
    assert points[num_kept].low >= SEVERE > points[0].low
    assert all(point.low < SEVERE for point in candidate.curve if point.num_kept < num_kept)
    damages, curve = plot_sensitivity(candidate).axes
    assert f"{num_kept} of 12" in damages.get_title()
    assert list(curve.lines[0].get_xdata()) == list(points)


def test_layers_of_a_large_model_are_not_measured_for_the_picture_alone(
    forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.quantization.onnx_builds._MAX_DRAWN_WEIGHTS", 1000)
    candidate = build(forge, within("int8-static", 0.9))
    assert candidate.damages == ()
    assert [point.num_kept for point in candidate.curve] == [0]


@pytest.mark.parametrize("kind", ["uint8", "fp8"])
def test_probe_rounds_what_its_switches_say_as_the_graph_itself_would(kind: Format, forge: Forge) -> None:
    graph = Graph.load(forge.exported.folder / ONNX_NAME)
    batches = [
        pad_batch([row]) for row in TextTokenizer.from_folder(forge.exported.folder, 48).encode(make_sentences(9))
    ]
    ranges = {linear.input: (-0.4, 0.5) for linear in graph.linears}
    skipped = {linear.node for linear in graph.linears[::3]}
    twin = graph.copy()
    insert_qdq(twin, ranges, kind, skipped)

    def embed(of: Graph) -> NDArray[np.float32]:
        session = of.open()
        found = [session.run(None, {"input_ids": ids, "attention_mask": mask})[0] for ids, mask in batches]
        return np.asarray(np.concatenate(found) / np.linalg.norm(np.concatenate(found), axis=1, keepdims=True))

    expected = (embed(twin) * embed(graph)).sum(axis=1)
    probe = QdqProbe(graph, ranges, kind, batches)
    rounded = {linear.node: linear.node not in skipped for linear in graph.linears}
    np.testing.assert_allclose(probe.cosines(rounded), expected, atol=1e-4)
    assert expected.max() < 0.999
    np.testing.assert_allclose(probe.cosines({}), 1, atol=1e-6)


@pytest.mark.parametrize("name", ["fp8-onnx", "int8-tensorrt"])
def test_cosine_out_of_reach_leaves_every_layer_in_float(name: str, forge: Forge) -> None:
    out_of_reach = VARIANTS[name].model_copy(update={"qdq": QdqConfig(min_cosine=2.0)})
    candidate = build(forge, out_of_reach)
    assert [layer.bits for layer in candidate.damages] == [32] * 12
    assert num_int8(candidate) == 0


def test_variants_that_are_not_qdq_know_no_limit() -> None:
    assert VARIANTS["int8-dynamic"].within(GateLimits()) is VARIANTS["int8-dynamic"]


@pytest.mark.parametrize(("method", "said"), [("percentile", "99.99th percentile"), ("entropy", "entropy")])
def test_calibration_method_of_a_recipe_chooses_its_ranges(method: CalibrationMethod, said: str, forge: Forge) -> None:
    widest = {each.layer: each for each in forge.study.find("int8-static").candidate.ranges}
    candidate = build(forge, Recipe(name="mine", build="int8-static", calibration=method).variant())
    widths = {each.layer: each.high - each.low for each in candidate.ranges}
    assert widths.keys() == widest.keys()
    assert all(width <= widest[layer].high - widest[layer].low for layer, width in widths.items())
    if method == "entropy":  # of so few values no ten thousandth can be cut off
        assert any(width < 0.99 * (widest[layer].high - widest[layer].low) for layer, width in widths.items())
    account = candidate.quantization("docs:", 0.99)
    assert account is not None
    assert account.method.startswith(f"static QDQ, {said}, per channel")
    encode, engine = open_candidate(candidate)
    assert np.isfinite(encode(["the baker counts bells"], lambda steps: None)).all()
    engine.close()
