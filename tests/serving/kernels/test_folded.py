"""Layers folded into their neighbours are the layers: the algebra, on a twin of Hopper's GEMM in plain PyTorch."""

import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from serving.engines.bert import STATES_NAME, BertConfig, Packed, Weights, encode, list_linears
from serving.engines.cuda_folded import FoldedLayers, States
from serving.engines.cuda_linears import Linear, load_linears
from serving.engines.e4m3 import MATRICES, calibrate
from serving.kernels import gemm_wide, reference
from serving.kernels.compiled import CompileFailed
from serving.kernels.pool import pool
from tests.serving.kernels.models import make_encoder, read_model
from tests.serving.kernels.packs import make_packed, poisoned, sum_rows

NEEDS_NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU has the GEMM itself")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[BertConfig, Weights]:
    return read_model(make_encoder(tmp_path_factory.mktemp("encoder"), hidden=256, heads=4, intermediate=512, layers=3))


def linear(
    x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, num_programs: int, gelu: bool = False,
    residual: Tensor | None = None, x_scales: Tensor | None = None, weight_scale: Tensor | None = None,
    out_factor: Tensor | None = None, norm: Any = None, out_sums: Tensor | None = None, copy: Tensor | None = None,
    is_upward: bool = False,
) -> None:  # fmt: skip
    """What `gemm_hopper.linear` says of itself."""
    wide = x.float() if x_scales is None else x.float() * x_scales.reshape(-1, 1)
    product = wide @ (weight.float() if weight_scale is None else weight.float() * weight_scale).T
    added = torch.zeros(1) if residual is None else residual.float()
    if norm is not None:
        mean, spread = read_norm(norm.sums, (x if residual is None else residual).shape[1], norm.eps)
        if residual is None:
            factors = norm.factors if weight_scale is None else norm.factors * weight_scale
            product = (product - mean * factors) * spread
        else:
            added = (added - mean) * spread * norm.factors
    result = product + bias.float() + added
    result = torch.nn.functional.gelu(result) if gelu else result
    if out_sums is not None:
        out_sums.copy_(sum_rows(result, 128))
    if copy is not None and out_factor is not None:
        copy.copy_(reference.quantize_tensor(result, 1 / out_factor))
    elif out_factor is not None:
        result = reference.quantize_tensor(result, 1 / out_factor)
    out.copy_(result)


def read_norm(sums: Tensor, width: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal spread [T, 1] from sums over parts of `width` columns."""
    mean, square = (sums.sum(1) / width).split(1, dim=1)
    return mean, torch.rsqrt(square - mean * mean + eps)


def multiply_scaled(x: Tensor, weight: Tensor, x_scales: Tensor | None, weight_scale: Tensor | None) -> Tensor:
    """The product of float16, or of E4M3 with its scales: never one of each."""
    assert x.dtype == weight.dtype
    product = x.float() @ weight.float().T
    if x_scales is None or weight_scale is None:
        assert x.dtype == torch.float16
        return product
    return product * x_scales.reshape(-1, 1) * weight_scale


def narrow(x: Tensor, factor: Tensor) -> Tensor:
    """E4M3 in the order of columns that `gemm_wide` names."""
    order = torch.tensor([0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15])
    return reference.quantize_tensor(x.view(len(x), -1, 16)[:, :, order].flatten(1), 1 / factor)


def multiply_wide(
    x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, num_programs: int, sums: Tensor, eps: float,
    gelu: bool = False, is_upward: bool = False, x_scales: Tensor | None = None, weight_scale: Tensor | None = None,
    out_factor: Tensor | None = None,
) -> None:  # fmt: skip
    """What `gemm_wide.linear` says of itself: rows of the weight that sum to 0 take the mean away."""
    _, spread = read_norm(sums, x.shape[1], eps)
    result = multiply_scaled(x, weight, x_scales, weight_scale) * spread + bias.float()
    result = torch.nn.functional.gelu(result) if gelu else result
    out.copy_(result if out_factor is None else narrow(result, out_factor))


def add_wide(
    x: Tensor, weight: Tensor, bias: Tensor, total: Tensor, num_programs: int, sums: Tensor, scale: Tensor, eps: float,
    out_sums: Tensor, is_upward: bool = False, x_scale: Tensor | None = None, weight_scale: Tensor | None = None,
    out_factor: Tensor | None = None, copy: Tensor | None = None,
) -> None:  # fmt: skip
    """What `gemm_wide.add` says of itself."""
    mean, spread = read_norm(sums, total.shape[1], eps)
    product = multiply_scaled(x, weight, x_scale, weight_scale)
    result = product + bias.float() + (total.float() - mean) * spread * scale.float()
    out_sums.copy_(sum_rows(result))
    total.copy_(result)
    if copy is not None:
        assert out_factor is not None
        copy.copy_(narrow(result, out_factor))


def use_wide(
    monkeypatch: pytest.MonkeyPatch, fits: Callable[[Tensor], bool]
) -> tuple[set[gemm_wide.Form], set[gemm_wide.Form]]:
    """The wide GEMM in plain PyTorch, for the weights that it `fits`; what will have been compiled, and have run."""
    compiled: set[gemm_wide.Form] = set()
    ran: set[gemm_wide.Form] = set()

    def prepare(device: torch.device, wanted: Collection[gemm_wide.Form]) -> None:
        compiled.update(wanted)

    def multiply(*arguments: Any) -> None:
        given = signature(multiply_wide).bind(*arguments).arguments
        ran.add(gemm_wide.Form(False, given["gelu"], given["x_scales"] is not None, given["out_factor"] is not None))
        multiply_wide(*arguments)

    def add(*arguments: Any, **copy: Any) -> None:
        given = signature(add_wide).bind(*arguments, **copy).arguments
        ran.add(gemm_wide.Form(True, False, given["x_scale"] is not None, "copy" in given))
        add_wide(*arguments, **copy)

    for name, twin in (("fits", fits), ("linear", multiply), ("add", add), ("prepare", prepare)):
        monkeypatch.setattr(gemm_wide, name, twin)
    return compiled, ran


def run_folded(
    config: BertConfig, weights: Weights, batch: Packed, linears: list[list[Linear]], is_steady: bool = True
) -> Tensor:
    tokens = len(batch.ids)
    tables = weights.words, weights.positions, weights.norm_weight, weights.norm_bias
    embedded = reference.embed_norm(batch.ids, batch.starts, *tables, config.eps)
    narrow, scales = reference.quantize_rows(embedded)
    states = States(embedded.half(), narrow, scales[:, 0].contiguous())
    folded = FoldedLayers(weights, config, linears, tokens, is_steady)
    area = torch.zeros(tokens * 16 * config.hidden, dtype=torch.uint8)

    def carve(first: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return area[first : first + rows * columns * dtype.itemsize].view(dtype).view(rows, columns)

    norm, _ = folded.run(batch, states, carve, is_long=False)
    out = poisoned(len(batch.offsets) - 1, config.hidden, device=states.x.device, dtype=torch.float32)
    pool(states.x, batch.offsets, config.pooling, config.normalize, out, norm)
    return out


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GEMM in plain PyTorch."""
    row_norm = lambda sums, factors, eps: SimpleNamespace(sums=sums, factors=factors, eps=eps)  # noqa: E731
    monkeypatch.setitem(sys.modules, "serving.kernels.gemm_hopper", SimpleNamespace(linear=linear, RowNorm=row_norm))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=4))


@NEEDS_NO_GPU
@pytest.mark.usefixtures("twin")
def test_folded_layers_survive_a_state_that_reaches_far(model: tuple[BertConfig, Weights]) -> None:
    """As MiniLM has one: a hundred times as far as the others, and part of the mean and spread of its row."""
    config, weights = model
    batch = make_packed([5, 1, 90, 33], torch.device("cpu"))
    shift = torch.zeros(config.hidden)
    shift[7] = 100.0
    first = replace(weights.layers[0], down_bias=weights.layers[0].down_bias + shift)
    weights = replace(weights, layers=(first, *weights.layers[1:]))
    states = calibrate(weights, config, [batch])[STATES_NAME]
    assert states[0, 1] > 99.0
    layers = [replace(layer, state_amax=amax) for layer, amax in zip(weights.layers, states, strict=True)]
    weights = replace(weights, layers=tuple(layers))
    linears = [load_linears(number, layer, [], torch.device("cpu")) for number, layer in enumerate(weights.layers)]
    vectors = run_folded(config, weights, batch, linears)
    assert float(cosine_similarity(vectors, encode(weights, config, batch)).min()) > 0.98


@NEEDS_NO_GPU
@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize(("narrow", "least"), [("none", 0.9999), ("all", 0.98), ("every second", 0.98)])
def test_folded_layers_equal_the_oracle(narrow: str, least: float, model: tuple[BertConfig, Weights]) -> None:
    config, weights = model
    batch, cpu = make_packed([5, 1, 90, 33], torch.device("cpu")), torch.device("cpu")
    float16 = {"none": list_linears(3), "all": [], "every second": list_linears(3)[::2]}[narrow]
    if narrow == "none":
        linears = [[Linear(getattr(layer, name).half()) for name in MATRICES] for layer in weights.layers]
    else:
        linears = [load_linears(number, layer, float16, cpu) for number, layer in enumerate(weights.layers)]
    vectors = run_folded(config, weights, batch, linears)
    assert float(cosine_similarity(vectors, encode(weights, config, batch)).min()) > least


@NEEDS_NO_GPU
@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize(("wide", "least"), [("all", 1), ("down", 1), ("all", 1000)])
def test_layers_folded_into_the_wide_gemm_equal_the_oracle(
    wide: str, least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only some of a layer's products go there, so that sums over 192 columns and over 128 meet, and where
    rows are too few for those that add."""
    added = []
    config, weights = read_model(make_encoder(tmp_path, hidden=384, heads=6, intermediate=768, layers=3))

    def add(x: Tensor, *arguments: Any) -> None:
        added.append(x.shape[1])
        add_wide(x, *arguments)

    use_wide(monkeypatch, lambda weight: wide == "all" or weight.shape[1] == 768)
    monkeypatch.setattr(gemm_wide, "add", add)
    monkeypatch.setattr(gemm_wide, "least_rows", lambda columns, num_programs: least)
    batch = make_packed([5, 1, 90, 33], torch.device("cpu"))
    linears = [[Linear(getattr(layer, name).half()) for name in MATRICES] for layer in weights.layers]
    vectors = run_folded(config, weights, batch, linears, is_steady=False)
    assert float(cosine_similarity(vectors, encode(weights, config, batch)).min()) > 0.9999
    assert added == {("all", 1): [384, 768] * 3, ("down", 1): [768] * 3, ("all", 1000): []}[wide, least]


@NEEDS_NO_GPU
@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize("wide", ["all", "long", "short", "E4M3"])
@pytest.mark.parametrize("narrow", ["all", "every second", "two layers"])
def test_e4m3_layers_folded_into_the_wide_gemm_equal_the_oracle(
    wide: str, narrow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever products go there, in one layer perhaps others than in the next: who reads what it writes in E4M3 has
    its matrix in the same order. All that runs was compiled."""
    config, weights = read_model(make_encoder(tmp_path, hidden=384, heads=6, intermediate=768, layers=3))
    chosen: dict[str, Callable[[Tensor], bool]] = {
        "all": lambda weight: True,
        "long": lambda weight: weight.shape[1] == 768,
        "short": lambda weight: weight.shape[1] == 384,
        "E4M3": lambda weight: weight.dtype == torch.float8_e4m3fn,
    }
    compiled, ran = use_wide(monkeypatch, chosen[wide])
    batch, cpu = make_packed([5, 1, 90, 33], torch.device("cpu")), torch.device("cpu")
    names = list_linears(3)
    float16 = {"all": [], "every second": names[::2], "two layers": names[4:8]}[narrow]
    linears = [load_linears(number, layer, float16, cpu) for number, layer in enumerate(weights.layers)]
    vectors = run_folded(config, weights, batch, linears)
    assert float(cosine_similarity(vectors, encode(weights, config, batch)).min()) > 0.98
    assert compiled == ran


def test_the_wide_gemm_reorders_weights_as_it_writes() -> None:
    """x in its order times a weight in its order is the product; for E4M3 as well."""
    x, weight = torch.randn(5, 64), torch.randn(3, 64)
    order = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    assert gemm_wide.reorder(torch.arange(32.0).reshape(1, 32))[0].tolist() == [*order, *(each + 16 for each in order)]
    torch.testing.assert_close(gemm_wide.reorder(x) @ gemm_wide.reorder(weight).T, x @ weight.T)
    small = weight.to(torch.float8_e4m3fn)
    assert torch.equal(gemm_wide.reorder(small).float(), gemm_wide.reorder(small.float()))


@NEEDS_NO_GPU
@pytest.mark.usefixtures("twin")
def test_layers_without_a_compiler_for_the_wide_gemm_do_without_it(
    model: tuple[BertConfig, Weights], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(device: torch.device, forms: Collection[gemm_wide.Form]) -> None:
        raise CompileFailed("no such library: nvrtc")

    monkeypatch.setattr(gemm_wide, "fits", lambda weight: True)
    monkeypatch.setattr(gemm_wide, "prepare", fail)
    config, weights = model
    batch = make_packed([5, 1, 90, 33], torch.device("cpu"))
    linears = [[Linear(getattr(layer, name).half()) for name in MATRICES] for layer in weights.layers]
    vectors = run_folded(config, weights, batch, linears, is_steady=False)
    assert float(cosine_similarity(vectors, encode(weights, config, batch)).min()) > 0.9999
    assert "no such library: nvrtc" in caplog.text
