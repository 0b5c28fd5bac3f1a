"""reproduce: a run made again from what MLflow keeps of it, and what came out beside what came out then."""

import logging
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from flows.config import ConfigRejected, OptimizeConfig
from flows.run import run_optimize
from tasks.reporting.record import RECORD_NAME, RunRecord, make_record
from tasks.state import state_dir
from tasks.tracking import default_tracking_uri, read_document

_log = logging.getLogger(__name__)

# What a row of the benchmarks says of a variant.
_METRICS = (
    "quality.cosine_mean", "quality.ndcg_at_10", "quality.cross_recall_at_10", "quality.sts_spearman",
    "size.disk_mb", "size.params", "speed.throughput_per_s",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pair:
    """One thing then and now: a digest or a metric; None where one of the two does not have it."""

    name: str
    then: str | float | None
    now: str | float | None

    @property
    def is_digest(self) -> bool:
        """Whether it must be the same, as metrics that time something need not be."""
        return isinstance(self.then or self.now, str)


def reproduce(
    run_id: str, tracking_uri: str | None, variants: tuple[str, ...] = (), dask_scheduler: str | None = None
) -> list[Pair]:
    """Run every step of that run again, for all of its variants or for these, with no cached result.

    Registry and tracking are of its own, below `reproduced` of the state folder: nothing is published twice. The Dask
    scheduler of then is not needed: it runs here, or on the workers of `dask_scheduler`.

    Raises TrackingFailed for a run that left no record, ConfigRejected for a variant that it did not have.
    """
    then = RunRecord.model_validate(read_document(tracking_uri, run_id, RECORD_NAME))
    place = state_dir() / "reproduced"
    settings = then.config | {
        "registry": str(place / "registry"),
        "tracking_uri": default_tracking_uri(place),
        "dask_scheduler": dask_scheduler,
    }
    unknown = set(variants).difference(then.config["variants"])
    if unknown:
        raise ConfigRejected(f"run {run_id} made no {min(unknown)!r}, it made {', '.join(then.config['variants'])}")
    config = OptimizeConfig.model_validate(settings | ({"variants": variants} if variants else {}))
    outcome = run_optimize(config, refresh=True)
    now = make_record(settings, outcome.study)
    for name in now.versions:
        if now.versions[name] != then.versions.get(name):
            _log.warning("library=%s then=%s now=%s", name, then.versions.get(name), now.versions[name])
    return compare(then, now)


def compare(then: RunRecord, now: RunRecord) -> list[Pair]:
    """Digests and, of each candidate of the second run, the metrics that rows are made of."""
    pairs = [Pair(name, then.digests.get(name), digest) for name, digest in now.digests.items()]
    for variant, metrics in now.metrics.items():
        before = then.metrics.get(variant, {})
        pairs += [
            Pair(f"{variant} {name}", before.get(name), metrics.get(name))
            for name in _METRICS
            if name in metrics or name in before
        ]
    return pairs


def is_same(pairs: list[Pair]) -> bool:
    """Whether every digest is what it was."""
    return all(pair.then == pair.now for pair in pairs if pair.is_digest)


def as_table(pairs: list[Pair]) -> Table:
    """Both beside one another."""
    table = Table("", "then", "now", "", box=SIMPLE_HEAD)
    for pair in pairs:
        mark = ("same" if pair.then == pair.now else "differs") if pair.is_digest else ""
        table.add_row(pair.name, _show(pair.then), _show(pair.now), mark)
    return table


def _show(value: str | float | None) -> str:
    if value is None:
        return "none"
    return value[:12] if isinstance(value, str) else f"{value:.6g}"
