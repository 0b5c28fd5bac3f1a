"""optimize: from a teacher to a published, judged bundle. This file reads top to bottom as the pipeline."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import BaseModel, ConfigDict

from flows.config import OptimizeConfig
from flows.engines import build_engines, without_misfits
from flows.models import make_models
from flows.preflight import check_recipes
from flows.workers import dask_workers
from registry.cache import fetched
from registry.channel import read_channel
from registry.errors import ChannelNotFound
from registry.manifest import MANIFEST_NAME
from registry.store import open_store
from serving.telemetry import disable_telemetry
from tasks.artifacts import Artifact
from tasks.benchmark import benchmark
from tasks.corpus import build_corpus, corpus_fingerprint
from tasks.evaluate import evaluate, score_champion
from tasks.measurement.hardware import describe_hardware
from tasks.models.teacher import Teacher, embed_teacher, load_teacher
from tasks.production.delivery import cache_folder
from tasks.publish import Origin, Published, assemble_bundle, find_git_commit, publish, record_verdicts
from tasks.quantize import quantize
from tasks.report import plot_study, report
from tasks.reporting.record import RECORD_NAME, make_record
from tasks.select import Study, choose, select
from tasks.state import state_dir
from tasks.steps import Step
from tasks.tracking import Tracker, track_run
from tasks.variants import KERNEL_VARIANTS, Variant


class Outcome(BaseModel):
    """What an `optimize` run found, published and wrote."""

    model_config = ConfigDict(frozen=True)

    study: Study
    published: Published | None
    report: Path
    run_id: str


# One task at a time: an engine keeps every core busy, and two at once spin against each other.
@flow(name="optimize", task_runner=ThreadPoolTaskRunner(max_workers=1))  # type: ignore[arg-type]
def optimize(config: OptimizeConfig) -> Outcome:
    """Forge every variant of a model, judge each honestly, publish the best one that passes the gate."""
    disable_telemetry()
    fingerprint = corpus_fingerprint(config.corpus, config.sts)
    teacher = load_teacher(config.model, config.name)
    config, misfits = without_misfits(config, teacher)
    limits, price = config.gate.for_model(teacher.name), config.price_per_node_hour
    tracked = track_run(config.tracking_uri, "optimize", _params(config), f"optimize {teacher.name}")
    production = fetched_champion(config.registry, teacher.name)
    with tracked as tracker, dask_workers(config.dask_scheduler), production as champion:
        corpus = build_corpus(config.corpus, config.sts, fingerprint)
        variants, hardware = [v.within(limits) for v in config.recipes()], describe_hardware()
        check_recipes(teacher, variants, corpus, config.calibration_size)
        models, exported = make_models(teacher, variants, corpus)
        how = (teacher.max_seq_length, corpus, config.calibration_size)
        building = [_submit_build(variant, models, exported, how) for variant in variants]
        teacher_embeddings = embed_teacher.submit(teacher, corpus).result()
        candidates, not_built = build_engines([future.result() for future in building], config.tensorrt)
        judging = [evaluate.submit(candidate, corpus, teacher_embeddings, hardware) for candidate in candidates]
        qualities = [future.result() for future in judging]
        # Alone on the machine: every candidate is judged by now.
        scores = score_champion(champion, corpus, hardware)
        speeds = benchmark(candidates, teacher, corpus, hardware, champion)
        study = Study(
            teacher=teacher,
            corpus_uri=config.corpus,
            corpus=corpus,
            sts=config.sts,
            speeds=speeds,
            limits=limits,
            champion=champion.name if champion else None,
            judged=tuple(select(candidates, qualities, speeds, limits, models, bool(config.sts), scores, price)),
            not_built=(*misfits, *not_built),
            select_by=config.select_by,
        )
        published, bundle = _publish_best(study, teacher_embeddings, tracker.run_id, config.registry)
        page = report(state_dir() / "reports" / str(flow_run.name) / "report.html", study, published)
        tracker.log_document(make_record(config.model_dump(mode="json"), study).model_dump(), RECORD_NAME)
        _track(tracker, study, published, bundle, page)
    return Outcome(study=study, published=published, report=page, run_id=tracker.run_id)


def _publish_best(
    study: Study, teacher_embeddings: Artifact, run_id: str, registry: str | None
) -> tuple[Published | None, Artifact | None]:
    """The bundle of the candidate that the rule chooses, in the registry; nothing where the gate passed none.

    Either way the ledger has every verdict before anything is published.
    """
    winner = choose(study.judged, study.select_by)
    if winner is None:
        record_verdicts(study, None, registry)
        return None, None
    origin = Origin(mlflow_run_id=run_id, git_commit=find_git_commit())
    bundle = assemble_bundle(study, winner.name, teacher_embeddings, origin)
    record_verdicts(study, bundle, registry)
    return publish(bundle, winner.name, registry), bundle


@contextmanager
def fetched_champion(registry: str | None, name: str) -> Iterator[Path | None]:
    """The verified bundle that `production` points at, or None where nothing is in production yet."""
    store = open_store(registry)
    try:
        digest = read_channel(store, name, "production").digest
    except ChannelNotFound:
        yield None
        return
    with fetched(store, name, digest, cache_folder()) as folder:
        yield folder


def _submit_build(
    variant: Variant,
    models: Mapping[tuple[Step, ...], Teacher],
    exported: Mapping[tuple[Step, ...], Artifact],
    how: tuple[int, Artifact, int],
) -> Any:
    """The future of one candidate: from the exported graph, or from the weights for an engine of our own."""
    if variant.build not in KERNEL_VARIANTS:
        return quantize.submit(variant, exported[variant.steps], *how)
    from tasks.encoder import build_encoder  # noqa: PLC0415  torch: seconds that no other variant pays

    _, corpus, calibration_size = how
    return build_encoder.submit(variant, models[variant.steps], corpus, calibration_size)


def _params(config: OptimizeConfig) -> dict[str, str]:
    """The run's parameters, as MLflow shows them."""
    return {
        "model": config.model,
        "corpus": config.corpus,
        "sts": ", ".join(map(str, config.sts)) or "none",
        "variants": ", ".join(config.variants),
        "calibration_size": str(config.calibration_size),
        "select_by": config.select_by,
        "price_per_node_hour": str(config.price_per_node_hour),
    }


def _track(tracker: Tracker, study: Study, published: Published | None, bundle: Artifact | None, page: Path) -> None:
    """Everything a person would look for in MLflow: children, pictures, report, manifest, registered version."""
    for row in study.judged:
        tracker.log_candidate(row, study.corpus_uri)
    winner = study.find(published.variant) if published else None
    tracker.log_parent(winner, {row.name: row.gate.verdict for row in study.judged}, study.not_built_reasons())
    for name, figure in plot_study(study).items():
        tracker.log_figure(figure, f"{name}.png")
    tracker.log_file(page)
    if published and winner and bundle:
        tracker.log_file(bundle.folder / MANIFEST_NAME)
        tracker.register(published, winner)
