"""The cuda engine's variants: built of the teacher's weights, part of a run only where they can be judged."""

import pytest

from flows.config import OptimizeConfig
from serving.engines.bert import Packed, encode, load_weights, read_config
from serving.tokenizer import TextTokenizer
from tasks.encoder import build_encoder
from tasks.errors import QuantizationFailed
from tasks.variants import CUDA_VARIANTS, VARIANTS, list_variants
from tests.forge import Forge
from tests.texts import make_sentences


@pytest.mark.parametrize("name", CUDA_VARIANTS)
def test_build_encoder_makes_a_candidate_the_engine_can_read(name: str, forge: Forge) -> None:
    study = forge.study
    built = build_encoder.fn(CUDA_VARIANTS[name], study.teacher, study.corpus, 8)
    folder = built.artifact.folder
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert (built.engine.runtime, built.engine.compute) == ("cuda", {"cuda-fp16": "f16", "cuda-fp8": "f8"}[name])
    assert built.calibration_size == (8 if name == "cuda-fp8" else 0)
    config = read_config(folder / "config.json")
    weights = load_weights(folder / built.engine.file, config)
    assert (weights.layers[0].amax is not None) == (name == "cuda-fp8")
    rows = TextTokenizer.from_folder(folder, built.max_seq_length).encode(make_sentences(3))
    assert encode(weights, config, Packed.of_rows(rows)).shape == (3, study.teacher.dimension)


def test_build_encoder_refuses_too_few_calibration_texts(forge: Forge) -> None:
    with pytest.raises(QuantizationFailed, match="cuda-fp8 asks for 999999 calibration texts"):
        build_encoder.fn(CUDA_VARIANTS["cuda-fp8"], forge.study.teacher, forge.study.corpus, 999_999)


def test_cuda_variants_are_part_of_a_run_where_there_is_a_gpu() -> None:
    plain = ("fp32-onnx", "int8-dynamic", "int8-static", "int8-openvino", "bf16-openvino")  # minutes on two cores
    assert list_variants(has_gpu=False) == plain
    assert set(plain) < set(VARIANTS)
    assert list_variants(has_gpu=True) == (*plain, "cuda-fp16", "cuda-fp8")
    assert OptimizeConfig(variants=("cuda-fp16",)).variants == ("cuda-fp16",)
