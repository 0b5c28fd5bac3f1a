"""Weights in few bits: rounding, packing, which layers get more, and that onnxruntime widens what was packed."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tasks.corpus import read_part
from tasks.evaluate import evaluate
from tasks.graphs.graph import Graph
from tasks.graphs.table import TOKENS, list_tables
from tasks.quantization.built import InputRange, LayerDamage
from tasks.quantization.calibrate import Batches, observe
from tasks.quantization.few_bit_table import Split, round_table
from tasks.quantization.packed import put_packed, put_table
from tasks.quantization.rounding import round_weight
from tasks.quantization.sensitivity import WeightProbe, choose_bits, choose_layers, measure_damage
from tasks.quantization.trellis import codebook
from tasks.quantize import fitting_texts, quantize
from tasks.reporting.quantization_plots import plot_ranges, plot_sensitivity
from tasks.variants import VARIANTS
from tests.forge import CALIBRATION_SIZE, Forge
from tests.tasks.graphs.test_qdq import batches, graph, run

__all__ = ["batches", "graph"]  # fixtures


def inputs(rows: int, seed: int = 0) -> np.ndarray:
    """Inputs whose channels go together, as those of a trained layer do."""
    rng = np.random.default_rng(seed)
    return np.asarray(rng.standard_normal((rows, 6)) @ rng.standard_normal((6, 32)))


def test_round_weight_costs_the_output_less_than_rounding_to_nearest() -> None:
    x = inputs(500)
    weight = np.random.default_rng(1).standard_normal((32, 8)).astype(np.float32)
    own = round_weight(weight, x.T @ x / len(x), 4).widen()
    nearest = round_weight(weight, np.eye(32), 4).widen()
    assert np.square(x @ (own - weight)).mean() < 0.5 * np.square(x @ (nearest - weight)).mean()
    assert np.abs(nearest - weight).max() < 0.5


def test_round_weight_keeps_what_lies_far_out_as_it_is() -> None:
    weight = np.random.default_rng(1).standard_normal((32, 8)).astype(np.float32)
    weight[3, 5] = 30
    few = round_weight(weight, np.eye(32), 3)
    assert few.places.tolist() == [3 * 8 + 5]
    assert few.widen()[3, 5] == pytest.approx(30, rel=1e-3)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_put_packed_is_widened_to_the_rounded_weight(bits: int, graph: Graph, batches: Batches) -> None:
    twin = graph.copy()
    for linear in graph.linears:
        weight = graph.array(linear.weight).copy()
        weight[1, 2] = 1
        rounded = round_weight(weight, np.eye(len(weight)), bits)
        assert len(rounded.places) > 0
        twin.replace_weight(linear, rounded.widen())
        put_packed(graph, linear, rounded)
    graph.drop_unused()
    assert np.abs(run(graph, batches) - run(twin, batches)).max() < 1e-5
    packed = [tensor.name for tensor in graph.model.graph.initializer if tensor.name.endswith("_planes")]
    assert graph.array(packed[5]).nbytes == 64 * 32 * bits / 8  # FFN-down of the first layer


@pytest.mark.parametrize("split", [((0.4, 4), (1.0, 3)), ((1.0, 3),), ((0.4, 3), (1.0, 2))])
def test_put_table_gives_the_rounded_rows_and_mends_those_that_occur(
    split: Split, graph: Graph, batches: Batches
) -> None:
    lookup = next(node for node in list_tables(graph) if node.input[1] == TOKENS)
    name, twin = lookup.input[0], graph.copy()
    table = graph.array(name)
    few = round_table(table, split, [ids for ids, _ in batches])
    rows = np.concatenate([codebook(part.bits)[part.states] for part in few.parts]) * few.scales.astype(np.float32)
    rows[few.often] += few.steps * few.step_sizes.astype(np.float32)
    errors = np.square(rows - table).mean(axis=1) / np.maximum(np.square(table).mean(axis=1), 1e-9)
    assert errors[few.often].max() < 1e-4
    assert np.delete(errors, few.often).mean() < (0.08 if split[-1][1] == 2 else 0.03)
    twin.put(name, rows)
    put_table(graph, lookup, few)
    graph.drop_unused()
    assert np.abs(run(graph, batches) - run(twin, batches)).max() < 1e-5


def test_openvino_widens_what_was_packed_to_the_same(graph: Graph, batches: Batches, tmp_path: Path) -> None:
    import openvino

    for linear in graph.linears:
        weight = graph.array(linear.weight)
        put_packed(graph, linear, round_weight(weight, np.eye(len(weight)), 3))
    lookup = next(node for node in list_tables(graph) if node.input[1] == TOKENS)
    put_table(graph, lookup, round_table(graph.array(lookup.input[0]), ((0.4, 3), (1.0, 2)), [batches[0][0]]))
    graph.save(tmp_path / "model.onnx")
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", hint)
    own = np.concatenate([compiled({"input_ids": ids, "attention_mask": mask})[0] for ids, mask in batches])
    assert np.abs(own - run(graph, batches)).max() < 1e-4


def test_choose_layers_takes_the_fewest_that_reach_the_target(graph: Graph, batches: Batches) -> None:
    own = {linear.node: graph.array(linear.weight) for linear in graph.linears}
    noise = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    fewer = {
        node: weight + (0.1 if "output/dense" in node else 0.0001) * noise[: len(weight), : weight.shape[1]]
        for node, weight in own.items()
    }
    probe = WeightProbe(graph, batches)
    damage = measure_damage(probe, fewer)
    assert probe.cosine(own) == pytest.approx(1, abs=1e-6)
    worst = max(damage, key=lambda node: damage[node])
    assert "output/dense" in worst

    def reach(target: float) -> Callable[[Mapping[str, NDArray[np.float32]]], bool]:
        return lambda mixed: probe.cosine(mixed) >= target

    assert choose_layers(fewer, own, damage, reach(-1)) == set()
    assert worst in choose_layers(fewer, own, damage, reach(0.9999999))
    everything = choose_layers(fewer, fewer, damage, reach(2))
    assert everything == set(own)  # out of reach: all get what there is


def test_choose_bits_spends_bytes_where_they_mend_most_and_no_more_than_needed() -> None:
    damage, sizes = {"small": 8.0, "large": 16.0, "quiet": 0.1}, {"small": 1, "large": 4, "quiet": 1}
    spent = []
    for most in range(7):
        bits = choose_bits(damage, sizes, range(4, 7), lambda mixed, most=most: sum(mixed.values()) >= 12 + most)
        spent.append(tuple(bits[node] - 4 for node in damage))
    assert spent == [(0, 0, 0), (1, 0, 0), (1, 1, 0), (2, 1, 0), (2, 2, 0), (2, 2, 1), (2, 2, 2)]
    assert set(choose_bits(damage, sizes, range(4, 7), lambda mixed: False).values()) == {6}  # out of reach


def test_observe_weighs_every_token_the_same(graph: Graph, batches: Batches) -> None:
    name = graph.linears[0].input
    together = observe(graph, [name], batches, lambda steps: None, with_products=True)[name]
    alone = [observe(graph, [name], [batch], lambda steps: None, with_products=True)[name] for batch in batches]
    assert together.num_rows == sum(ids.size for ids, _ in batches)
    whole = sum(each.products * each.num_rows for each in alone if each.products is not None)
    assert together.products == pytest.approx(whole / together.num_rows, rel=1e-5, abs=1e-6)


def test_few_bits_are_fitted_to_long_texts_as_well(forge: Forge) -> None:
    texts = fitting_texts(forge.study.corpus)
    singles = read_part(forge.study.corpus, "distillation")
    assert texts[-len(singles) :] == singles
    joined = texts[: -len(singles)]
    assert len(joined) == pytest.approx(0.1 * len(texts), abs=1)
    assert all(text.startswith(tuple(singles)) for text in joined)


def test_squeezed_variant_is_small_and_says_which_layers_got_more(forge: Forge) -> None:
    full = forge.study.find("fp32-onnx").candidate
    candidate = quantize.fn(VARIANTS["int4-tiny"], forge.exported, 48, forge.study.corpus, CALIBRATION_SIZE)
    quality = evaluate.fn(candidate, forge.study.corpus, forge.teacher_embeddings, "here")
    assert quality.metrics["cosine_mean"].value > 0.97
    assert candidate.engine.size < 0.8 * full.engine.size
    assert len(candidate.damages) == 12
    assert {layer.bits for layer in candidate.damages} <= {3, 4, 5, 6}
    account = candidate.quantization("docs:", 0.98)
    assert account is not None
    assert account.calibration_digest == forge.study.corpus.digest
    assert plot_sensitivity(candidate).axes[0].yaxis_inverted()


def test_static_int8_shows_what_was_calibrated(forge: Forge) -> None:
    ranges = forge.study.find("int8-static").candidate.ranges
    assert len(ranges) == 8  # four inputs in each of two layers
    assert all(each.low < 0 < each.high and sum(each.counts) > 0 for each in ranges)
    assert [axes.get_title() for axes in plot_ranges("int8-static", ranges).axes][:2] == [
        "layer.0/attention/self/query",
        "layer.0/attention/output/dense",
    ]


def test_plots_take_one_layer(forge: Forge) -> None:
    only = {"damages": (LayerDamage(layer="only", damage=0.0, bits=4),), "curve": ()}
    plot_sensitivity(forge.study.find("int8-static").candidate.model_copy(update=only))
    plot_ranges("one", (InputRange(layer="only", low=-1, high=1, limit=1, counts=(1,) * 64),))
