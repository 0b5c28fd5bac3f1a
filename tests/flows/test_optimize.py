"""The whole flow on the tiny teacher, for real: Prefect API, MLflow on SQLite, a folder registry."""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.bert.modeling_bert import BertIntermediate
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.config import OptimizeConfig
from flows.optimize import Outcome, fetched_champion
from flows.reproduce import compare, is_same, reproduce
from flows.run import describe_outcome, run_optimize
from registry.client import list_bundles, pull
from registry.errors import StoreFull
from registry.events import Screened
from registry.ledger import read_ledger
from registry.manifest import read_manifest, verify_bundle
from registry.moves import move_channel
from registry.store import FolderStore
from tasks.benchmark import CHAMPION, TORCH
from tasks.errors import CorpusRejected, ExportFailed, StepRejected, TrackingFailed
from tasks.models.teacher import open_teacher
from tasks.reporting.record import RunRecord
from tasks.variants import Recipe
from tests.disks import mounted_disk
from tests.forge import write_corpus, write_sts
from tests.texts import make_sentences

# The tables of MLflow and of Prefect's server use what SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

VARIANTS = ("fp32-onnx", "int8-dynamic", "bf16-openvino", "student1", "pruned-static")
STUDENT = {"name": "student1", "build": "fp32-onnx", "steps": [{"kind": "distill", "depth": 1, "epochs": 0.5}]}
PRUNED = {
    "name": "pruned-static",
    "build": "int8-static",
    "steps": [{"kind": "prune", "ratio": 0.2, "calibration_size": 16, "epochs": 0.5}],
}
CACHED_TASKS = {"corpus", "distill-1", "prune-0.2", "export", "embed-teacher", "score-champion", "benchmark"} | {
    f"{verb}-{name}" for verb in ("quantize", "evaluate") for name in VARIANTS
}
FRESH_TASKS = {"load-teacher", "select", "record-verdicts", "report"}


@dataclass(frozen=True, slots=True)
class Runs:
    """Three runs in one state folder: the first, the same again by command line, and one that nobody passes."""

    config: OptimizeConfig
    state: Path
    first: Outcome
    first_states: dict[str, str]
    again: Result
    again_states: dict[str, str]
    refused: Result


@pytest.fixture(scope="module")
def runs(prefect_api: None, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

    root = tmp_path_factory.mktemp("optimize")
    corpus = write_corpus(root / "corpus.jsonl", 240)
    registry, sts = root / "registry", write_sts_of(tiny_teacher, root / "sts.tsv")
    settings = {"model": str(tiny_teacher), "corpus": str(corpus), "registry": str(registry)}
    table = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    recipe = (
        'recipe = [{name = "student1", build = "fp32-onnx", steps = [{kind = "distill", depth = 1, epochs = 0.5}]}, '
        '{name = "pruned-static", build = "int8-static", '
        'steps = [{kind = "prune", ratio = 0.2, calibration_size = 16, epochs = 0.5}]}]'
    )
    table = f"[optimize]\n{table}variants = {json.dumps(VARIANTS)}\ncalibration_size = 8\n{recipe}\n"
    (root / "same.toml").write_text(table)
    strict = f"{table}gate = {{ cosine_mean_pass = 1.0, cosine_mean_caution = 1.0, max_task_loss = -1.0 }}\n"
    (root / "strict.toml").write_text(strict)
    config = OptimizeConfig.model_validate(
        {**settings, "sts": [sts], "variants": VARIANTS, "recipe": [STUDENT, PRUNED], "calibration_size": 8}
    )
    runner = CliRunner(env={"COLUMNS": "250", "NO_COLOR": "1", "TERM": "dumb"})
    with pytest.MonkeyPatch.context() as patch, temporary_settings({PREFECT_LOCAL_STORAGE_PATH: root / "results"}):
        patch.setenv("THORFORGE_HOME", str(root / "state"))
        patch.chdir(root)
        with final_states() as first_states:
            first = run_optimize(config)
        with final_states() as again_states:
            again = runner.invoke(app, ["optimize", "--config", "same.toml", "--sts", str(sts), "--json"])
        refused = runner.invoke(app, ["optimize", "--config", "strict.toml"])
        yield Runs(config, root / "state", first, first_states, again, again_states, refused)


def write_sts_of(teacher: Path, path: Path) -> Path:
    """Pairs rated as the teacher itself would: its Spearman correlation is 1."""
    texts = make_sentences(80)
    embeddings = open_teacher(teacher)(texts, lambda steps: None)
    order = np.argsort((embeddings[::2] * embeddings[1::2]).sum(axis=1))
    return write_sts(path, [texts[2 * pair + side] for pair in order for side in (0, 1)])


class FinalStates(logging.Handler):
    """Collects the state each task run ends in, as Prefect logs it; its API learns of it only some time later."""

    def __init__(self) -> None:
        super().__init__()
        self.by_task: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        found = re.match(r"Finished in state (\w+)", record.getMessage())
        if found:
            self.by_task[getattr(record, "task_run_name", "")] = found[1]


@contextmanager
def final_states() -> Iterator[dict[str, str]]:
    handler, logger = FinalStates(), logging.getLogger("prefect.task_runs")
    logger.addHandler(handler)
    try:
        yield handler.by_task
    finally:
        logger.removeHandler(handler)


def last_line(result: Result) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return document


def mlflow_runs(state: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{state}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("optimize")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]))


def test_optimize_publishes_the_fastest_candidate_that_passes(runs: Runs) -> None:
    outcome = runs.first
    assert {row.name for row in outcome.study.judged} == set(VARIANTS)
    assert outcome.study.speeds.speeds.keys() == {TORCH, *VARIANTS}
    passed = [row for row in outcome.study.judged if row.gate.verdict == "pass"]
    assert outcome.published is not None
    assert outcome.published.variant == max(passed, key=lambda row: row.speed.throughput_per_s).name
    assert outcome.study.find("fp32-onnx").gate.verdict == "pass"


def test_optimize_records_every_verdict_and_equal_ones_once(runs: Runs) -> None:
    assert runs.first.published is not None
    entries = list(read_ledger(FolderStore(runs.config.registry), "tiny"))[::-1]
    chosen, refused = (entry.event for entry in entries[:2])
    assert isinstance(chosen, Screened)
    assert (chosen.bundle, chosen.champion) == (runs.first.published.digest, None)
    judged = runs.first.study.judged
    assert [one.report for one in chosen.candidates] == [row.gate for row in judged]
    assert [one.built for one in chosen.candidates] == [row.candidate.artifact.digest for row in judged]
    assert isinstance(refused, Screened)
    assert (refused.bundle, {one.report.verdict for one in refused.candidates}) == (None, {"fail"})


def test_optimize_bundle_is_in_the_registry_whole(runs: Runs, tmp_path: Path) -> None:
    published = runs.first.published
    assert published is not None
    store = FolderStore(runs.config.registry)
    assert [bundle.digest for bundle in list_bundles(store, "tiny")] == [published.digest]
    pull(store, "tiny", published.digest, tmp_path / "bundle")
    manifest = verify_bundle(tmp_path / "bundle", published.digest)
    assert (manifest.model_name, manifest.variant, manifest.version) == ("tiny", published.variant, published.version)
    assert manifest.lineage.mlflow_run_id == mlflow_runs(runs.state)[0].info.run_id


def test_optimize_writes_the_report(runs: Runs) -> None:
    page = runs.first.report.read_text(encoding="utf-8")
    assert runs.first.report.is_relative_to(runs.state / "reports")
    assert page.startswith("<!doctype html>")
    assert runs.first.published is not None
    assert runs.first.published.digest in page


def test_optimize_is_tracked_in_mlflow(runs: Runs) -> None:
    from mlflow import MlflowClient

    assert runs.first.published is not None
    found = mlflow_runs(runs.state)
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 3
    assert {run.info.status for run in found} == {"FINISHED"}
    first = parents[0]
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == first.info.run_id]
    assert {run.info.run_name for run in children} == set(VARIANTS)
    assert first.data.tags["chosen"] == runs.first.published.variant
    client = MlflowClient(tracking_uri=f"sqlite:///{runs.state}/mlflow/mlflow.db")
    student, pruned = (runs.first.study.find(name).model for name in ("student1", "pruned-static"))
    assert {file.path for file in client.list_artifacts(first.info.run_id)} == {
        "calibration.png",
        f"distill-{student.digest[:8]}.png",
        f"prune-{pruned.digest[:8]}.png",
        f"prune-{pruned.digest[:8]}-profile.png",
        "latency_cdf.png",
        "manifest.json",
        "pareto.png",
        "run.json",
        "sensitivity_pruned-static.png",
        runs.first.report.name,
    }
    versions = client.search_model_versions("name = 'tiny'")
    assert [version.tags["digest"] for version in versions] == [runs.first.published.digest]


def test_optimize_judges_on_sts_and_records_it(runs: Runs, tmp_path: Path) -> None:
    study, published = runs.first.study, runs.first.published
    assert published is not None
    for row in study.judged:
        assert "sts_spearman_loss" in {result.metric for result in row.gate.results}
        assert row.quality.metrics["sts_spearman"].value > (0.5 if row.candidate.variant.steps else 0.9)
    assert study.find("fp32-onnx").quality.metrics["sts_spearman"].value == pytest.approx(1, abs=1e-3)
    pull(FolderStore(runs.config.registry), "tiny", published.digest, tmp_path / "bundle")
    validation = read_manifest(tmp_path / "bundle").validation
    assert validation.sts_spearman == study.find(published.variant).quality.value("sts_spearman")
    assert validation.test_dataset == f"{runs.config.corpus}, {runs.config.sts[0]}"
    assert "STS loss %" in runs.first.report.read_text(encoding="utf-8")
    assert all(
        {"quality.sts_spearman", "quality.sts_spearman_loss.bad_end"} <= run.data.metrics.keys()
        for run in mlflow_runs(runs.state)[:4]
    )
    assert {row["name"]: row["sts_spearman"] for row in last_line(runs.again)["candidates"]} == {
        row.name: row.quality.value("sts_spearman") for row in study.judged
    }


def test_optimize_again_takes_every_step_from_the_cache_and_keeps_the_digest(runs: Runs) -> None:
    assert runs.again.exit_code == 0, runs.again.output
    document = last_line(runs.again)
    assert runs.first.published is not None
    assert document["published"]["digest"] == runs.first.published.digest
    fresh = FRESH_TASKS | {f"publish-{runs.first.published.variant}"}
    cached = CACHED_TASKS | {f"assemble-{runs.first.published.variant}"}
    assert runs.first_states == dict.fromkeys(cached | fresh, "Completed")
    assert runs.again_states == dict.fromkeys(cached, "Cached") | dict.fromkeys(fresh, "Completed")


def test_optimize_prints_the_same_document_every_time(runs: Runs) -> None:
    expected = json.loads(json.dumps(describe_outcome(runs.first)))
    document = last_line(runs.again)
    own = {"report": "", "run": ""}
    assert document | own == expected | own
    assert {row["name"] for row in document["candidates"]} == set(VARIANTS)


def test_optimize_publishes_nothing_under_a_gate_nobody_passes(runs: Runs) -> None:
    assert runs.refused.exit_code == 3, runs.refused.output
    assert "Published nothing." in runs.refused.stdout
    for name in VARIANTS:
        assert f"{name}: " in runs.refused.stdout
    assert "is over the limit -1" in runs.refused.stdout
    assert len(list_bundles(FolderStore(runs.config.registry), "tiny")) == 1
    last = [run for run in mlflow_runs(runs.state) if "mlflow.parentRunId" not in run.data.tags][-1]
    assert last.data.tags["chosen"] == "none"


def test_optimize_keeps_all_state_below_the_state_folder(runs: Runs) -> None:
    beside = {path.name for path in runs.state.parent.iterdir()}
    assert beside == {"corpus.jsonl", "registry", "results", "same.toml", "state", "strict.toml", "sts.tsv"}
    drafts = [path for path in (runs.state / "artifacts").iterdir() if path.name.startswith(".")]
    assert drafts == []


def test_optimize_measures_the_champion_in_the_same_run(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THORFORGE_HOME", str(runs.state))
    store = FolderStore(runs.config.registry)
    with fetched_champion(runs.config.registry, "tiny") as champion:
        assert champion is None
    assert runs.first.published is not None
    move_channel(store, "tiny", "production", runs.first.published.digest, None, moved_by="a test")
    outcome = run_optimize(runs.config.model_copy(update={"variants": ("fp32-onnx",)}))
    assert CHAMPION in outcome.study.speeds.speeds
    checked = {result.metric for result in outcome.study.judged[0].gate.results}
    ratios = {f"{name}_ratio_vs_champion" for name in ("latency", "p95", "throughput", "memory")}
    assert ratios | {"ndcg_at_10_loss_vs_champion", "recall_at_10_loss_vs_champion"} <= checked
    assert all(result.value is not None for result in outcome.study.judged[0].gate.results)
    with fetched_champion(runs.config.registry, "tiny") as champion:
        assert champion is not None
        assert read_manifest(champion).version == runs.first.published.version


def test_optimize_judges_a_student_against_the_teacher_and_counts_its_parameters(runs: Runs) -> None:
    study = runs.first.study
    student, whole = study.find("student1"), study.find("fp32-onnx")
    assert whole.model == study.teacher
    assert student.model.num_encoder_parameters * 2 == whole.model.num_encoder_parameters
    assert student.quality.metrics["cosine_mean"].value < 0.9999 < whole.quality.metrics["cosine_mean"].value
    run = next(run for run in mlflow_runs(runs.state) if run.info.run_name == "student1")
    assert run.data.metrics["size.params"] == student.model.num_parameters
    assert run.data.metrics["size.encoder_params"] == student.model.num_encoder_parameters
    assert run.data.tags["steps"] == "distill to 1 layers"
    page = runs.first.report.read_text(encoding="utf-8")
    assert "distill to 1 layers, then fp32-onnx" in page
    assert page.count("<svg") == 7  # Pareto, latencies, two of training, pruning profile, sensitivity, ranges


def test_optimize_refuses_what_only_a_later_step_would_before_anything_is_trained(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THORFORGE_HOME", str(runs.state))
    steps = [{"kind": "distill", "depth": 1, "epochs": 0.3}, {"kind": "trim", "ratio": 0.999}]
    trimmed = Recipe.model_validate(STUDENT | {"name": "trimmed", "steps": steps})
    variants = ("student1", "trimmed")
    config = runs.config.model_copy(update={"variants": variants, "recipe": (*runs.config.recipe, trimmed)})
    with final_states() as states, pytest.raises(StepRejected, match=r"trimming to 0 pieces: .* of tiny stay"):
        run_optimize(config)
    assert states == {"load-teacher": "Completed", "corpus": "Cached"}


def test_optimize_exports_the_teacher_before_anything_is_trained(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THORFORGE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(BertIntermediate, "forward", lambda module, hidden: torch.special.bessel_j0(hidden))
    config = runs.config.model_copy(update={"variants": ("student1",)})
    with final_states() as states, pytest.raises(ExportFailed, match="tiny cannot be exported to ONNX, encoder"):
        run_optimize(config, refresh=True)
    assert states == {"load-teacher": "Completed", "corpus": "Completed", "export": "Failed"}


def test_reproduce_makes_a_variant_again_to_the_same_digests_and_publishes_nothing(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THORFORGE_HOME", str(runs.state))
    before = list_bundles(FolderStore(runs.config.registry)), len(mlflow_runs(runs.state))
    with final_states() as states:
        again = CliRunner().invoke(
            app, ["reproduce", runs.first.run_id, "--variant", "int8-dynamic", "--variant", "student1", "--json"]
        )
    assert again.exit_code == 0, again.output
    assert states["quantize-int8-dynamic"] == states["distill-1"] == "Completed"
    pairs = {pair["name"]: (pair["then"], pair["now"]) for pair in json.loads(again.stdout.splitlines()[-1])}
    for name in ("teacher", "corpus", "int8-dynamic", "student1 model", "student1"):
        assert pairs[name][0] == pairs[name][1] is not None
    assert pairs["int8-dynamic quality.cosine_mean"][0] == pytest.approx(pairs["int8-dynamic quality.cosine_mean"][1])
    assert (list_bundles(FolderStore(runs.config.registry)), len(mlflow_runs(runs.state))) == before


def test_reproduce_of_a_run_without_a_record_says_so(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THORFORGE_HOME", str(runs.state))
    child = next(run for run in mlflow_runs(runs.state) if run.info.run_name == "fp32-onnx")
    with pytest.raises(TrackingFailed, match=rf"run {child.info.run_id} at sqlite:.* has no run\.json"):
        reproduce(child.info.run_id, None)
    with pytest.raises(TrackingFailed, match="0123"):
        reproduce("0123", None)


def test_reproduced_digest_that_differs_is_told_from_a_metric_that_does() -> None:
    then = RunRecord(config={}, versions={}, digests={"a": "1" * 64}, metrics={"a": {"speed.throughput_per_s": 10.0}})
    slower = then.model_copy(update={"metrics": {"a": {"speed.throughput_per_s": 5.0}}})
    other = then.model_copy(update={"digests": {"a": "2" * 64}})
    assert is_same(compare(then, slower))
    assert not is_same(compare(then, other))


@pytest.mark.parametrize("change", [{"corpus": "none.txt"}, {"sts": (Path("none.tsv"),)}])
def test_optimize_refuses_bad_input_at_once_and_without_a_stack_of_the_engine(
    change: dict[str, Any], runs: Runs, caplog: pytest.LogCaptureFixture
) -> None:
    with final_states() as states, pytest.raises(CorpusRejected, match="does not exist"):
        run_optimize(runs.config.model_copy(update=change))
    assert states == {}
    failed = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert failed
    assert not any(record.exc_info for record in failed)


def test_optimize_on_a_full_disk_names_the_folder_and_leaves_nothing_half_written(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {kind: disk_kibibytes(runs.state, kind) for kind in ("corpus", "export", "fp32-onnx")}
    monkeypatch.setenv("THORFORGE_HOME", str(tmp_path / "state"))
    config = runs.config.model_copy(update={"registry": str(tmp_path / "registry"), "variants": VARIANTS[:3]})
    room = sizes["corpus"] + sizes["export"] + sizes["fp32-onnx"] // 2
    with mounted_disk(tmp_path / "state" / "artifacts", room) as disk:
        with pytest.raises(StoreFull, match=rf"^{disk} is full: \d+ bytes free$"):
            run_optimize(config, refresh=True)
        assert {path.name.rpartition("-")[0] for path in disk.iterdir()} == {"corpus", "export"}
    assert not (tmp_path / "registry").exists()
    assert [run.info.status for run in mlflow_runs(tmp_path / "state")] == ["FAILED"]


def disk_kibibytes(state: Path, kind: str) -> int:
    """Whole pages that the largest artifact of a kind takes, in units of 2^10 bytes."""
    folders = (state / "artifacts").glob(f"{kind}-*")
    return max(sum(4 * (p.stat().st_size // 4096 + 1) for p in f.rglob("*") if p.is_file()) for f in folders)
