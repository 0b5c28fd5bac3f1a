"""The whole forward pass on the kernels against the plain one in float32."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

from serving.engines.bert import LINEARS, BertConfig, Packed, Weights, encode, list_linears, name_linear
from serving.engines.cuda_encoder import Encoder, Fp8Encoder
from serving.engines.e4m3 import ExactE4M3
from tests.serving.kernels.models import make_encoder, poison, read_model
from tests.serving.kernels.packs import make_packed

LENGTHS = [5, 1, 90, 33]
LAYERS_LENGTHS = [5, 1, 40, 33]  # 79 tokens are many already, and the interpreter's time grows with them


def to_cpu(batch: Packed) -> Packed:
    return Packed(*(getattr(batch, name).cpu() for name in Packed.__slots__))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[BertConfig, Weights]:
    return read_model(make_encoder(tmp_path_factory.mktemp("encoder")))


def find_cosine(config: BertConfig, weights: Weights, batch: Packed) -> float:
    """The smallest cosine of the FP8 encoder's vectors with the oracle's."""
    encoder = Fp8Encoder(weights, config, batch.ids.device, max_tokens=160, max_rows=8)
    oracle = encode(weights, config, to_cpu(batch))
    return float(cosine_similarity(encoder.run(batch).cpu(), oracle).min())


@pytest.mark.parametrize("lengths", [LENGTHS, [1], [32], [3, 7, 1, 20], [64], [65]], ids=str)
def test_encoder_equals_the_oracle(lengths: list[int], model: tuple[BertConfig, Weights], device: torch.device) -> None:
    config, weights = model
    encoder = Encoder(weights, config, device, max_tokens=160, max_rows=8)
    batch = make_packed(lengths, device)
    vectors, oracle = encoder.run(batch).cpu(), encode(weights, config, to_cpu(batch))
    assert float(cosine_similarity(vectors, oracle).min()) > 0.9999


def test_encoder_gives_a_text_the_same_vector_in_any_batch(
    model: tuple[BertConfig, Weights], device: torch.device
) -> None:
    config, weights = model
    encoder = Encoder(weights, config, device, max_tokens=160, max_rows=8)
    batch = make_packed(LENGTHS, device)
    together = encoder.run(batch).clone()
    for row, (begin, end) in enumerate(zip(batch.offsets[:-1], batch.offsets[1:], strict=True)):
        single = make_packed([int(end - begin)], device)
        single.ids.copy_(batch.ids[begin:end])
        torch.testing.assert_close(encoder.run(single)[0], together[row], rtol=1e-3, atol=1e-3)


def test_fp8_encoder_stays_close_to_the_oracle(model: tuple[BertConfig, Weights], device: torch.device) -> None:
    config, weights = model
    batch = make_packed(LENGTHS, device)
    # Random weights, and the interpreter cuts to E4M3 where the GPU rounds; the gate stands on real weights.
    assert find_cosine(config, weights, batch) > 0.95


@pytest.fixture(scope="module")
def narrow_cosine(model: tuple[BertConfig, Weights], device: torch.device) -> float:
    """Of the encoder that has every layer in E4M3, on the batch that those tests make."""
    torch.manual_seed(0)
    return find_cosine(*model, make_packed(LAYERS_LENGTHS, device))


@pytest.mark.parametrize("linear", range(len(LINEARS)), ids=LINEARS)
def test_fp8_encoder_leaves_layers_in_float16(
    linear: int, narrow_cosine: float, model: tuple[BertConfig, Weights], device: torch.device
) -> None:
    config, weights = model
    batch = make_packed(LAYERS_LENGTHS, device)
    kept = frozenset(name_linear(layer, linear) for layer in range(config.layers))
    others = frozenset(list_linears(config.layers)) - kept
    cosines = [find_cosine(replace(config, float16=names), weights, batch) for names in (kept, others)]
    assert len({round(cosine, 6) for cosine in (narrow_cosine, *cosines)}) == 3
    assert cosines[1] > narrow_cosine
    assert min(narrow_cosine, *cosines) > 0.95


@pytest.mark.parametrize("linear", [1, 3], ids=[LINEARS[1], LINEARS[3]])
def test_fp8_encoder_reads_no_calibration_of_a_layer_in_float16(
    linear: int, model: tuple[BertConfig, Weights], device: torch.device
) -> None:
    config, weights = model
    batch = make_packed(LAYERS_LENGTHS, device)
    kept = frozenset(name_linear(layer, linear) for layer in range(config.layers))
    poisoned = replace(weights, layers=tuple(poison(layer, linear) for layer in weights.layers))
    assert find_cosine(replace(config, float16=kept), poisoned, batch) > 0.95


def test_fp8_encoder_with_every_layer_in_float16_is_the_float16_encoder(
    model: tuple[BertConfig, Weights], device: torch.device
) -> None:
    config, weights = model
    everything = replace(config, float16=frozenset(list_linears(config.layers)))
    assert find_cosine(everything, weights, make_packed(LAYERS_LENGTHS, device)) > 0.9999


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="few tokens take other kernels")
@pytest.mark.parametrize("is_long", [False, True])
def test_encoder_equals_the_oracle_on_many_tokens(is_long: bool, model: tuple[BertConfig, Weights]) -> None:
    config, weights = model
    encoder = Encoder(weights, config, torch.device("cuda"), max_tokens=4096, max_rows=64)
    batch = make_packed([128, 1, 77] * 12, torch.device("cuda"))
    vectors, oracle = encoder.run(batch, is_long).cpu(), encode(weights, config, to_cpu(batch))
    assert float(cosine_similarity(vectors, oracle).min()) > 0.9999


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="few tokens take other kernels")
@pytest.mark.parametrize("linear", [None, *range(len(LINEARS))], ids=["all in E4M3", *LINEARS])
def test_fp8_encoder_leaves_layers_in_float16_on_many_tokens(
    linear: int | None, model: tuple[BertConfig, Weights]
) -> None:
    config, weights = model
    kept = frozenset(name_linear(layer, linear) for layer in range(config.layers) if linear is not None)
    batch = make_packed([128, 1, 77] * 12, torch.device("cuda"))
    config = replace(config, float16=kept)
    encoder = Fp8Encoder(weights, config, torch.device("cuda"), max_tokens=4096, max_rows=64)
    exact = ExactE4M3(weights, config).encode(to_cpu(batch))
    assert float(cosine_similarity(encoder.run(batch, True).cpu(), exact).min()) > 0.99


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter cuts to E4M3, and has no folded layers")
@pytest.mark.parametrize("linear", [None, *range(len(LINEARS))], ids=["all in E4M3", *LINEARS])
def test_fp8_encoder_gives_a_text_the_same_vector_in_any_batch(
    linear: int | None, model: tuple[BertConfig, Weights]
) -> None:
    config, weights = model
    kept = frozenset(name_linear(layer, linear) for layer in range(config.layers) if linear is not None)
    encoder = Fp8Encoder(weights, replace(config, float16=kept), torch.device("cuda"), max_tokens=4096, max_rows=64)
    batch = make_packed([128, 1, 77, 30] * 12, torch.device("cuda"))
    together = encoder.run(batch, True).clone()
    for row, (begin, end) in enumerate(zip(batch.offsets[:-1], batch.offsets[1:], strict=True)):
        single = make_packed([int(end - begin)], torch.device("cuda"))
        single.ids.copy_(batch.ids[begin:end])
        torch.testing.assert_close(encoder.run(single)[0], together[row], rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="few tokens take other kernels")
@pytest.mark.parametrize(
    "sizes", [(384, 12, 1536), (768, 12, 3072), (1024, 16, 4096)], ids=["MiniLM", "BERT-base", "BERT-large"]
)
def test_encoders_of_common_sizes_equal_the_oracle_on_many_tokens(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    """Which take Hopper's wide GEMM, or not: in FP8 all, one or the other of two layers, or all but the output
    projections, whose kernels then differ."""
    config, weights = read_model(make_encoder(tmp_path, *sizes))
    device = torch.device("cuda")
    batch = make_packed([128, 20, 77] * 30, device)
    oracle, names = encode(weights, config, to_cpu(batch)), list_linears(config.layers)
    vectors = Encoder(weights, config, device, max_tokens=8192, max_rows=128).run(batch, True)
    assert float(cosine_similarity(vectors.cpu(), oracle).min()) > 0.999
    for kept in ([], names[: len(LINEARS)], names[len(LINEARS) :], names[1 :: len(LINEARS)]):
        encoder = Fp8Encoder(weights, replace(config, float16=frozenset(kept)), device, max_tokens=8192, max_rows=128)
        together = encoder.run(batch, True).clone()
        assert float(cosine_similarity(together.cpu(), oracle).min()) > 0.95
        single = make_packed([128], device)
        single.ids.copy_(batch.ids[:128])
        torch.testing.assert_close(encoder.run(single)[0], together[0], rtol=0, atol=0)
