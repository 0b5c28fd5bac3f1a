"""Every kernel against its plain-PyTorch twin: odd shapes, fresh inputs, poisoned outputs."""

from itertools import product

import pytest
import torch
from torch import Tensor

from serving.engines.e4m3 import quantize_weight
from serving.kernels import reference
from serving.kernels.add_norm import add_norm
from serving.kernels.attention import attention
from serving.kernels.embed_norm import embed_norm
from serving.kernels.gemm import add_product, linear
from serving.kernels.pool import pool
from tests.serving.kernels.packs import TOKENS, assert_as_exact_as, make_packed, poisoned, relative_error, sum_rows

LENGTHS = ([1], [511], [512], [1, 1, 1], [3, 70, 1, 64, 13], [33, 31, 64])
EPS = 1e-12
ONE_STEP = 0.09  # the interpreter cuts to E4M3 where the GPU rounds


def draw(*shape: int, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).half().to(device)


def as_float(*tensors: Tensor) -> list[Tensor]:
    return [each.float() for each in tensors]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("hidden", [64, 384])
def test_embed_norm_equals_reference(lengths: list[int], hidden: int, device: torch.device) -> None:
    batch = make_packed(lengths, device)
    tables = [draw(TOKENS, hidden, device=device), draw(512, hidden, device=device)]
    tables += [draw(hidden, device=device), draw(hidden, device=device)]
    out = poisoned(len(batch.ids), hidden, device=device)
    embed_norm(batch.ids, batch.starts, *tables, EPS, out)
    plain = reference.embed_norm(batch.ids, batch.starts, *tables, EPS)
    assert_as_exact_as(out, plain, reference.embed_norm(batch.ids, batch.starts, *as_float(*tables), EPS))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("size", [32, 64])
def test_attention_equals_reference(lengths: list[int], size: int, device: torch.device) -> None:
    batch, heads = make_packed(lengths, device), 2
    tokens, hidden = len(batch.ids), heads * size
    qkv, out = draw(tokens, 3 * hidden, device=device), poisoned(tokens, hidden, device=device)
    attention(qkv, batch.starts, batch.ends, heads, out)
    plain = reference.attention(qkv, batch.starts, batch.ends, heads)
    assert_as_exact_as(out, plain, reference.attention(qkv.float(), batch.starts, batch.ends, heads))
    downward = poisoned(tokens, hidden, device=device)
    attention(qkv, batch.starts, batch.ends, heads, downward, is_upward=False)
    assert torch.equal(downward, out)


def test_attention_survives_scores_far_from_zero(device: torch.device) -> None:
    batch = make_packed([40, 100], device)
    qkv, out = draw(140, 192, device=device, scale=30.0), poisoned(140, 64, device=device)
    attention(qkv, batch.starts, batch.ends, 2, out)
    plain = reference.attention(qkv, batch.starts, batch.ends, 2)
    assert_as_exact_as(out, plain, reference.attention(qkv.float(), batch.starts, batch.ends, 2))


def test_attention_quantises_by_the_given_factor(device: torch.device) -> None:
    batch, factor = make_packed([5, 60], device), torch.tensor([50.0], device=device)
    qkv, out = draw(65, 192, device=device), torch.zeros(65, 64, dtype=torch.float8_e4m3fn, device=device)
    attention(qkv, batch.starts, batch.ends, 2, out, factor)
    oracle = reference.attention(qkv.float(), batch.starts, batch.ends, 2)
    assert relative_error(out.float() / factor, oracle) < ONE_STEP


@pytest.mark.parametrize("rows", [1, 64, 65, 130, 511, 512])
@pytest.mark.parametrize("gelu", [False, True])
def test_linear_equals_reference(rows: int, gelu: bool, device: torch.device) -> None:
    x, weight, bias = draw(rows, 64, device=device), draw(192, 64, device=device, scale=0.2), draw(192, device=device)
    out = poisoned(rows, 192, device=device)
    linear(x, weight, bias, out, gelu=gelu)
    plain = reference.linear(x, weight, bias, gelu)
    assert_as_exact_as(out, plain, reference.linear(*as_float(x, weight, bias), gelu=gelu))


def test_linear_takes_and_gives_e4m3(device: torch.device) -> None:
    x, weight, bias = draw(70, 64, device=device), draw(192, 64, device=device, scale=0.2), draw(192, device=device)
    x_scales = x.float().abs().amax(1) / 448
    narrow = (x.float() / x_scales.reshape(-1, 1)).to(torch.float8_e4m3fn)
    weight_scale = torch.tensor([0.01], device=device)
    small = (weight.float() / weight_scale).to(torch.float8_e4m3fn)
    out, factor = torch.zeros(70, 192, dtype=torch.float8_e4m3fn, device=device), torch.tensor([20.0], device=device)
    linear(narrow, small, bias, out, True, x_scales, weight_scale, factor)
    oracle = reference.linear(
        narrow.float() * x_scales.reshape(-1, 1), small.float() * weight_scale, bias.float(), gelu=True
    )
    assert relative_error(out.float() / factor, oracle) < ONE_STEP


@pytest.mark.parametrize("is_narrow", [False, True], ids=["f16-f8", "f8-f16"])
def test_linear_goes_from_one_type_to_the_other(is_narrow: bool, device: torch.device) -> None:
    x, weight, bias = draw(70, 64, device=device), draw(192, 64, device=device, scale=0.2), draw(192, device=device)
    oracle = reference.linear(*as_float(x, weight, bias), gelu=True)
    if is_narrow:
        values, scales = reference.quantize_rows(x)
        small, weight_scale = quantize_weight(weight)
        out = poisoned(70, 192, device=device)
        linear(values, small, bias, out, True, scales[:, 0].contiguous(), weight_scale)
        assert relative_error(out, oracle) < ONE_STEP
    else:
        factor = torch.tensor([20.0], device=device)
        narrow = torch.zeros(70, 192, dtype=torch.float8_e4m3fn, device=device)
        linear(x, weight, bias, narrow, True, out_factor=factor)
        assert relative_error(narrow.float() / factor, oracle) < ONE_STEP


@pytest.mark.parametrize("rows", [33, 511, 512])
def test_add_product_adds_in_place(rows: int, device: torch.device) -> None:
    x, weight, total = draw(rows, 64, device=device), draw(48, 64, device=device), draw(rows, 48, device=device)
    plain, oracle = total + x @ weight.T, total.float() + x.float() @ weight.float().T
    add_product(x, weight, total)
    assert_as_exact_as(total, plain, oracle)


@pytest.mark.parametrize(
    ("rows", "with_residual", "hidden"),
    [*product([1, 2, 7], [False, True], [64, 384]), (511, True, 64), (511, False, 384), (512, True, 384)],
)
def test_add_norm_equals_reference(rows: int, with_residual: bool, hidden: int, device: torch.device) -> None:
    x, residual = draw(rows, hidden, device=device), draw(rows, hidden, device=device)
    bias, weight, shift = (draw(hidden, device=device) for _ in range(3))
    out = poisoned(rows, hidden, device=device)
    add_norm(x, residual if with_residual else None, bias, weight, shift, EPS, out)
    plain = reference.add_norm(x, residual if with_residual else None, bias, weight, shift, EPS)
    wide = as_float(x, residual, bias, weight, shift)
    oracle = reference.add_norm(wide[0], wide[1] if with_residual else None, *wide[2:], EPS)
    assert_as_exact_as(out, plain, oracle)


def test_add_norm_quantises_rows_before_scale_and_shift(device: torch.device) -> None:
    x, (bias, weight, shift) = draw(5, 96, device=device), (draw(96, device=device) for _ in range(3))
    out, narrow = poisoned(5, 96, device=device), torch.zeros(5, 96, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.full((5,), float("nan"), device=device)
    add_norm(x, None, bias, weight, shift, EPS, out, narrow, scales)
    plain = reference.add_norm(*as_float(x), None, *as_float(bias, weight, shift), EPS)
    assert relative_error(out, plain) < 1e-3
    values, expected = reference.quantize_rows((plain - shift.float()) / weight.float())
    assert relative_error(scales, expected[:, 0]) < 1e-2
    assert relative_error(narrow.float() * scales[:, None], values.float() * expected) < ONE_STEP


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("lengths", [[1], [512], [3, 17, 1, 40]], ids=str)
@pytest.mark.parametrize("hidden", [96, 768])
def test_pool_equals_reference(
    hidden: int, lengths: list[int], pooling: str, normalize: bool, device: torch.device
) -> None:
    batch = make_packed(lengths, device)
    x = draw(len(batch.ids), hidden, device=device)
    out = poisoned(len(lengths), hidden, device=device, dtype=torch.float32)
    done = torch.zeros(len(lengths), dtype=torch.int32, device=device)
    pool(x, batch.offsets, pooling, normalize, out, done)
    assert not done.any()
    torch.testing.assert_close(out, reference.pool(x, batch.offsets, pooling, normalize), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("hidden", [384, 768])
def test_pool_applies_the_layer_norm_that_is_still_to_come(hidden: int, pooling: str, device: torch.device) -> None:
    batch = make_packed([3, 17, 1, 40], device)
    x, scale, shift = draw(61, hidden, device=device), draw(hidden, device=device), draw(hidden, device=device)
    out, parts = poisoned(4, hidden, device=device, dtype=torch.float32), x.float().view(61, -1, 128)
    sums = torch.stack([parts.sum(2), parts.square().sum(2)], dim=2)
    pool(
        x,
        batch.offsets,
        pooling,
        False,
        out,
        torch.zeros(4, dtype=torch.int32, device=device),
        (sums, scale, shift, EPS),
    )
    wide = as_float(x, torch.zeros_like(scale), scale, shift)
    normed = reference.add_norm(wide[0], None, *wide[1:], EPS)
    torch.testing.assert_close(out, reference.pool(normed, batch.offsets, pooling, False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_upward", [False, True])
def test_pool_leaves_the_vector_of_an_empty_sequence_alone(is_upward: bool, device: torch.device) -> None:
    """With whatever else there is to do; counters serve one run after the other."""
    offsets = torch.tensor([0, 2, 2, 70], dtype=torch.int32, device=device)
    x, scale, shift = draw(70, 1024, device=device), draw(1024, device=device), draw(1024, device=device)
    norm, done = (sum_rows(x, 256), scale, shift, EPS), torch.zeros(3, dtype=torch.int32, device=device)
    normed = reference.add_norm(x.float(), None, torch.zeros_like(scale), scale.float(), shift.float(), EPS)
    expected = reference.pool(normed, offsets[[0, 1, 3]], "mean", True)
    for _ in range(2):
        out = torch.full((3, 1024), 7.0, device=device)
        pool(x, offsets, "mean", True, out, done, norm, is_upward)
        torch.testing.assert_close(out[[0, 2]], expected, rtol=1e-5, atol=1e-6)
        assert out[1].tolist() == [7.0] * 1024
        assert not done.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="programs run one after the other without a GPU")
@pytest.mark.parametrize("length", [2, 20])  # the former starts early
def test_pool_has_the_bits_of_the_first_run_however_programs_meet(length: int, device: torch.device) -> None:
    offsets = torch.arange(0, 4097 * length, length, dtype=torch.int32, device=device)
    x, done = draw(4096 * length, 1024, device=device), torch.zeros(4096, dtype=torch.int32, device=device)
    expected, out = (poisoned(4096, 1024, device=device, dtype=torch.float32) for _ in range(2))
    pool(x, offsets, "mean", True, expected, done)
    torch.testing.assert_close(expected, reference.pool(x, offsets, "mean", True), rtol=1e-5, atol=1e-6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pool(x, offsets, "mean", True, out, done)
    for _ in range(50):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)
