"""One launch for the whole encoder against the plain forward pass; on a GPU its programs meet, and always agree."""

from dataclasses import replace

import pytest
import torch

from serving.engines.bert import BertConfig, Packed, Weights, encode
from serving.engines.cuda_encoder import Encoder
from serving.kernels.few_tokens import MAX_TOKENS, FewTokens
from tests.serving.kernels.models import make_encoder, read_model
from tests.serving.kernels.packs import make_packed, relative_error


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[BertConfig, Weights]:
    """Two pieces of 128 in a row, so that rows are put together, and a vector of the last token."""
    return read_model(make_encoder(tmp_path_factory.mktemp("encoder"), hidden=256, intermediate=512, layers=1))


@pytest.mark.parametrize(("lengths", "pooling"), [([1], "mean"), ([3, 14], "cls"), ([MAX_TOKENS], "lasttoken")])
def test_few_tokens_equals_the_oracle(
    lengths: list[int], pooling: str, model: tuple[BertConfig, Weights], device: torch.device
) -> None:
    config, weights = replace(model[0], pooling=pooling), model[1]
    encoder = Encoder(weights, config, device, max_tokens=MAX_TOKENS, max_rows=2)
    assert encoder._few is not None
    encoder._out.fill_(float("nan"))
    batch = make_packed(lengths, device)
    vectors = encoder.run(batch).cpu()
    on_cpu = Packed(*(getattr(batch, name).cpu() for name in Packed.__slots__))
    oracle = encode(weights, config, on_cpu)
    assert relative_error(vectors, oracle) < 5e-3


def test_few_tokens_fits_only_what_its_programs_hold() -> None:
    assert FewTokens.fits(384, 12, 1536)
    assert FewTokens.fits(512, 8, 2048)
    for sizes in ((768, 12, 3072), (384, 12, 1000), (192, 6, 768), (384, 24, 1536)):
        assert not FewTokens.fits(*sizes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="its programs meet on a GPU alone")
def test_few_tokens_answers_the_same_every_time(model: tuple[BertConfig, Weights], device: torch.device) -> None:
    config, weights = model
    encoder, batch = Encoder(weights, config, device, MAX_TOKENS, 8), make_packed([13, 2, 17], device)
    first = encoder.run(batch).clone()
    for _ in range(300):
        torch.testing.assert_close(encoder.run(batch), first, rtol=0, atol=0)
