"""MLflow: one parent run per optimisation, one child per candidate, the same keys in all; only here is it imported."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from serving.telemetry import disable_telemetry
from tasks.publish import Published
from tasks.select import Judged
from tasks.state import describe_process, is_dead, state_dir

# Quality metrics whose interval's bad end, which the gate compares, is logged beside them.
_WITH_BAD_END = (
    "cosine_mean",
    "ndcg_at_10_loss",
    "recall_at_10_loss",
    "cross_ndcg_at_10_loss",
    "cross_recall_at_10_loss",
    "sts_spearman_loss",
)
_PROCESS_TAG = "thorforge.process"


def default_tracking_uri() -> str:
    """SQLite below the state folder."""
    return f"sqlite:///{state_dir() / 'mlflow' / 'mlflow.db'}"


class Tracker:
    """An open parent run."""

    def __init__(self, client: Any, experiment_id: str, run_id: str) -> None:
        """Made by `track_run`."""
        self._client, self._experiment_id, self.run_id = client, experiment_id, run_id

    def log_candidate(self, judged: Judged, corpus: str) -> None:
        """One finished child run with metrics, tags and the full quality, speed and gate reports as artifacts."""
        variant = judged.candidate.variant
        tags = {
            "mlflow.parentRunId": self.run_id,
            "gate": judged.gate.reason,
            "method": variant.method,
            "steps": ", ".join(map(str, variant.steps)) or "none",
            "corpus": corpus,
            "compatibility": judged.compatibility,
        }
        run = self._client.create_run(self._experiment_id, run_name=judged.name, tags=tags)
        run_id = run.info.run_id
        # Few and short: the compare view draws the first of them as axes and cuts long values.
        params = {
            "engine": variant.runtime,
            "precision": variant.precision,
            "variant": variant.name,
            "verdict": judged.gate.verdict,
        }
        for name, value in params.items():
            self._client.log_param(run_id, name, value)
        self._log_metrics(run_id, judged)
        for name in ("quality", "speed", "gate"):
            report = getattr(judged, name).model_dump(mode="json")
            self._client.log_dict(run_id, report, f"{name}.json")
        self._client.set_terminated(run_id)

    def log_parent(self, winner: Judged | None, verdicts: dict[str, str]) -> None:
        """The chosen candidate's metrics on the parent, so that runs compare by what they would ship."""
        for name, verdict in verdicts.items():
            self._client.set_tag(self.run_id, f"verdict.{name}", verdict)
        self._client.set_tag(self.run_id, "chosen", winner.name if winner else "none")
        if winner is not None:
            self._log_metrics(self.run_id, winner)

    def log_figure(self, figure: Figure, name: str) -> None:
        """A picture under the parent run's artifacts."""
        self._client.log_figure(self.run_id, figure, name)

    def log_file(self, path: Path) -> None:
        """A file under the parent run's artifacts."""
        self._client.log_artifact(self.run_id, str(path))

    def register(self, published: Published, judged: Judged, bundle: Path) -> str:
        """A registered model version for a published bundle, tagged with digest and verdict; returns its number."""
        from mlflow.exceptions import MlflowException  # noqa: PLC0415

        try:
            self._client.create_registered_model(published.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for version in self._client.search_model_versions(f"name = '{published.name}'"):
            if version.tags.get("digest") == published.digest:
                return str(version.version)
        tags = {
            "digest": published.digest,
            "variant": published.variant,
            "verdict": judged.gate.verdict,
            "compatibility": judged.compatibility,
            "approver": "none yet",
        }
        made = self._client.create_model_version(published.name, bundle.as_uri(), run_id=self.run_id, tags=tags)
        return str(made.version)

    def _log_metrics(self, run_id: str, judged: Judged) -> None:
        for name, value in candidate_metrics(judged).items():
            self._client.log_metric(run_id, name, value)


def candidate_metrics(judged: Judged) -> dict[str, float]:
    """The one set of keys: `quality.*`, `speed.*`, `size.*`, `cost.*`; losses are shares of the teacher's score."""
    metrics: dict[str, float] = {}
    for name, measurement in judged.quality.metrics.items():
        metrics[f"quality.{name}"] = measurement.value
        if name in _WITH_BAD_END:
            metrics[f"quality.{name}.bad_end"] = measurement.high if name.endswith("_loss") else measurement.low
    for percent in (50, 95, 99):
        metrics[f"speed.p{percent}_ms"] = judged.speed.latency_ms(percent)
    metrics["speed.throughput_per_s"] = judged.speed.throughput_per_s
    metrics["speed.speedup_vs_torch"] = judged.speedup_vs_torch
    metrics["size.disk_mb"] = judged.size_mb
    metrics["size.params"] = judged.model.num_parameters
    metrics["size.encoder_params"] = judged.model.num_encoder_parameters
    if judged.speed.peak_memory_mb is not None:
        metrics["size.peak_memory_mb"] = judged.speed.peak_memory_mb
    metrics["cost.per_million_texts"] = judged.cost_per_million
    metrics["cost.node_seconds_per_million_texts"] = 1e6 / judged.speed.throughput_per_s
    return metrics


@contextmanager
def track_run(uri: str | None, experiment: str, params: dict[str, str], name: str | None = None) -> Iterator[Tracker]:
    """Open a parent run called `name` at `uri` (None: SQLite in the state folder).

    It ends FINISHED, FAILED on an error, or KILLED on Ctrl-C and termination.

    A run that died too fast to say so (kill -9, power) is marked KILLED here, by the next run.
    """
    client, experiment_id = _connect(uri or default_tracking_uri(), experiment)
    _close_dead_runs(client, experiment_id)
    tags = {_PROCESS_TAG: describe_process(os.getpid())}
    run = client.create_run(experiment_id, run_name=name, tags=tags)
    tracker = Tracker(client, experiment_id, run.info.run_id)
    try:
        for key, value in params.items():
            client.log_param(tracker.run_id, key, value)
        yield tracker
    except Exception:
        client.set_terminated(tracker.run_id, "FAILED")
        raise
    except BaseException:
        client.set_terminated(tracker.run_id, "KILLED")
        raise
    client.set_terminated(tracker.run_id, "FINISHED")


def _connect(uri: str, experiment: str) -> tuple[Any, str]:
    """A client, and the experiment's id; a new experiment on SQLite keeps its artifacts beside the database."""
    disable_telemetry()
    from mlflow import MlflowClient  # noqa: PLC0415  its import takes seconds and reads the environment

    location = None
    if uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).parent
        folder.mkdir(parents=True, exist_ok=True)
        location = (folder / "artifacts").as_uri()
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    if found:
        return client, found.experiment_id
    # The kind opens the pages for models rather than those for chat traces.
    tags = {"mlflow.experimentKind": "custom_model_development"}
    return client, client.create_experiment(experiment, artifact_location=location, tags=tags)


def _close_dead_runs(client: Any, experiment_id: str) -> None:
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'"):
        process = run.data.tags.get(_PROCESS_TAG)
        if process is not None and is_dead(process):
            client.set_terminated(run.info.run_id, "KILLED")
