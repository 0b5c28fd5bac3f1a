"""Record: what a run can be made again from, and what came out, kept with the run in MLflow."""

import math
from typing import Any

from pydantic import BaseModel, ConfigDict

from tasks.measurement.libraries import library_versions
from tasks.select import Study
from tasks.tracking import candidate_metrics

RECORD_NAME = "run.json"


class RunRecord(BaseModel):
    """Every setting (recipes with their seeds too), libraries, digests of what was made, and what was measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: dict[str, Any]
    versions: dict[str, str]
    digests: dict[str, str]
    metrics: dict[str, dict[str, float]]


def make_record(config: dict[str, Any], study: Study) -> RunRecord:
    """The record of a run with these settings."""
    return RunRecord(
        config=config,
        versions=library_versions(),
        digests=list_digests(study),
        metrics={
            row.name: {name: value for name, value in candidate_metrics(row).items() if math.isfinite(value)}
            for row in study.judged
        },
    )


def list_digests(study: Study) -> dict[str, str]:
    """Digests of teacher and corpus, and of each candidate with the model that it was made of."""
    digests = {"teacher": study.teacher.digest, "corpus": study.corpus.digest}
    for row in study.judged:
        if row.candidate.variant.steps:
            digests[f"{row.name} model"] = row.model.digest
        digests[row.name] = row.candidate.artifact.digest
    return digests
