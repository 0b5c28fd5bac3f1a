"""The whole forward pass on the kernels against the plain one in float32."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from serving.engines.bert import BertConfig, Packed, Weights, encode
from serving.engines.cuda_encoder import Encoder, Fp8Encoder
from tests.serving.kernels.models import make_encoder, read_model
from tests.serving.kernels.packs import make_packed

LENGTHS = [5, 1, 90, 33]


def to_cpu(batch: Packed) -> Packed:
    return Packed(*(getattr(batch, name).cpu() for name in Packed.__slots__))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[BertConfig, Weights]:
    return read_model(make_encoder(tmp_path_factory.mktemp("encoder")))


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


@pytest.mark.parametrize("row_scales", [False, True])
def test_fp8_encoder_stays_close_to_the_oracle(
    row_scales: bool, model: tuple[BertConfig, Weights], device: torch.device
) -> None:
    config, weights = model
    encoder = Fp8Encoder(weights, config, device, 160, 8, row_scales=row_scales)
    batch = make_packed(LENGTHS, device)
    vectors, oracle = encoder.run(batch).cpu(), encode(weights, config, to_cpu(batch))
    # Random weights, and the interpreter cuts to E4M3 where the GPU rounds; the gate stands on real weights.
    assert float(cosine_similarity(vectors, oracle).min()) > 0.95


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="few tokens take other kernels")
@pytest.mark.parametrize("is_long", [False, True])
def test_encoder_equals_the_oracle_on_many_tokens(is_long: bool, model: tuple[BertConfig, Weights]) -> None:
    config, weights = model
    encoder = Encoder(weights, config, torch.device("cuda"), max_tokens=4096, max_rows=64)
    batch = make_packed([128, 1, 77] * 12, torch.device("cuda"))
    vectors, oracle = encoder.run(batch, is_long).cpu(), encode(weights, config, to_cpu(batch))
    assert float(cosine_similarity(vectors, oracle).min()) > 0.9999
