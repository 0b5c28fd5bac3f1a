"""Publish: put a candidate together as a bundle and push it to the registry."""

import json
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from prefect import task
from prefect.cache_policies import INPUTS, NO_CACHE
from pydantic import BaseModel, ConfigDict

from registry.client import push
from registry.events import Candidate, Screened
from registry.keys import user_name
from registry.ledger import append_once
from registry.manifest import (
    Cosine,
    EngineEntry,
    FileEntry,
    Lineage,
    Manifest,
    Performance,
    Validation,
    digest_of,
    payload_checksum,
    scan_files,
    verify_bundle,
    write_manifest,
)
from registry.store import open_store
from serving.tokenizer import TextTokenizer, pad_batch
from tasks.artifacts import CODE_AND_LIBRARIES, Artifact, draft
from tasks.benchmark import BATCH_SIZE, SpeedReport
from tasks.corpus import read_part
from tasks.graphs.graph_files import copy_model_files
from tasks.measurement.libraries import library_versions
from tasks.select import Judged, Study
from tasks.variants import Variant

_NUM_GOLDEN = 64


class Origin(BaseModel):
    """The run a bundle comes from; recorded in its lineage, but no reason to build it again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mlflow_run_id: str | None
    git_commit: str | None


class Published(BaseModel):
    """A bundle in the registry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    variant: str
    version: str
    digest: str


@task(
    task_run_name="assemble-{name}",
    cache_policy=(INPUTS - "origin") + CODE_AND_LIBRARIES,
    persist_result=True,
    result_serializer="json",
)
def assemble_bundle(study: Study, name: str, teacher_embeddings: Artifact, origin: Origin) -> Artifact:
    """Write the complete bundle: engine files, tokenizer, golden set, reports, manifest; verified before it counts.

    An engine bound to a kind of processor has a portable one beside it where the gate passed one.
    Raises ArtifactChanged when what it is made of is not what was judged, StoreFull.
    """
    judged = study.find(name)
    spare = study.find_spare(judged)
    parts = [row.candidate for row in (judged, spare) if row is not None]
    for artifact in (*(part.artifact for part in parts), study.corpus, teacher_embeddings):
        artifact.verify()
    with draft("bundle") as work:
        shutil.copytree(judged.candidate.artifact.folder, work.folder, dirs_exist_ok=True)
        for part in parts[1:]:
            copy_model_files(part.artifact.folder / part.engine.file, work.folder)
        _write_golden(work.folder, study, judged.candidate.max_seq_length, teacher_embeddings)
        _write_reports(work.folder, judged)
        files = scan_files(work.folder)
        engines = tuple(part.engine for part in parts)
        write_manifest(work.folder, _manifest(study, judged, origin, files, engines))
        verify_bundle(work.folder)
    return work.artifact


@task(task_run_name="record-verdicts", cache_policy=NO_CACHE)
def record_verdicts(study: Study, bundle: Artifact | None, registry: str | None) -> None:
    """Write the gate's verdict on every candidate into the ledger, whatever it is; equal verdicts are written once.

    `bundle` is what became of the chosen one, None where none was.
    """
    screened = Screened(
        candidates=tuple(
            Candidate(variant=row.name, built=row.candidate.artifact.digest, report=row.gate) for row in study.judged
        ),
        champion=study.champion,
        bundle=digest_of(bundle.folder) if bundle else None,
        screened_by=user_name(or_number=True),
    )
    append_once(open_store(registry), study.teacher.name, screened)


@task(task_run_name="publish-{variant}", cache_policy=NO_CACHE)
def publish(bundle: Artifact, variant: str, registry: str | None) -> Published:
    """Push a bundle to the registry (None: the default one); pushing what is there already changes nothing.

    Raises ArtifactChanged, StoreFull.
    """
    digest = push(bundle.verify(), open_store(registry))
    manifest = verify_bundle(bundle.folder, digest)
    return Published(name=manifest.model_name, variant=variant, version=manifest.version, digest=digest)


def find_git_commit() -> str | None:
    """The commit of the working folder, or None where it is no checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _write_golden(folder: Path, study: Study, max_length: int, teacher_embeddings: Artifact) -> None:
    """Token ids by the candidate's own tokenizer, which a step may have trimmed; embeddings by the teacher."""
    texts = read_part(study.corpus, "evaluation")[:_NUM_GOLDEN]
    input_ids, mask = pad_batch(TextTokenizer.from_folder(folder, max_length).encode(texts))
    embeddings = np.load(teacher_embeddings.folder / "sentences.npy", allow_pickle=False)[: len(texts)]
    np.savez(
        folder / "golden.npz", input_ids=input_ids.astype(np.int32), lengths=mask.sum(axis=1), embeddings=embeddings
    )


def _write_reports(folder: Path, judged: Judged) -> None:
    (folder / "reports").mkdir()
    for name, report in (("quality", judged.quality), ("speed", judged.speed), ("gate", judged.gate)):
        text = report.model_dump_json(indent=1, exclude={"scores"})  # query by query: ten times the rest
        (folder / "reports" / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")


def _manifest(
    study: Study, judged: Judged, origin: Origin, files: dict[str, FileEntry], engines: tuple[EngineEntry, ...]
) -> Manifest:
    teacher = study.teacher
    checksum = payload_checksum(files)
    variant = judged.candidate.variant
    parents = {"teacher": teacher.digest, "corpus": study.corpus.digest, "model": judged.model.digest}
    if study.champion is not None:
        parents["champion"] = study.champion  # the gate's ratios are to this one, and mean nothing beside another
    return Manifest(
        model_name=teacher.name,
        model_id=teacher.uri,
        variant=variant.name,
        version=f"{variant.name}-{checksum[:12]}",
        dimension=teacher.dimension,
        max_seq_length=teacher.max_seq_length,
        pooling=teacher.pooling,
        normalize=teacher.normalize,
        prompts=teacher.prompts,
        precision=variant.precision,
        compatibility=judged.compatibility,
        quantization=judged.candidate.quantization(study.corpus_uri, judged.quality.metrics["cosine_mean"].value),
        performance=_performance(judged, study.speeds),
        validation=_validation(judged, study),
        lineage=Lineage(
            parents=parents,
            recipe=_recipe(variant),
            git_commit=origin.git_commit,
            mlflow_run_id=origin.mlflow_run_id,
            versions={**library_versions(), "python": platform.python_version()},
        ),
        engines=engines,
        files=files,
        created_at=datetime.now(UTC),
        checksum=checksum,
    )


def _recipe(variant: Variant) -> dict[str, str]:
    steps = json.dumps([step.model_dump() for step in variant.steps])
    return {"variant": variant.name, "steps": steps, **variant.model_dump(include={"build", "method", "compute"})}


def _performance(judged: Judged, speeds: SpeedReport) -> Performance:
    speed = judged.speed
    assert speed.peak_memory_mb is not None, "every candidate's memory is measured"
    return Performance(
        latency_p50_ms=speed.latency_ms(50),
        latency_p95_ms=speed.latency_ms(95),
        latency_p99_ms=speed.latency_ms(99),
        throughput_qps=speed.throughput_per_s,
        gpu_memory_mb=None,
        peak_memory_mb=speed.peak_memory_mb,
        batch_size=BATCH_SIZE,
        hardware=speeds.hardware,
    )


def _validation(judged: Judged, study: Study) -> Validation:
    quality = judged.quality
    cosine = quality.metrics["cosine_mean"]
    return Validation(
        cosine_similarity_vs_fp32=Cosine(
            mean=cosine.value,
            p1=quality.metrics["cosine_p1"].value,
            min=quality.metrics["cosine_min"].value,
            ci=(cosine.low, cosine.high),
        ),
        overlap_at_10=quality.value("overlap_at_10"),
        recall_at_k=quality.value("recall_at_10"),
        ndcg_at_10=quality.value("ndcg_at_10"),
        cross_recall_at_10=quality.value("cross_recall_at_10"),
        cross_ndcg_at_10=quality.value("cross_ndcg_at_10"),
        sts_spearman=quality.value("sts_spearman"),
        test_dataset=", ".join([study.corpus_uri, *map(str, study.sts)]),
    )
