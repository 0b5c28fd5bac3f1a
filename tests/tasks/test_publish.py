import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from prefect import flow
from prefect.client.schemas.objects import State

from registry.manifest import digest_of, read_manifest, verify_bundle
from serving.engines import open_engine
from serving.tokenizer import pad_batch
from tasks.artifacts import Artifact
from tasks.errors import ArtifactChanged
from tasks.export import export_onnx
from tasks.publish import Origin, Published, assemble_bundle, find_git_commit, publish
from tasks.quantize import quantize
from tasks.variants import VARIANTS
from tests.forge import CALIBRATION_SIZE, Forge

ORIGIN = Origin(mlflow_run_id="run-1", git_commit="c" * 40)


@pytest.fixture
def bundle(forge: Forge) -> Path:
    return assemble_bundle.fn(forge.study, "fp32-onnx", forge.teacher_embeddings, ORIGIN).folder


def test_bundle_verifies_and_records_what_it_is(bundle: Path, forge: Forge) -> None:
    manifest, study = verify_bundle(bundle), forge.study
    judged, teacher = study.find("fp32-onnx"), study.teacher
    assert (manifest.model_name, manifest.model_id, manifest.variant) == (teacher.name, teacher.uri, "fp32-onnx")
    assert (manifest.dimension, manifest.max_seq_length) == (teacher.dimension, teacher.max_seq_length)
    assert manifest.engines == (judged.candidate.engine,)
    assert manifest.quantization is None
    assert manifest.compatibility == judged.compatibility == "drop-in"
    assert manifest.performance.latency_p95_ms == judged.speed.latency_ms(95)
    assert manifest.performance.hardware == study.speeds.hardware
    assert manifest.validation.ndcg_at_10 == judged.quality.value("ndcg_at_10")
    assert manifest.validation.cosine_similarity_vs_fp32.mean == pytest.approx(1, abs=1e-5)


def test_bundle_lineage_leads_back_to_teacher_and_corpus(bundle: Path, forge: Forge) -> None:
    lineage = read_manifest(bundle).lineage
    teacher, corpus = forge.study.teacher.digest, forge.study.corpus.digest
    assert lineage.parents == {"teacher": teacher, "corpus": corpus, "model": teacher}
    assert lineage.recipe["variant"] == "fp32-onnx"
    assert (lineage.mlflow_run_id, lineage.git_commit) == ("run-1", "c" * 40)
    assert {"python", "onnxruntime", "torch"} <= lineage.versions.keys()


def test_bundle_engine_reproduces_its_golden_set(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    with np.load(bundle / "golden.npz", allow_pickle=False) as golden:
        input_ids, lengths, expected = golden["input_ids"], golden["lengths"], golden["embeddings"]
    assert len(lengths) == len(expected) == 64
    rows = [row[:length].astype(np.int64) for row, length in zip(input_ids, lengths, strict=True)]
    engine = open_engine(bundle, manifest.engines[0])
    np.testing.assert_allclose(engine.embed(*pad_batch(rows)), expected, atol=1e-5)
    engine.close()


def test_bundle_holds_its_reports_and_no_text_of_the_corpus(bundle: Path, forge: Forge) -> None:
    judged = forge.study.find("fp32-onnx")
    for name in ("quality", "speed", "gate"):
        report = json.loads((bundle / "reports" / f"{name}.json").read_text())
        expected = json.loads(getattr(judged, name).model_dump_json())
        expected.pop("scores", None)  # query by query: needed in the run alone
        assert report == expected
    assert "harbour" not in (bundle / "manifest.json").read_text()


@pytest.mark.parametrize("name", ["int8-dynamic", "int8-static", "int8-openvino", "bf16-openvino"])
def test_bundle_of_every_variant_verifies(name: str, forge: Forge) -> None:
    folder = assemble_bundle.fn(forge.study, name, forge.teacher_embeddings, ORIGIN).folder
    manifest = verify_bundle(folder)
    assert (manifest.quantization is not None) == name.startswith("int8")
    engine = open_engine(folder, manifest.engines[0])
    engine.close()


def test_bundle_of_our_own_kernels_has_a_portable_engine_beside_them(
    forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.select._BOUND", ("openvino",))  # whose files every machine can write
    spare = forge.study.find_spare(forge.study.find("int8-openvino"))
    assert spare is not None
    folder = assemble_bundle.fn(forge.study, "int8-openvino", forge.teacher_embeddings, ORIGIN).folder
    manifest = verify_bundle(folder)
    assert [entry.runtime for entry in manifest.engines] == ["openvino", "onnxruntime"]
    assert manifest.variant == "int8-openvino"
    for entry in manifest.engines:
        open_engine(folder, entry).close()


def test_bundle_has_the_weights_of_a_large_spare_too(forge: Forge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.select._BOUND", ("openvino",))
    monkeypatch.setattr("tasks.graphs.graph_files.MAX_INLINE_BYTES", 1000)
    exported, corpus = export_onnx.fn(forge.study.teacher), forge.study.corpus
    large = quantize.fn(VARIANTS["fp32-onnx"], exported, forge.study.teacher.max_seq_length, corpus, CALIBRATION_SIZE)
    spare = forge.study.find("fp32-onnx").model_copy(update={"candidate": large})
    study = forge.study.model_copy(update={"judged": (forge.study.find("int8-openvino"), spare)})
    folder = assemble_bundle.fn(study, "int8-openvino", forge.teacher_embeddings, ORIGIN).folder
    assert "model.onnx.data" in verify_bundle(folder).files
    open_engine(folder, read_manifest(folder).engines[1]).close()


def test_publish_pushes_once_and_again_to_the_same_digest(bundle: Path, forge: Forge, tmp_path: Path) -> None:
    artifact = assemble_bundle.fn(forge.study, "fp32-onnx", forge.teacher_embeddings, ORIGIN)
    first = publish.fn(artifact, "fp32-onnx", tmp_path / "registry")
    files = sorted((tmp_path / "registry").rglob("*"))
    assert publish.fn(artifact, "fp32-onnx", tmp_path / "registry") == first
    assert sorted((tmp_path / "registry").rglob("*")) == files
    version = read_manifest(artifact.folder).version
    assert first == Published(name="tiny", variant="fp32-onnx", version=version, digest=digest_of(artifact.folder))


def flip_one_byte(path: Path) -> bytes:
    before = path.read_bytes()
    path.write_bytes(before[:-9] + bytes([before[-9] ^ 1]) + before[-8:])
    return before


@pytest.mark.parametrize("what", ["candidate", "corpus", "teacher embeddings"])
def test_bundle_is_not_made_of_files_that_were_changed(what: str, forge: Forge) -> None:
    candidate = forge.study.find("fp32-onnx").candidate
    folder, file = {
        "candidate": (candidate.artifact.folder, candidate.engine.file),
        "corpus": (forge.study.corpus.folder, "evaluation.jsonl"),
        "teacher embeddings": (forge.teacher_embeddings.folder, "sentences.npy"),
    }[what]
    before = flip_one_byte(folder / file)
    try:
        with pytest.raises(ArtifactChanged, match=rf"files in {folder} were changed .* run again with --refresh"):
            assemble_bundle.fn(forge.study, "fp32-onnx", forge.teacher_embeddings, ORIGIN)
    finally:
        (folder / file).write_bytes(before)


def test_bundle_that_was_changed_is_not_published(forge: Forge, tmp_path: Path) -> None:
    artifact = assemble_bundle.fn(forge.study, "fp32-onnx", forge.teacher_embeddings, ORIGIN)
    flip_one_byte(artifact.folder / "manifest.json")
    try:
        with pytest.raises(ArtifactChanged, match="run again with --refresh"):
            publish.fn(artifact, "fp32-onnx", tmp_path / "registry")
        assert not (tmp_path / "registry").exists()
    finally:
        shutil.rmtree(artifact.folder)


@flow(validate_parameters=False)
def assemble_flow(forge: Forge, origin: Origin) -> tuple[str, Artifact]:
    state: State[Artifact] = assemble_bundle(
        forge.study, "int8-dynamic", forge.teacher_embeddings, origin, return_state=True
    )
    return state.name, state.result()


@pytest.mark.usefixtures("prefect")
def test_bundle_of_the_same_study_is_not_built_again_for_another_run(forge: Forge) -> None:
    name, first = assemble_flow(forge, ORIGIN)
    assert name == "Completed"
    other = Origin(mlflow_run_id="run-2", git_commit=None)
    name, second = assemble_flow(forge, other)
    assert (name, digest_of(second.folder)) == ("Cached", digest_of(first.folder))


def test_bundle_of_another_name_is_another_artifact(forge: Forge) -> None:
    first = assemble_bundle.fn(forge.study, "fp32-onnx", forge.teacher_embeddings, ORIGIN)
    renamed = forge.study.model_copy(update={"teacher": forge.study.teacher.model_copy(update={"name": "other"})})
    second = assemble_bundle.fn(renamed, "fp32-onnx", forge.teacher_embeddings, ORIGIN)
    assert second.digest != first.digest
    assert read_manifest(second.folder).model_name == "other"


def test_git_commit_is_that_of_the_checkout_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert find_git_commit() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_git_commit() is None
