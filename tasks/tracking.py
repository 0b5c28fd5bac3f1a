"""MLflow: a run per optimisation, a child per candidate, a version per bundle, aliases; only here is it imported."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, get_args

from serving.telemetry import disable_telemetry
from tasks.errors import TrackingFailed
from tasks.publish import Published
from tasks.select import Judged
from tasks.state import describe_process, is_dead, state_dir

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Quality metrics whose interval's bad end, which the gate compares, is logged beside them.
_WITH_BAD_END = (
    "cosine_mean",
    "ndcg_at_10_loss",
    "recall_at_10_loss",
    "cross_ndcg_at_10_loss",
    "cross_recall_at_10_loss",
    "sts_spearman_loss",
)
_MAX_TAG = 5000  # characters that every MLflow takes
_PROCESS_TAG = "thorforge.process"

Alias = Literal["champion", "candidate", "previous"]
ALIASES: tuple[Alias, ...] = get_args(Alias)


def default_tracking_uri(folder: Path | None = None) -> str:
    """SQLite below `folder`, by default the state folder."""
    return f"sqlite:///{(folder or state_dir()) / 'mlflow' / 'mlflow.db'}"


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
            "method": judged.candidate.method[:_MAX_TAG],
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
            report = getattr(judged, name).model_dump(mode="json", exclude={"scores"})
            self._client.log_dict(run_id, report, f"{name}.json")
        self._client.set_terminated(run_id)

    def log_parent(self, winner: Judged | None, verdicts: Mapping[str, str], not_built: Mapping[str, str]) -> None:
        """The chosen candidate's metrics on the parent, so that runs compare by what they would ship; every verdict,
        and why a variant has none."""
        for name, verdict in verdicts.items():
            self._client.set_tag(self.run_id, f"verdict.{name}", verdict)
        for name, reason in not_built.items():
            self._client.set_tag(self.run_id, f"not_built.{name}", reason[:_MAX_TAG])
        self._client.set_tag(self.run_id, "chosen", winner.name if winner else "none")
        if winner is not None:
            self._log_metrics(self.run_id, winner)

    def log_figure(self, figure: "Figure", name: str) -> None:
        """A picture under the parent run's artifacts."""
        self._client.log_figure(self.run_id, figure, name)

    def log_document(self, document: dict[str, Any], name: str) -> None:
        """JSON values under the parent run's artifacts."""
        self._client.log_dict(self.run_id, document, name)

    def log_file(self, path: Path) -> None:
        """A file under the parent run's artifacts."""
        self._client.log_artifact(self.run_id, str(path))

    def register(self, published: Published, judged: Judged) -> str:
        """A registered model version for a published bundle, tagged with digest and verdict; returns its number."""
        tags = {
            "variant": published.variant,
            "verdict": judged.gate.verdict,
            "compatibility": judged.compatibility,
            "approver": "none yet",
        }
        return _find_or_create_version(self._client, published.name, published.digest, self.run_id, tags)

    def _log_metrics(self, run_id: str, judged: Judged) -> None:
        for name, value in candidate_metrics(judged).items():
            self._client.log_metric(run_id, name, value)


class ModelAliases:
    """The aliases of one registered model, by the digests of the bundles whose versions they name."""

    def __init__(self, uri: str | None, model: str) -> None:
        """At `uri`, or in the state folder's SQLite. Raises TrackingFailed."""
        self._model = model
        with _failures_named(uri):
            self._client = _open_client(uri or default_tracking_uri())

    def read(self) -> dict[Alias, str]:
        """Alias → digest; a version that was registered by hand and has no digest shows as its number."""
        with _failures_named(None):
            set_at = _read_registered_aliases(self._client, self._model)
            return {alias: self._digest_of(set_at[alias]) for alias in ALIASES if alias in set_at}

    def write(self, wanted: Mapping[Alias, str | None], tags: Mapping[str, str] | None = None) -> None:
        """Point each alias at the version of its digest (None: at nothing); `tags` go to the champion's version.

        A bundle that MLflow has never seen is registered. What is right already is not written again.
        """
        with _failures_named(None):
            now = self.read()
            for alias, digest in wanted.items():
                if now.get(alias) == digest:
                    continue
                if digest is None:
                    self._client.delete_registered_model_alias(self._model, alias)
                else:
                    version = _find_or_create_version(self._client, self._model, digest, None, {})
                    self._client.set_registered_model_alias(self._model, alias, version)
            champion = wanted.get("champion")
            if champion is not None:
                version = _find_or_create_version(self._client, self._model, champion, None, {})
                for key, value in (tags or {}).items():
                    self._client.set_model_version_tag(self._model, version, key, value)

    def find_report(self, run_id: str | None) -> str | None:
        """The page of the run's HTML report on an MLflow server; None where there is no such run, or no server."""
        uri = self._client.tracking_uri
        if run_id is None or not uri.startswith(("http://", "https://")):
            return None
        with _failures_named(uri):
            experiment = self._client.get_run(run_id).info.experiment_id
        return f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}/artifacts/report.html"

    def _digest_of(self, version: str) -> str:
        tags = self._client.get_model_version(self._model, version).tags
        return str(tags.get("digest") or f"version {version}")


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


def read_document(uri: str | None, run_id: str, name: str) -> dict[str, Any]:
    """The JSON document `name` of a run at `uri` (None: in the state folder). Raises TrackingFailed."""
    place = uri or default_tracking_uri()
    with _failures_named(place):
        client = _open_client(place)
        if name not in {file.path for file in client.list_artifacts(run_id)}:
            raise TrackingFailed(f"MLflow run {run_id} at {place} has no {name}: it was made before, or did not finish")
        with TemporaryDirectory() as folder:
            text = Path(client.download_artifacts(run_id, name, folder)).read_text(encoding="utf-8")
    return dict(json.loads(text))


@contextmanager
def track_run(uri: str | None, experiment: str, params: dict[str, str], name: str | None = None) -> Iterator[Tracker]:
    """Open a parent run called `name` at `uri` (None: SQLite in the state folder).

    Raises TrackingFailed, before any work, where there is no MLflow.

    It ends FINISHED, FAILED on an error, or KILLED on Ctrl-C and termination.

    A run that died too fast to say so (kill -9, power) is marked KILLED here, by the next run.
    """
    place = uri or default_tracking_uri()
    with _failures_named(place):
        client, experiment_id = _connect(place, experiment)
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
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).parent / "artifacts").as_uri()
    client = _open_client(uri)
    found = client.get_experiment_by_name(experiment)
    if found:
        return client, found.experiment_id
    # The kind opens the pages for models rather than those for chat traces.
    tags = {"mlflow.experimentKind": "custom_model_development"}
    return client, client.create_experiment(experiment, artifact_location=location, tags=tags)


def _open_client(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # its own 7 wait four minutes for a dead server
    from mlflow import MlflowClient  # noqa: PLC0415  its import takes seconds and reads the environment

    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


@contextmanager
def _failures_named(uri: str | None) -> Iterator[None]:
    """MLflow's own errors as TrackingFailed, in one line; a password in the URI is not repeated."""
    disable_telemetry()
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    try:
        yield
    except (MlflowException, OSError) as error:
        said = f"MLflow{f' at {uri}' if uri else ''}: {str(error).splitlines()[0]}"
        raise TrackingFailed(re.sub(r"//[^/@\s]+@", "//", said)) from None


def _read_registered_aliases(client: Any, model: str) -> dict[str, str]:
    """Alias → version number, as MLflow has them; empty for a model it does not know."""
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    try:
        return {str(alias): str(version) for alias, version in client.get_registered_model(model).aliases.items()}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}


def _find_or_create_version(client: Any, model: str, digest: str, run_id: str | None, tags: dict[str, str]) -> str:
    """The number of the version that stands for the bundle `digest`."""
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    try:
        client.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in client.search_model_versions(f"name = '{model}' and tags.digest = '{digest}'"):
        return str(version.version)
    # Names the bundle, not a place: MLflow's server refuses local paths, and a registry can move.
    source = f"thorforge://registry/{model}/{digest}"
    made = client.create_model_version(model, source, run_id=run_id, tags={"digest": digest, **tags})
    return str(made.version)


def _close_dead_runs(client: Any, experiment_id: str) -> None:
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'"):
        process = run.data.tags.get(_PROCESS_TAG)
        if process is not None and is_dead(process):
            client.set_terminated(run.info.run_id, "KILLED")
