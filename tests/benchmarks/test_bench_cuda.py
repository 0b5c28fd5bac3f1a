"""The benchmark of the cuda engine: what it compiles ahead is what it measures against, its models are as ours are, and
vectors too far from theirs fail it.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import bench_cuda
from benchmarks.bench_cuda import _CASES, _MODELS, _list_jobs, _read_case, _write_model
from benchmarks.rows import make_row
from benchmarks.torch_baseline import sort_and_cut
from serving.engines.bert import keep_by_default, read_config


def test_sort_and_cut_puts_texts_of_like_length_together() -> None:
    assert sort_and_cut([3, 9, 1, 7, 5], size=2) == [[9, 7], [5, 3], [1]]


@pytest.mark.parametrize("case", list(_CASES))
def test_jobs_hold_every_batch_of_the_baseline(case: str) -> None:
    (_, lengths), jobs = _read_case(case), [batch for _, batch in _list_jobs(case)]
    assert jobs[0] == lengths
    assert sorted(length for batch in jobs[1:] for length in batch) == (sorted(lengths) if "mixed" in case else [])


def test_models_keep_the_layers_in_float16_that_any_file_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_MODELS, "minilm", _MODELS["minilm"] | {"num_hidden_layers": 1, "intermediate_size": 384})
    config = read_config(_write_model("minilm", tmp_path).with_name("config.json"))
    assert config.float16 == keep_by_default(384, 1) != frozenset()


@pytest.mark.parametrize(
    ("float16", "fp8", "failing"),
    [
        (0.9999, 0.997, []),
        (0.99989, 0.9975, ["minilm-quality:"]),
        (1.0, 0.9969, ["minilm-quality-fp8:"]),
        (float("nan"), 0.5, ["minilm-quality:", "minilm-quality-fp8:"]),
    ],
)
def test_quality_below_its_limit_fails_once_all_is_written(
    float16: float, fp8: float, failing: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    about = {"hardware": "a GPU", "versions": {}, "commit": "abc"}
    cosines = {"minilm-quality": float16, "minilm-quality-fp8": fp8}
    rows = [
        make_row("cuda", case, metric, "share", value, **about)
        for case, mean in cosines.items()
        for metric, value in (("cosine_mean", mean), ("cosine_min", 0.5))
    ]
    case = make_row("cuda", "minilm-1x32", "latency_ms", "ms", 1.0, **about)
    monkeypatch.setattr(bench_cuda, "_describe", lambda commit: about)
    monkeypatch.setattr(bench_cuda, "_quality_rows", lambda folder, about: rows)
    monkeypatch.setattr(bench_cuda, "_run_case", lambda case_, scratch, about: [case])
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["", "--cases", "minilm-1x32", "--minilm", str(tmp_path), "--out", str(out)])
    assert bench_cuda.main() == bool(failing)
    assert [json.loads(line)["case"] for line in out.read_text().splitlines()][-1] == "minilm-1x32"
    printed = capsys.readouterr()
    assert len(json.loads(printed.out.splitlines()[-1])) == len(rows) + 1
    assert [line.split()[0] for line in printed.err.splitlines()] == failing


def test_the_workspace_of_cublas_counts_against_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(torch, "ones", lambda *shape, **options: None)
    monkeypatch.setattr(torch, "mm", lambda *factors: log.append("product"))
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: log.append("count"))
    bench_cuda._open_blas.cache_clear()
    bench_cuda._start_peak()
    bench_cuda._start_peak()
    bench_cuda._open_blas.cache_clear()
    assert log == ["product", "count", "count"]
