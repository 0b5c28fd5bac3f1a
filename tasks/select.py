"""Select: the gate's verdict on every candidate, the Pareto front, and the one to publish."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict

from registry.gate import Check, GateLimits, GateRecord, Measurement, default_checks, judge
from registry.manifest import Compatibility
from tasks.artifacts import Artifact
from tasks.benchmark import CHAMPION, Speed, SpeedReport
from tasks.build import NotBuilt
from tasks.evaluate import Quality
from tasks.models.teacher import Teacher
from tasks.quantize import Candidate
from tasks.settings import Criterion
from tasks.steps import Step

_BEST: dict[Criterion, str] = {
    "throughput": "highest throughput at batch 32",
    "latency": "lowest 95th percentile of latency for single texts",
    "size": "smallest size on disk",
    "cost": "lowest cost of a million texts",
}
# A candidate's queries on the teacher's index may lose this share of the teacher's score and still be a drop-in.
_MAX_CROSS_LOSS = 0.01
# Kernels of our own, each for a kind of processor, and the runtime that has one for every kind.
_BOUND, _PORTABLE = ("avx512", "cuda"), "onnxruntime"
_DROP_IN_CHECKS = tuple(
    Check(metric=f"cross_{task}_loss", kind="max", limit=_MAX_CROSS_LOSS) for task in ("ndcg_at_10", "recall_at_10")
)


class Judged(BaseModel):
    """A candidate with all that is known of it: its model, quality, speed, verdict, compatibility, Pareto front."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    candidate: Candidate
    model: Teacher
    quality: Quality
    speed: Speed
    speedup_vs_torch: float
    gate: GateRecord
    compatibility: Compatibility
    cost_per_million: float
    is_on_pareto_front: bool

    @property
    def name(self) -> str:
        """The variant's name."""
        return self.candidate.variant.name

    @property
    def size_mb(self) -> float:
        """Bytes on disk as served, in units of 10^6."""
        return self.candidate.disk_bytes / 1e6

    def score(self, by: Criterion) -> float:
        """What the candidate is chosen by; less is better."""
        scores: dict[Criterion, float] = {
            "throughput": -self.speed.throughput_per_s,
            "latency": self.speed.latency_ms(95),
            "size": self.size_mb,
            "cost": self.cost_per_million,
        }
        return scores[by]


class Study(BaseModel):
    """Everything a run found out: what the report shows and a bundle's manifest records."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: Teacher
    corpus_uri: str
    corpus: Artifact
    sts: tuple[Path, ...] = ()
    speeds: SpeedReport
    limits: GateLimits
    champion: str | None = None  # digest of the bundle in production that was measured beside the candidates
    judged: tuple[Judged, ...]
    not_built: tuple[NotBuilt, ...] = ()
    select_by: Criterion = "throughput"

    @property
    def rule(self) -> str:
        """The selection rule in words."""
        return f"of the candidates the gate passes, the one with the {_BEST[self.select_by]}"

    def explain(self) -> dict[str, str]:
        """Why each candidate that is not the chosen one was passed over, by how much; also what was not built."""
        winner = choose(self.judged, self.select_by)
        reasons = {row.name: _explain(row, winner, self.select_by) for row in self.judged if row is not winner}
        return reasons | {name: f"not built: {reason}" for name, reason in self.not_built_reasons().items()}

    def not_built_reasons(self) -> dict[str, str]:
        """Why each variant that was meant to be built was not."""
        return {each.variant: each.reason for each in self.not_built}

    def find(self, name: str) -> Judged:
        """The judged candidate of that variant."""
        return next(row for row in self.judged if row.name == name)

    def find_spare(self, winner: Judged) -> Judged | None:
        """What stands in for `winner` on a processor without its kernels, and for a text on which these fail.

        The smallest candidate of the same model that the gate passes, that runs everywhere and that an index of the
        teacher's may stay for where it may for the winner: two runs of a recipe agree on it, which they would not on
        the fastest. None where there is none, or where the winner needs none.
        """
        if winner.candidate.engine.runtime not in _BOUND:
            return None
        fitting = (
            row
            for row in self.judged
            if row.candidate.engine.runtime == _PORTABLE
            and row.model.digest == winner.model.digest
            and row.gate.verdict == "pass"
            and row.compatibility in {"drop-in", winner.compatibility}
        )
        return min(fitting, key=lambda row: (row.size_mb, row.name), default=None)


@task(task_run_name="select", cache_policy=NO_CACHE)
def select(
    candidates: list[Candidate],
    qualities: list[Quality],
    speeds: SpeedReport,
    limits: GateLimits,
    models: Mapping[tuple[Step, ...], Teacher],
    with_sts: bool = False,
    champion_scores: dict[str, list[float]] | None = None,
    price_per_node_hour: float = 0.0,
) -> list[Judged]:
    """Judge every candidate, fastest first; the gate decides, the Pareto front explains.

    `models` are those the candidates were built from, by the steps that made them; `champion_scores` are the
    champion's, query by query, where there is one.
    """
    front = pareto_front(candidates, qualities, speeds, price_per_node_hour)
    checks = default_checks(limits, with_sts=with_sts, with_champion=CHAMPION in speeds.speeds)
    judged = [
        Judged(
            candidate=candidate,
            model=models[candidate.variant.steps],
            quality=quality,
            speed=speeds.speeds[candidate.variant.name],
            speedup_vs_torch=speeds.speedup_vs_torch(candidate.variant.name),
            gate=judge(_gated_metrics(candidate, quality, speeds, champion_scores or {}), checks),
            compatibility=judge_compatibility(quality),
            cost_per_million=_cost(speeds.speeds[candidate.variant.name], price_per_node_hour),
            is_on_pareto_front=candidate.variant.name in front,
        )
        for candidate, quality in zip(candidates, qualities, strict=True)
    ]
    return sorted(judged, key=lambda row: -row.speed.throughput_per_s)


def _gated_metrics(
    candidate: Candidate, quality: Quality, speeds: SpeedReport, champion_scores: dict[str, list[float]]
) -> dict[str, Measurement]:
    ratios = speeds.champion_ratios(candidate.variant.name)
    return {**quality.metrics, **quality.losses_vs(champion_scores), **ratios}


def choose(judged: Iterable[Judged], by: Criterion = "throughput") -> Judged | None:
    """The candidate to publish: the best that passes, of equal ones the first; None when the gate passed none."""
    return min((row for row in judged if row.gate.verdict == "pass"), key=lambda row: row.score(by), default=None)


def _explain(row: Judged, winner: Judged | None, by: Criterion) -> str:
    failed = [result.reason for result in row.gate.results if result.verdict != "pass"]
    if failed or winner is None:
        return "; ".join(failed) or row.gate.reason
    own, best = abs(row.score(by)), abs(winner.score(by))
    return f"passes, but {by} is {own:.4g} and that of {winner.name} {best:.4g}"


def _cost(speed: Speed, price_per_node_hour: float) -> float:
    """What a million texts cost on a node that does nothing else."""
    return price_per_node_hour * 1e6 / speed.throughput_per_s / 3600


def judge_compatibility(quality: Quality) -> Compatibility:
    """`drop-in` when queries embedded by the candidate find what they should in the teacher's index, else `reindex`.

    Fails closed: the interval's bad end counts, and a corpus that cannot tell means `reindex`.
    """
    return "drop-in" if judge(quality.metrics, _DROP_IN_CHECKS).verdict == "pass" else "reindex"


def _or_worst(cosine: float) -> float:
    """What is no number would be beaten by nothing."""
    return cosine if math.isfinite(cosine) else -math.inf


def pareto_front(
    candidates: list[Candidate], qualities: list[Quality], speeds: SpeedReport, price_per_node_hour: float = 0.0
) -> set[str]:
    """Names that no other candidate beats in cosine, throughput, latency, size and cost at once."""
    points: dict[str, tuple[float, ...]] = {
        candidate.variant.name: (
            _or_worst(quality.metrics["cosine_mean"].value),
            speeds.speeds[candidate.variant.name].throughput_per_s,
            -speeds.speeds[candidate.variant.name].latency_ms(50),
            -candidate.disk_bytes,
            -_cost(speeds.speeds[candidate.variant.name], price_per_node_hour),
        )
        for candidate, quality in zip(candidates, qualities, strict=True)
    }

    def is_beaten(name: str) -> bool:
        own = points[name]
        others = (point for other, point in points.items() if other != name)
        return any(point != own and all(a >= b for a, b in zip(point, own, strict=True)) for point in others)

    return {name for name in points if not is_beaten(name)}
