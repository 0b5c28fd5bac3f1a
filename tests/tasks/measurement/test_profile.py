"""Where an engine run's time goes, on a timeline recorded on an H100 and on made-up ones."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from serving import kernels
from serving.engines.bert import name_linear
from tasks.errors import ProfileInvalid
from tasks.measurement.ceilings import Ceilings
from tasks.measurement.profile import summarise
from tasks.measurement.trace import Span, read_spans
from tasks.measurement.work import RunWork, Work, count_work
from tests.tasks.measurement.timelines import H100_MINILM, MINILM, lay_out

CEILINGS = Ceilings(3.0e12, 8.0e14, 1.6e15)


def test_recorded_run_is_told_apart_by_linear_layer_and_kernel() -> None:
    work = count_work(MINILM, [128] * 1024)
    profile = summarise(read_spans(H100_MINILM), 3, work, CEILINGS)
    rows = {row.linear or row.kind: row for row in profile.rows}
    linears, others = ["up", "down", "query", "output"], ["attention", "norms", "copies", "embedding", "pooling"]
    assert list(rows) == [*linears[:3], *others[:2], linears[3], *others[2:]]
    assert profile.unplaced is None
    assert [rows[linear].calls for linear in linears] == [6, 6, 6, 6]
    assert [rows[kind].calls for kind in ("attention", "norms", "embedding")] == [6, 12, 1]
    assert sum(row.share for row in profile.rows) == pytest.approx(1)
    assert sum(rows[linear].share for linear in linears) == pytest.approx(0.711, abs=0.001)
    assert [kernel.name for kernel in rows["query"].kernels] == ["_linear_kernel"]
    assert rows["down"].kernels[0].name.startswith("nvjet_sm90")
    down, output = rows["down"], rows["output"]  # one kernel and half the calls each
    assert (output.milliseconds, down.milliseconds) == (pytest.approx(0.712, abs=1e-3), pytest.approx(1.496, abs=1e-3))
    assert all(0 < rows[kind].bandwidth_share < 1 for kind in ("norms", "embedding", "pooling", *linears))
    assert profile.copy_share == pytest.approx(rows["copies"].share)
    assert 0 < profile.idle_share < 0.3  # the host packs the next run


def test_a_linear_layer_is_held_against_the_product_that_was_measured() -> None:
    profile = summarise(read_spans(H100_MINILM), 3, count_work(MINILM, [128] * 1024), CEILINGS)
    up = next(row for row in profile.rows if row.linear == "up")
    assert up.work.flops == 6 * 2 * 131_072 * 384 * 1536
    assert up.work.num_bytes == 6 * 2 * (384 * 1536 + 131_072 * (384 + 1536))
    assert up.compute_share == pytest.approx(up.work.flops / (up.milliseconds / 1e3) / CEILINGS.flops_per_second)
    assert up.bandwidth_share == pytest.approx(up.work.num_bytes / (up.milliseconds / 1e3) / CEILINGS.bytes_per_second)


def test_an_order_that_is_not_the_layers_leaves_the_kind() -> None:
    work = count_work(MINILM, [128] * 1024)
    spans = read_spans(H100_MINILM)
    strange = [replace(span, name="strange") if span.name.startswith("nvjet") else span for span in spans]
    profile = summarise(strange, 3, work, CEILINGS)
    rows = {row.kind: row for row in profile.rows}
    assert not any(row.linear for row in profile.rows)
    assert rows["products"].work == work.kinds["products"]
    assert [kernel.name for kernel in rows["other"].kernels] == ["strange"]
    assert profile.unplaced == "the order of 36 products, 18 attentions and 0 blocks does not fit 6 layers"


def test_a_product_outside_the_layers_is_given_none_of_their_work() -> None:
    layer = ["gemm_wide", "attention_hopper", "gemm_wide", "gemm_wide", "gemm_wide"]
    work = count_work(MINILM, [64] * 8)
    profile = summarise(lay_out(["aten::gelu", *layer * 6]), 1, work, CEILINGS)
    (rest,) = [row for row in profile.rows if row.kind == "products" and row.linear is None]
    assert (rest.calls, rest.work) == (1, Work())
    placed = [row.work for row in profile.rows if row.linear]
    assert sum(placed, Work()) == work.kinds["products"]


def test_e4m3_is_held_against_its_own_ceiling_and_what_stays_float16_against_the_other() -> None:
    config = replace(MINILM, layers=2, float16=frozenset({name_linear(1, 0)}))
    layer = ["gemm_wide", "attention_hopper", "gemm_wide", "feed_forward"]
    profile = summarise(lay_out(layer * 2), 1, count_work(config, [64] * 8, "f8"), CEILINGS)
    rows = {(row.linear, row.is_narrow): row for row in profile.rows if row.linear}
    assert {key: row.calls for key, row in rows.items()} == {
        ("query", True): 1, ("query", False): 1, ("output", True): 2, ("block", True): 2,
    }  # fmt: skip
    flops = 2 * 512 * 384 * 3 * 384
    for is_narrow, ceiling in ((True, 1.6e15), (False, 8.0e14)):
        row = rows["query", is_narrow]
        assert row.work.flops == flops
        assert row.compute_share == pytest.approx(flops / 10e-6 / ceiling)
    unmeasured = summarise(
        lay_out(layer * 2), 1, count_work(config, [64] * 8, "f8"), replace(CEILINGS, narrow_flops_per_second=None)
    )
    shares = {(row.linear, row.is_narrow): row.compute_share for row in unmeasured.rows if row.linear}
    assert [key for key, share in shares.items() if share is not None] == [("query", False)]


@pytest.mark.parametrize("name", ["_encode_kernel", "few_tokens_cluster"])
def test_a_kernel_for_few_tokens_is_the_whole_encoder(name: str) -> None:
    assert Span(name, 0.0, 1.0).kind == "whole encoder"


def test_every_kernel_of_ours_has_a_kind() -> None:
    folder = Path(kernels.__file__).parent
    names = [path.stem for path in folder.glob("*.cu")]
    for path in folder.glob("*.py"):
        names += re.findall(r"^def (_\w+_kernel)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert {"attention_hopper", "_attention_kernel"} <= set(names)
    assert not [name for name in names if Span(name, 0.0, 1.0).kind == "other"]


def test_norms_are_as_much_work_as_there_are_calls() -> None:
    spans = [Span("_add_norm_kernel", start, start + 10.0) for start in (0.0, 20.0, 40.0, 60.0)]
    (row,) = summarise(spans, 2, RunWork({"norms": Work(3.0e6, 5.0e6)}), Ceilings(1.0e12, 1.0e12)).rows
    assert (row.calls, row.work) == (2, Work(6.0e6, 10.0e6))
    assert row.bandwidth_share == pytest.approx(6.0e6 / 20e-6 / 1.0e12)


def test_gaps_and_overlaps_are_counted_once() -> None:
    spans = [Span("_pool_kernel", 0, 10), Span("Memcpy DtoH", 5, 20), Span("_add_norm_kernel", 40, 50)]
    profile = summarise(spans, 1, RunWork({"pooling": Work(1e6, 2e6)}), Ceilings(1e12, 1e12))
    assert profile.milliseconds == pytest.approx(0.05)
    assert profile.idle_share == pytest.approx(0.4)
    assert profile.longest_gap_ms == pytest.approx(0.02)
    assert [(row.kind, row.share) for row in profile.rows[:1]] == [("copies", pytest.approx(15 / 35))]
    pooling = next(row for row in profile.rows if row.kind == "pooling")
    assert (pooling.bandwidth_share, pooling.compute_share) == (pytest.approx(0.1), pytest.approx(0.2))


@pytest.mark.parametrize("text", ["{", "{}", json.dumps({"traceEvents": [{"ph": "M", "name": "kernel"}]})])
def test_what_is_no_trace_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(ProfileInvalid):
        read_spans(path)
