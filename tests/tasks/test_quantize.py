import logging
import shutil

import numpy as np
import pytest

from registry.gate import GateLimits, default_checks, judge
from registry.manifest import hash_file
from tasks.artifacts import draft
from tasks.errors import CorpusRejected, QuantizationFailed
from tasks.evaluate import evaluate, open_candidate
from tasks.measurement.hardware import INT8_FLAGS, cpu_flags
from tasks.quantize import quantize
from tasks.variants import VARIANTS
from tests.forge import CALIBRATION_SIZE, FORGED, Forge


@pytest.mark.parametrize("name", FORGED)
def test_quantize_builds_a_variant_that_embeds_like_the_teacher(name: str, forge: Forge) -> None:
    judged = forge.study.find(name)
    candidate = judged.candidate
    entry = hash_file(candidate.artifact.folder / candidate.engine.file)
    assert (candidate.engine.sha256, candidate.engine.size) == (entry.sha256, entry.size)
    assert candidate.engine.runtime == VARIANTS[name].runtime
    assert candidate.disk_bytes == sum(path.stat().st_size for path in candidate.artifact.folder.iterdir())
    assert judged.quality.metrics["cosine_min"].value > 0.9
    assert judged.quality.value("nonfinite") == 0
    encode, engine = open_candidate(candidate)
    embeddings = encode(["the baker counts bells", "the sailor sells ropes"], lambda steps: None)
    engine.close()
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=0.02)


@pytest.mark.parametrize("name", FORGED)
def test_quantize_accounts_for_its_calibration(name: str, forge: Forge) -> None:
    candidate = forge.study.find(name).candidate
    account = candidate.quantization("docs:", 0.99)
    if VARIANTS[name].precision != "int8":
        assert account is None
        return
    assert account is not None
    assert account.accuracy_loss == pytest.approx(0.01)
    calibrated = VARIANTS[name].is_calibrated
    assert account.calibration_size == (CALIBRATION_SIZE if calibrated else 0)
    assert account.calibration_dataset == ("docs:" if calibrated else None)
    assert account.calibration_digest == (forge.study.corpus.digest if calibrated else None)


@pytest.mark.parametrize("name", ["int8-dynamic", "int8-static"])
def test_quantize_stores_weights_as_int8(name: str, forge: Forge) -> None:
    import onnx
    from onnx import TensorProto

    candidate = forge.study.find(name).candidate
    graph = onnx.load(candidate.artifact.folder / candidate.engine.file).graph
    kinds = [tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 2]
    assert kinds.count(TensorProto.INT8) >= 12  # six linears in each of two layers


def test_quantize_is_the_same_every_time(forge: Forge) -> None:
    for name in ("fp32-onnx", "int8-dynamic", "int8-static"):
        before = forge.study.find(name).candidate
        again = quantize.fn(VARIANTS[name], forge.exported, before.max_seq_length, forge.study.corpus, CALIBRATION_SIZE)
        assert again == before


def test_quantize_without_enough_calibration_texts_says_how_many_there_are(forge: Forge) -> None:
    with pytest.raises(CorpusRejected, match=r"int8-static asks for 5000 calibration texts, the corpus has \d+"):
        quantize.fn(VARIANTS["int8-static"], forge.exported, 48, forge.study.corpus, 5000)


def test_quantize_refuses_calibration_texts_that_are_evaluated_on(forge: Forge) -> None:
    with draft("corpus") as work:
        shutil.copytree(forge.study.corpus.folder, work.folder, dirs_exist_ok=True)
        judged = (work.folder / "evaluation.jsonl").read_text()
        (work.folder / "calibration.jsonl").write_text(judged)
    with pytest.raises(CorpusRejected, match=r"16 of 16 calibration texts are evaluation texts too, limit 0"):
        quantize.fn(VARIANTS["int8-static"], forge.exported, 48, work.artifact, 16)


def test_quantize_names_a_weight_that_is_not_finite(forge: Forge) -> None:
    import onnx

    with draft("export") as work:
        shutil.copytree(forge.exported.folder, work.folder, dirs_exist_ok=True)
        model = onnx.load(work.folder / "model.onnx")
        weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 2)
        values = onnx.numpy_helper.to_array(weight).copy()
        values[1, 2:4] = np.nan, np.inf
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        onnx.save(model, work.folder / "model.onnx")
    with pytest.raises(QuantizationFailed, match=f"weight {weight.name} holds 2 values that are NaN or infinite"):
        quantize.fn(VARIANTS["int8-dynamic"], work.artifact, 48, forge.study.corpus, CALIBRATION_SIZE)


def test_fp8_is_judged_on_exact_arithmetic(forge: Forge) -> None:
    variant = VARIANTS["fp8-onnx"]
    candidate = quantize.fn(variant, forge.exported, 48, forge.study.corpus, CALIBRATION_SIZE)
    quality = evaluate.fn(candidate, forge.study.corpus, forge.teacher_embeddings, "here")
    assert quality.metrics["cosine_mean"].value > 0.99
    assert quality.value("engine_cosine_mean") == pytest.approx(1, abs=1e-5)
    account = candidate.quantization("docs:", 0.997)
    assert account is not None
    assert account.calibration_size == CALIBRATION_SIZE


def test_fp8_stores_its_tables_in_few_bits(forge: Forge) -> None:
    import onnx

    candidate = quantize.fn(VARIANTS["fp8-onnx"], forge.exported, 48, forge.study.corpus, CALIBRATION_SIZE)
    nodes = onnx.load(candidate.artifact.folder / candidate.engine.file).graph.node
    assert sum(node.op_type == "GatherBlockQuantized" for node in nodes) == 1  # the vocabulary; few positions stay


def test_fp16_is_half_the_bytes_and_judged_without_a_gpu(forge: Forge) -> None:
    candidate = quantize.fn(VARIANTS["fp16-onnx"], forge.exported, 48, forge.study.corpus, CALIBRATION_SIZE)
    assert candidate.engine.size < 0.7 * forge.study.find("fp32-onnx").candidate.engine.size
    quality = evaluate.fn(candidate, forge.study.corpus, forge.teacher_embeddings, "here")
    assert 0.9999 < quality.metrics["cosine_min"].value < 1
    record = judge(quality.metrics, default_checks(GateLimits(), with_sts=False, with_champion=False))
    assert record.verdict == "pass"


@pytest.mark.skipif(not INT8_FLAGS & set(cpu_flags()), reason="this processor saturates: see test_exact")
def test_static_int8_serves_what_was_judged(forge: Forge) -> None:
    assert forge.study.find("int8-static").quality.metrics["engine_cosine_mean"].value > 0.9999


def test_quantize_leaves_the_root_logger_as_it_was(forge: Forge) -> None:
    before = list(logging.getLogger().filters)
    quantize.fn(VARIANTS["int8-dynamic"], forge.exported, 48, forge.study.corpus, CALIBRATION_SIZE)
    assert logging.getLogger().filters == before
