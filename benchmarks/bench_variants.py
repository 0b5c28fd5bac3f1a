"""Variants of MiniLM: quality against the teacher and speed against torch fp32, on this machine, alone.

`python -m benchmarks.bench_variants [--variant NAME]... [--data DIR] [--out FILE]`. `--data` is a folder with text to
train and calibrate on in `sentences/*.txt.gz`, `sts/stsb_dev.tsv` and the BEIR folder `retrieval/scifact`: every
candidate is judged on the latter two, which neither training nor calibration sees. Every step is run anew, unless
`--cached` is given; `--quality-only` leaves out the rows that other work on the machine would spoil.
"""

import argparse
import gzip
import math
import shlex
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.rows import append_rows, make_row, print_rows
from flows.environment import make_state_folder, prepare_environment
from tasks.state import state_dir

_NAME = "all-MiniLM-L6-v2"
_BENCH = "variants"
# Likeness to the teacher, which the teacher has to itself in full.
_TO_TEACHER = ("cosine_mean", "cosine_p1", "cosine_min", "overlap_at_10", "engine_cosine_mean")


def main() -> int:
    """Measure, print a table, append the rows. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", action="append", help="measure only this one; repeat for more")
    parser.add_argument(
        "--data", type=Path, help="train and calibrate on its sentences, judge on STS-B dev and SciFact"
    )
    parser.add_argument("--cached", action="store_true", help="take what was built and measured before from the cache")
    parser.add_argument("--quality-only", action="store_true", help="leave out latency and throughput")
    parser.add_argument("--out", type=Path, help="rows go to this file instead of benchmarks/results/variants.jsonl")
    arguments = parser.parse_args()
    prepare_environment()
    make_state_folder()
    from flows.config import OptimizeConfig, override  # noqa: PLC0415  Prefect reads the environment at import
    from flows.run import print_outcome, run_optimize  # noqa: PLC0415

    config = override(OptimizeConfig(name=_NAME), variants=arguments.variant)
    if arguments.data:
        corpus = collect_sentences(arguments.data / "sentences", state_dir() / "bench" / "sentences.txt")
        config = override(config, corpus=str(corpus), sts=(arguments.data / "sts" / "stsb_dev.tsv",))
    outcome = run_optimize(config, refresh=not arguments.cached)
    print_outcome(outcome, as_json=False)
    corpus_name = "sentences" if arguments.data else "docs:"
    common = {"baseline": "fp32-torch", "config": {"corpus": corpus_name}}
    rows = [row for judged in outcome.study.judged for row in quality_rows(judged, outcome.study.teacher, common)]
    if not arguments.quality_only:
        rows += [row for judged in outcome.study.judged for row in speed_rows(judged, outcome.study.speeds, common)]
    made_of = {judged.name: describe_making(judged, outcome, arguments) for judged in outcome.study.judged}
    stages: Iterable[list[dict[str, Any]]] = [rows]
    if arguments.data:
        stages = chain(stages, retrieval_rows(outcome.study, arguments.data / "retrieval" / "scifact", common))
    print_rows(list(_keep(stages, made_of, arguments.out)))
    return 0


def _keep(
    stages: Iterable[list[dict[str, Any]]], made_of: dict[str, Any], out: Path | None
) -> Iterator[dict[str, Any]]:
    """Append the rows of each stage once it is done: a run that is ended keeps what it measured."""
    for rows in stages:
        for row in rows:
            row["config"] = row["config"] | made_of[row["case"]]
        append_rows(_BENCH, rows, out)
        yield from rows


def describe_making(judged: Any, outcome: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a row is made again by: the command, the MLflow run for `thorforge reproduce`, the recipe, the digests."""
    from tasks.reporting.record import list_digests  # noqa: PLC0415  Prefect reads the environment at import

    command = ["python", "-m", "benchmarks.bench_variants", "--variant", judged.name]
    command += ["--data", str(arguments.data)] if arguments.data else []
    command += ["--quality-only"] if arguments.quality_only else []
    digests, own = list_digests(outcome.study), ("teacher", "corpus", f"{judged.name} model", judged.name)
    variant = judged.candidate.variant
    return {
        "command": shlex.join(command),
        "run": outcome.run_id,
        "recipe": variant.model_dump(mode="json", include={"build", "steps", "method", "qdq"}),
        "digests": {name: digests[name] for name in own if name in digests},
    }


def collect_sentences(folder: Path, path: Path) -> Path:
    """The lines of all `*.txt.gz` of a folder, each once, as one text file: a corpus."""
    lines: dict[str, None] = {}
    for source in sorted(folder.glob("*.txt.gz")):
        with gzip.open(source, "rt", encoding="utf-8") as stream:
            lines |= dict.fromkeys(line.strip() for line in stream if line.strip())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def quality_rows(judged: Any, teacher: Any, common: dict[str, Any]) -> list[dict[str, Any]]:
    """Size, parameters and what the flow judged on its own corpus, beside the teacher's where it has such a number."""
    name, model, metrics = judged.name, judged.model, judged.quality.metrics
    sizes = (
        ("size_mb", "MB", judged.size_mb, measure_teacher_mb(teacher)),
        ("params", "parameters", model.num_parameters, teacher.num_parameters),
        ("encoder_params", "parameters", model.num_encoder_parameters, teacher.num_encoder_parameters),
    )
    rows = [make_row(_BENCH, name, *row, baseline_value=base, **common) for *row, base in sizes]
    for metric, measured in metrics.items():
        more: dict[str, Any] = {"low": measured.low, "high": measured.high}
        if f"{metric}_loss" in metrics:  # a loss is a share of the teacher's own score
            more |= _teachers_own(metrics, metric)
        elif metric in _TO_TEACHER:
            more["baseline_value"] = 1.0
        unit = "values" if metric == "nonfinite" else "share"
        rows.append(make_row(_BENCH, name, metric, unit, measured.value, **more, **common))
    return rows


def _teachers_own(metrics: dict[str, Any], metric: str) -> dict[str, Any]:
    """The teacher's own score as the baseline, told from the loss; nothing where that is all of it, or undefined."""
    left = 1 - metrics[f"{metric}_loss"].value
    return {"baseline_value": metrics[metric].value / left} if math.isfinite(left) and left else {}


def measure_teacher_mb(teacher: Any) -> float:
    """Bytes of the teacher's weights and tokenizer on disk, in units of 10^6: what a candidate's files stand for."""
    files = (teacher.tokenizer, *teacher.folder.rglob("*.safetensors"))
    return float(sum(path.stat().st_size for path in files)) / 1e6


def speed_rows(judged: Any, speeds: Any, common: dict[str, Any]) -> list[dict[str, Any]]:
    """Throughput at batch 32 and latency of single texts, against torch fp32 in the same run."""
    from tasks.benchmark import TORCH  # noqa: PLC0415

    torch, name = speeds.speeds[TORCH], judged.name
    common = {**common, "config": {**common["config"], "mean_tokens": speeds.mean_tokens}}
    percentiles = {f"p{p}": judged.speed.latency_ms(p) for p in (50, 95, 99)}
    return [
        make_row(
            _BENCH, name, "throughput_per_s", "texts/s", judged.speed.throughput_per_s,
            baseline_value=torch.throughput_per_s, **common,
        ),
        make_row(
            _BENCH, name, "latency_ms", "ms", percentiles["p50"],
            baseline_value=torch.latency_ms(50), **percentiles, **common,
        ),
    ]  # fmt: skip


def retrieval_rows(study: Any, folder: Path, common: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Each candidate on a BEIR folder: alone, and its queries on the index that the teacher embedded (`cross_`)."""
    from tasks.corpus import evaluation_sets, read_beir  # noqa: PLC0415  Prefect reads the environment at import
    from tasks.evaluate import compare_retrieval, open_judged  # noqa: PLC0415  the same
    from tasks.models.teacher import open_teacher  # noqa: PLC0415
    from tasks.progress import progress  # noqa: PLC0415

    retrieval = read_beir(folder)
    sets = {"queries": list(retrieval.queries.values()), "documents": list(retrieval.documents.values())}

    def embed(label: str, encode: Any) -> dict[str, Any]:
        with progress(f"{folder.name}: {label}", sum(map(len, sets.values()))) as advance:
            return {name: encode(texts, advance) for name, texts in sets.items()}

    teacher = embed("teacher", open_teacher(study.teacher.folder))
    sentences = evaluation_sets(study.corpus)[0]["sentences"]
    for judged in study.judged:
        encode, engine, _ = open_judged(judged.candidate, sentences)
        metrics = compare_retrieval(embed(judged.name, encode), teacher, retrieval)
        engine.close()
        rows = []
        for metric in ("ndcg_at_10", "recall_at_10", "cross_ndcg_at_10", "cross_recall_at_10"):
            found = metrics[metric]
            more = {
                **common,
                "config": {**common["config"], "judged_on": folder.name},
                **_teachers_own(metrics, metric),
            }
            rows.append(
                make_row(_BENCH, judged.name, metric, "share", found.value, low=found.low, high=found.high, **more)
            )
        yield rows


if __name__ == "__main__":
    sys.exit(main())
