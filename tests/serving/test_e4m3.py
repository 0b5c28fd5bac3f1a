"""The cuda engine's E4M3 in plain PyTorch: what is kept in float16 is not rounded, and what is rounded costs little."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from serving.engines.bert import (
    AMAX_NAME,
    LINEARS,
    STATES_NAME,
    BertConfig,
    Packed,
    Weights,
    encode,
    list_linears,
    name_linear,
)
from serving.engines.cuda_linears import load_linears
from serving.engines.e4m3 import ExactE4M3, calibrate, choose_input_scale, quantize_weight
from tests.serving.kernels.models import make_encoder, poison, read_model
from tests.serving.kernels.packs import make_packed

LAYERS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[BertConfig, Weights]:
    return read_model(make_encoder(tmp_path_factory.mktemp("encoder"), layers=LAYERS))


@pytest.fixture
def batch() -> Packed:
    torch.manual_seed(0)
    return make_packed([5, 1, 90, 33], torch.device("cpu"))


def encode_exactly(config: BertConfig, weights: Weights, batch: Packed, float16: Iterable[str]) -> Tensor:
    return ExactE4M3(weights, replace(config, float16=frozenset(float16))).encode(batch)


def damage(model: tuple[BertConfig, Weights], batch: Packed, float16: list[str]) -> float:
    """1 - mean cosine to no rounding at all."""
    config, weights = model
    products = encode_exactly(config, weights, batch, float16).double() * encode(weights, config, batch).double()
    return 1 - float(products.sum(1).mean())


def test_nothing_is_rounded_where_every_layer_is_kept(model: tuple[BertConfig, Weights], batch: Packed) -> None:
    config, weights = model
    exact = encode_exactly(config, weights, batch, list_linears(LAYERS))
    assert torch.equal(exact, encode(weights, config, batch))


def test_kept_layers_bring_the_embeddings_closer(model: tuple[BertConfig, Weights], batch: Packed) -> None:
    names = list_linears(LAYERS)
    alone = {name: damage(model, batch, [other for other in names if other != name]) for name in names}
    assert min(alone.values()) > 1e-6  # each is rounded by itself, whichever it is
    ranked = sorted(names, key=lambda name: -alone[name])
    everything, half = damage(model, batch, []), damage(model, batch, ranked[: len(ranked) // 2])
    assert 0 < half < everything / 2 < 0.05


@pytest.mark.parametrize("linear", [1, 3], ids=[LINEARS[1], LINEARS[3]])
def test_kept_layer_needs_no_calibration(linear: int, model: tuple[BertConfig, Weights], batch: Packed) -> None:
    config, weights = model
    kept = [name_linear(layer, linear) for layer in range(LAYERS)]
    poisoned = replace(weights, layers=tuple(poison(layer, linear) for layer in weights.layers))
    assert bool(torch.isfinite(encode_exactly(config, poisoned, batch, kept)).all())
    assert not bool(torch.isfinite(encode_exactly(config, poisoned, batch, [])).any())


def test_files_that_name_no_layers_keep_the_same_ones_where_they_run_and_where_they_are_judged(
    tmp_path: Path, batch: Packed
) -> None:
    config, weights = read_model(make_encoder(tmp_path, layers=LAYERS, float16=None))
    cpu = torch.device("cpu")
    run = load_linears(weights.layers, config.float16, cpu)
    kinds = [[linear.dtype for linear in linears] for linears in run]
    assert kinds == [[torch.float8_e4m3fn, torch.float16, torch.float8_e4m3fn, torch.float8_e4m3fn]] * LAYERS
    for linear in (1, 3):  # of those that a scale is calibrated for: who rounds it meets NaN
        poisoned = replace(weights, layers=tuple(poison(layer, linear) for layer in weights.layers))
        is_rounded = not bool(torch.isfinite(ExactE4M3(poisoned, config).encode(batch)).all())
        assert is_rounded == (run[0][linear].dtype != torch.float16)


def test_calibrate_finds_the_largest_input_of_every_batch(model: tuple[BertConfig, Weights]) -> None:
    config, weights = model
    batches = [make_packed([lengths], torch.device("cpu")) for lengths in (40, 7)]
    together, *singles = (calibrate(weights, config, each) for each in (batches, batches[:1], batches[1:]))
    assert {name: tuple(each.shape) for name, each in together.items()} == {
        AMAX_NAME: (LAYERS, len(LINEARS)),
        STATES_NAME: (LAYERS, 2),
    }
    for name, largest in together.items():
        assert torch.equal(largest, torch.maximum(*(single[name] for single in singles)))


@pytest.mark.parametrize("tensor", [torch.zeros(3, 4), torch.tensor([[1e-3, -7.0]])], ids=["zeros", "values"])
def test_quantised_weight_is_within_a_sixteenth_of_its_own(tensor: Tensor) -> None:
    values, scale = quantize_weight(tensor)
    torch.testing.assert_close(values.float() * scale, tensor, rtol=1 / 16, atol=1e-6)


def test_input_scale_leaves_room_for_twice_what_calibration_saw() -> None:
    assert float(choose_input_scale(torch.tensor(448.0))) == 2.0
    smallest = choose_input_scale(torch.tensor(0.0))
    assert float(smallest) > 0
    assert bool(torch.isfinite((1 / smallest).half()))  # in which kernels quantise
