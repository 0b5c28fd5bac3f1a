"""Weights in values of E4M3, by what they do to a layer's output."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from serving.engines.bert import BertConfig, Packed, Weights, encode, list_linears
from serving.engines.e4m3 import BIASES, MATRICES, ExactE4M3, find_norms, fold_norm, quantize_weight
from tasks.quantization.e4m3 import choose_weights, measure_products, round_columns, round_weights
from tests.serving.kernels.models import make_encoder, read_model
from tests.serving.kernels.packs import TOKENS

ROWS, COLUMNS = 48, 96


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[BertConfig, Weights]:
    return read_model(make_encoder(tmp_path_factory.mktemp("encoder")))


def draw_texts(count: int) -> list[list[int]]:
    torch.manual_seed(count)
    return [torch.randint(0, TOKENS, (int(size),)).tolist() for size in torch.randint(1, 60, (count,))]


@pytest.fixture
def product() -> tuple[Tensor, Tensor]:
    """A weight and inputs of which some say much of others."""
    torch.manual_seed(0)
    return torch.randn(ROWS, COLUMNS), torch.randn(4000, COLUMNS // 3) @ torch.randn(COLUMNS // 3, COLUMNS)


def round_nearest(weight: Tensor) -> Tensor:
    values, scale = quantize_weight(weight)
    return values.float() * scale


def test_outputs_change_less_than_with_the_nearest_values(product: tuple[Tensor, Tensor]) -> None:
    weight, x = product
    rounded = round_columns(weight, x.T @ x / len(x))
    errors = [float((x @ (other - weight).T).square().mean()) for other in (rounded, round_nearest(weight))]
    assert errors[0] < errors[1] / 4


def test_what_is_rounded_is_e4m3_by_the_scale_that_the_engine_finds(product: tuple[Tensor, Tensor]) -> None:
    weight, x = product
    rounded = round_columns(weight, x.T @ x / len(x))
    assert torch.equal(quantize_weight(rounded)[1], quantize_weight(weight)[1])
    torch.testing.assert_close(round_nearest(rounded), rounded, rtol=1e-6, atol=0)


def test_inputs_that_tell_nothing_of_each_other_leave_the_nearest_values(product: tuple[Tensor, Tensor]) -> None:
    weight, _ = product
    torch.testing.assert_close(round_columns(weight, torch.eye(COLUMNS)), round_nearest(weight), rtol=1e-6, atol=0)


@pytest.mark.parametrize("of", [torch.zeros(COLUMNS, COLUMNS), torch.ones(COLUMNS, COLUMNS)], ids=["none", "one"])
def test_products_of_too_few_inputs_give_finite_weights(of: Tensor) -> None:
    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS)
    assert float((round_columns(weight, of) - weight).abs().max()) < float(weight.abs().max())


def assert_same_bias(weights: Weights, rounded: Weights) -> None:
    """As the engine makes them of what a file holds."""
    for layer, other, norms in zip(weights.layers, rounded.layers, find_norms(weights.layers), strict=True):
        for matrix, bias, norm in zip(MATRICES, BIASES, norms, strict=True):
            _, before = fold_norm(getattr(layer, matrix), getattr(layer, bias), norm)
            _, after = fold_norm(getattr(other, matrix).half().float(), getattr(other, bias).half().float(), norm)
            torch.testing.assert_close(after, before, rtol=2e-3, atol=2e-3)


def test_engine_makes_e4m3_of_rounded_weights_without_another_rounding(model: tuple[BertConfig, Weights]) -> None:
    config, weights = model
    texts = draw_texts(40)
    rounded, products = round_weights(weights, config, texts), measure_products(weights, config, texts)
    layers = zip(weights.layers, rounded.layers, find_norms(weights.layers), products, strict=True)
    for layer, other, norms, own in layers:
        assert list(own) == [0, 1, 2, 3]
        for linear, product in own.items():
            bias, matrices = getattr(layer, BIASES[linear]), [getattr(one, MATRICES[linear]) for one in (layer, other)]
            before, after = (
                fold_norm(matrix, bias, norms[linear])[0] for matrix in (matrices[0], matrices[1].half().float())
            )
            values, wanted = quantize_weight(after)[0], quantize_weight(round_columns(before, product))[0]
            assert float((values.float() == wanted.float()).float().mean()) > 0.99
    assert_same_bias(weights, rounded)


def test_texts_like_those_of_calibration_lose_less(model: tuple[BertConfig, Weights]) -> None:
    config, weights = model
    batch = Packed.of_rows(draw_texts(30))
    oracle, rounded = encode(weights, config, batch), round_weights(weights, config, draw_texts(100))
    losses = [1 - float((ExactE4M3(own, config).encode(batch) * oracle).sum(1).mean()) for own in (rounded, weights)]
    assert losses[0] < 0.8 * losses[1]


@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e-5, 1e-3, 1e-2])
def test_norm_with_next_to_no_scale_costs_nothing(scale: float, model: tuple[BertConfig, Weights]) -> None:
    config, weights = model
    narrow = weights.layers[0].out_norm_weight.clone()
    narrow[[3, 5, 60]] = torch.tensor([scale, -scale, scale])
    weights = replace(weights, layers=(replace(weights.layers[0], out_norm_weight=narrow), *weights.layers[1:]))
    rounded = round_weights(weights, config, draw_texts(100))
    assert_same_bias(weights, rounded)
    batch = Packed.of_rows(draw_texts(30))
    oracle = encode(weights, config, batch)
    losses = [1 - float((ExactE4M3(own, config).encode(batch) * oracle).sum(1).mean()) for own in (rounded, weights)]
    assert losses[0] < 0.8 * losses[1]


def test_norm_without_any_scale_leaves_the_weight_alone(model: tuple[BertConfig, Weights]) -> None:
    config, weights = model
    flat = replace(weights.layers[0], out_norm_weight=torch.zeros(config.hidden))
    weights = replace(weights, layers=(flat, *weights.layers[1:]))
    rounded = round_weights(weights, config, draw_texts(5))
    assert torch.equal(rounded.layers[0].up_weight, flat.up_weight.half().float())
    assert_same_bias(weights, rounded)


def test_layers_in_float16_keep_their_weights(model: tuple[BertConfig, Weights]) -> None:
    config, weights = model
    kept = replace(config, float16=frozenset(list_linears(2)[:5]))
    mixed = choose_weights(weights, round_weights(weights, config, draw_texts(5)), kept)
    for other in (mixed, round_weights(weights, kept, draw_texts(5))):
        for number in range(8):
            matrices = (getattr(own.layers[number // 4], MATRICES[number % 4]) for own in (other, weights))
            assert torch.equal(*matrices) == (number < 5)
