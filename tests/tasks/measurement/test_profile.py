"""Where an engine run's time goes, on a timeline recorded on an H100 and on one recorded here."""

import json
import re
from pathlib import Path

import pytest

from flows.profiling import as_table, profile_source
from serving import kernels
from serving.engines.bert import BertConfig
from tasks.errors import ProfileInvalid
from tasks.measurement.profile import Ceilings, Span, Work, count_work, read_spans, summarise

# Three runs of MiniLM in float16, 1,024 texts of 128 tokens, from host memory to host memory.
RECORDED = Path(__file__).with_name("h100_minilm_1024x128.json")
MINILM = BertConfig(30_522, 512, 384, 6, 12, 1536, 1e-12, "mean", True)
CEILINGS = Ceilings(3.0e12, 8.0e14)


def test_recorded_run_is_told_apart_by_kind() -> None:
    work = count_work(MINILM, [128] * 1024)
    profile = summarise(read_spans(RECORDED), 3, work, CEILINGS)
    rows = {row.kind: row for row in profile.rows}
    assert list(rows) == ["products", "attention", "norms", "copies", "embedding", "pooling"]
    assert [rows[kind].calls for kind in ("products", "attention", "norms", "embedding")] == [24, 6, 12, 1]
    assert sum(row.share for row in profile.rows) == pytest.approx(1)
    products = rows["products"]
    assert products.share == pytest.approx(0.711, abs=0.001)
    assert products.work.flops == 2 * 6 * 131_072 * (4 * 384**2 + 2 * 384 * 1536)
    rate = products.work.flops / (products.milliseconds / 1e3)
    assert products.compute_share == pytest.approx(rate / CEILINGS.flops_per_second)
    assert 0.4 < products.compute_share < 1
    assert all(0 < rows[kind].bandwidth_share < 1 for kind in ("norms", "embedding", "pooling"))
    assert profile.copy_share == pytest.approx(rows["copies"].share)
    assert 0 < profile.idle_share < 0.3  # the host packs the next run


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
    (row,) = summarise(spans, 2, {"norms": Work(3.0e6, 5.0e6)}, Ceilings(1.0e12, 1.0e12)).rows
    assert (row.calls, row.work) == (2, Work(6.0e6, 10.0e6))
    assert row.bandwidth_share == pytest.approx(6.0e6 / 20e-6 / 1.0e12)


def test_gaps_and_overlaps_are_counted_once() -> None:
    spans = [Span("_pool_kernel", 0, 10), Span("Memcpy DtoH", 5, 20), Span("_add_norm_kernel", 40, 50)]
    profile = summarise(spans, 1, {"pooling": Work(1e6, 2e6)}, Ceilings(1e12, 1e12))
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


def test_profile_runs_the_twin_where_there_is_no_gpu(tiny_teacher: Path, tmp_path: Path) -> None:
    trace = tmp_path / "deep" / "trace.json"
    profiled = profile_source(str(tiny_teacher), "3x9", trace)
    assert {"products", "attention", "norms", "embedding"} <= {row.kind for row in profiled.profile.rows}
    events = json.loads(trace.read_text())["traceEvents"]
    assert all({"ts", "dur", "pid", "tid"} <= event.keys() for event in events if event.get("ph") == "X")
    assert profiled.ceilings.flops_per_second > 1e6
    assert as_table(profiled).row_count == len(profiled.profile.rows)


@pytest.mark.parametrize(("batch", "message"), [("8", "not texts x tokens"), ("0x4", "0x4"), ("1x9999", "positions")])
def test_profile_refuses_a_batch_it_cannot_make(batch: str, message: str, tiny_teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ProfileInvalid, match=message):
        profile_source(str(tiny_teacher), batch, tmp_path / "trace.json")
