import logging

import numpy as np
import pytest

from registry.manifest import hash_file
from tasks.errors import QuantizationFailed
from tasks.evaluate import open_candidate
from tasks.quantize import quantize
from tasks.variants import VARIANTS, Build
from tests.forge import CALIBRATION_SIZE, Forge

NAMES: tuple[Build, ...] = ("fp32-onnx", "int8-dynamic", "int8-static", "int8-openvino", "bf16-openvino")


def test_variants_are_the_five_known_ones() -> None:
    plain = [variant for variant in VARIANTS.values() if not variant.steps]
    assert tuple(variant.name for variant in plain) == NAMES
    assert [variant.name for variant in plain if variant.is_calibrated] == ["int8-static", "int8-openvino"]


@pytest.mark.parametrize("name", NAMES)
def test_quantize_builds_a_variant_that_embeds_like_the_teacher(name: Build, forge: Forge) -> None:
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


@pytest.mark.parametrize("name", NAMES)
def test_quantize_accounts_for_its_calibration(name: Build, forge: Forge) -> None:
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
def test_quantize_stores_weights_as_int8(name: Build, forge: Forge) -> None:
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
    with pytest.raises(QuantizationFailed, match=r"int8-static asks for 5000 calibration texts, the corpus has \d+"):
        quantize.fn(VARIANTS["int8-static"], forge.exported, 48, forge.study.corpus, 5000)


def test_quantize_leaves_the_root_logger_as_it_was(forge: Forge) -> None:
    before = list(logging.getLogger().filters)
    quantize.fn(VARIANTS["int8-dynamic"], forge.exported, 48, forge.study.corpus, CALIBRATION_SIZE)
    assert logging.getLogger().filters == before
