"""Figures, rows and the table that is made of them."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.figures import Figure, summarise, to_rows
from benchmarks.load import LoadResult, join_results
from benchmarks.report import main, newest_run, read_rows, render_table


def make_run(latencies: list[float], statuses: list[int], seconds: float = 1.0) -> LoadResult:
    due = np.arange(len(latencies)) / 100
    return LoadResult(
        due=due,
        sent=due,
        done=due + np.array(latencies),
        statuses=np.array(statuses),
        num_unguided=0,
        seconds=seconds,
        cpu_seconds=0.001,
    )


def row(case: str, system: str, value: float, run: str = "r1", **extra: object) -> dict[str, object]:
    return {
        "case": case,
        "metric": "p50_ms",
        "system": system,
        "value": value,
        "unit": "ms",
        "config": {"run": run},
    } | extra


def test_summary_takes_the_median_rate_and_all_latencies_together() -> None:
    runs = [
        make_run([0.01] * 10, [200] * 10),
        make_run([0.02] * 30, [200] * 29 + [500]),
        make_run([0.5] * 20, [200] * 20),
    ]
    figures = {figure.metric: figure for figure in summarise("ours", "closed-8", runs, {"clients": 8})}
    assert figures["requests_per_s"].value == 20
    assert figures["p50_ms"].value == pytest.approx(20)
    assert figures["p99_ms"].value == pytest.approx(500)
    assert figures["failed"].value == 1
    assert figures["failed"].config == {
        "clients": 8, "rounds_per_s": [10, 29, 20], "client_cpu_us": 50.0, "client_late_p99_ms": 0.0,
    }  # fmt: skip


def test_summary_of_a_server_that_answered_nothing_has_no_latencies() -> None:
    metrics = {figure.metric: figure.value for figure in summarise("ours", "x", [make_run([0.1], [-1])], {})}
    assert metrics == {"requests_per_s": 0, "failed": 1}


def test_part_of_a_run_is_a_run() -> None:
    part = make_run([0.1] * 10, [200] * 5 + [429] * 5).between(0.02, 0.07)
    assert part.due == pytest.approx([0, 0.01, 0.02, 0.03, 0.04])
    assert part.latencies_ms() == pytest.approx([100] * 3)
    assert part.count(429) == 2
    assert part.seconds == pytest.approx(0.05)
    assert part.requests_per_s == 0  # answered after its end


def test_runs_that_are_joined_follow_one_another() -> None:
    joined = join_results([make_run([0.1, 0.1], [200, 200]), make_run([0.3], [500], seconds=2.0)])
    assert joined.due == pytest.approx([0, 0.01, 1.0])
    assert joined.seconds == 3
    assert joined.count(200) == 2


def test_rows_compare_with_the_baseline_of_the_same_run() -> None:
    figures = [
        Figure("thorforge", "closed-1", "p50_ms", "ms", 2.0),
        Figure("infinity-1", "closed-1", "p50_ms", "ms", 20.0),
        Figure("thorforge", "swap", "p99_ms", "ms", 3.0, baseline=("quiet", 2.0)),
        Figure("thorforge", "closed-1", "failed", "", 0.0),
        Figure("infinity-1", "closed-1", "failed", "", 0.0),
    ]
    ours, peers, swap, failed, _ = to_rows(figures, "infinity-1", {"run": "now"})
    assert (ours["baseline"], ours["baseline_value"], ours["ratio"]) == ("infinity-1", 20.0, 0.1)
    assert "baseline" not in peers
    assert (swap["baseline"], swap["ratio"]) == ("quiet", 1.5)
    assert "ratio" not in failed
    assert ours["config"] == {"run": "now"}
    assert {"bench", "commit", "date", "hardware", "versions"} <= ours.keys()


def test_table_has_a_column_for_each_system_and_our_ratio() -> None:
    rows = [
        row("closed-1", "thorforge", 1.5, baseline="infinity", ratio=0.075),
        row("closed-1", "infinity", 20.0),
        row("swap", "thorforge", 1234.5),
    ]
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in render_table(rows).splitlines()]
    assert lines[0] == ["case", "metric", "thorforge", "infinity", "ratio"]
    assert set("".join(lines[1])) == {"-"}
    assert lines[2] == ["closed-1", "p50_ms", "1.5 ms", "20 ms", "0.075 × infinity"]
    assert lines[3] == ["swap", "p50_ms", "1,234 ms", "", ""]
    assert len({len(line) for line in render_table(rows).splitlines()}) == 1


def test_newest_run_is_the_last_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("old", "thorforge", 1.0, run="r0"), row("new", "thorforge", 2.0), row("newer", "thorforge", 3.0)]
    common = {"hardware": "a node", "commit": "abc", "date": "2026-11-21"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(entry | common) + "\n" for entry in rows), encoding="utf-8")
    assert [entry["case"] for entry in newest_run(read_rows(path))] == ["new", "newer"]
    assert main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("a node; commit abc; 2026-11-21\n\n| case")
    assert "old" not in printed
    path.write_text("", encoding="utf-8")
    assert main([str(path)]) == 1
    with pytest.raises(SystemExit):
        main([str(tmp_path / "other.jsonl")])
    assert "there is no file" in capsys.readouterr().err


def test_rows_without_a_run_are_those_of_a_commit_with_every_ratio() -> None:
    """As those of the GPU, which several baselines have in one run."""
    rows = [
        row("mixed", "thorforge", 1.0, commit="old", config={"tokens": 3}),
        row("mixed", "thorforge", 2.0, commit="new", config={"tokens": 3}, baseline="padded", ratio=8.8),
        row("mixed", "thorforge", 2.0, commit="new", config={"tokens": 3}, baseline="sorted", ratio=2.9),
    ]
    newest = newest_run(rows)
    assert newest == rows[1:]
    assert "8.8 × padded, 2.9 × sorted" in render_table(newest)
