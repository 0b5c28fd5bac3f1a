"""Every variant of MiniLM: quality against the teacher and speed against torch fp32, on this machine, alone.

`python -m benchmarks.bench_variants [--data DIR] [--out FILE]`: with `--data`, a folder holding `sts/stsb_dev.tsv` and
the BEIR folder `retrieval/scifact`, the published bundle is scored on both as well. Every step is run anew.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.rows import append_rows, make_row
from flows.environment import make_state_folder, prepare_environment
from registry.client import pull
from registry.store import FolderStore, default_registry
from tasks.state import state_dir

_NAME = "all-MiniLM-L6-v2"


def main() -> int:
    """Measure, print a table, append the rows. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="evaluation data: adds STS-B dev and SciFact")
    parser.add_argument("--out", type=Path, help="rows go to this file instead of benchmarks/results/variants.jsonl")
    arguments = parser.parse_args()
    prepare_environment()
    make_state_folder()
    from flows.config import OptimizeConfig  # noqa: PLC0415  Prefect reads the environment at import
    from flows.run import print_outcome, run_optimize  # noqa: PLC0415

    outcome = run_optimize(OptimizeConfig(name=_NAME), refresh=True)
    print_outcome(outcome, as_json=False)
    rows = [row for judged in outcome.study.judged for row in _variant_rows(judged, outcome.study.speeds)]
    if arguments.data and outcome.published:
        bundle = state_dir() / "bench" / outcome.published.digest
        pull(FolderStore(default_registry()), _NAME, outcome.published.digest, bundle)
        rows += _data_rows(outcome.published.variant, bundle, outcome.study.teacher.folder, arguments.data)
    append_rows("variants", rows, arguments.out)
    return 0


def _variant_rows(judged: Any, speeds: Any) -> list[dict[str, Any]]:
    from tasks.benchmark import TORCH  # noqa: PLC0415

    torch, name = speeds.speeds[TORCH], judged.name
    common = {"baseline": TORCH, "config": {"corpus": "docs:", "mean_tokens": speeds.mean_tokens}}
    percentiles = {f"p{p}": judged.speed.latency_ms(p) for p in (50, 95, 99)}
    rows = [
        make_row(
            "variants", name, "throughput_per_s", "texts/s", judged.speed.throughput_per_s,
            baseline_value=torch.throughput_per_s, **common,
        ),
        make_row(
            "variants", name, "latency_ms", "ms", percentiles["p50"],
            baseline_value=torch.latency_ms(50), **percentiles, **common,
        ),
        make_row("variants", name, "size_mb", "MB", judged.size_mb, **common),
    ]  # fmt: skip
    for metric, measured in judged.quality.metrics.items():
        interval = {"low": measured.low, "high": measured.high}
        unit = "values" if metric == "nonfinite" else "share"
        rows.append(make_row("variants", name, metric, unit, measured.value, **interval, **common))
    return rows


def _data_rows(variant: str, bundle: Path, teacher: Path, data: Path) -> list[dict[str, Any]]:
    from flows.evaluate import evaluate_source  # noqa: PLC0415

    files = [data / "sts" / "stsb_dev.tsv"], [data / "retrieval" / "scifact"]
    own, base = evaluate_source(str(bundle), *files).scores, evaluate_source(str(teacher), *files).scores
    return [
        make_row(
            "variants", variant, f"{score.dataset}.{score.metric}", "points", score.value,
            low=score.low, high=score.high, baseline="fp32-torch", baseline_value=reference.value,
        )
        for score, reference in zip(own, base, strict=True)
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
