"""Twins of Hopper's kernels in plain PyTorch: what each says of itself, orders of columns included."""

from collections.abc import Callable, Collection
from functools import wraps
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor

from serving.engines.packing import TILE
from serving.kernels import attention_hopper, feed_forward, gemm_wide, reference
from tests.serving.kernels.packs import sum_rows


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


def narrow(x: Tensor, factor: Tensor, width: int = 64) -> Tensor:
    """E4M3 whose columns of each 64, or 16, lie as those of a thread: the orders of `gemm_wide` and `feed_forward`."""
    order = [each * 8 + lane * 2 + low for lane in range(4) for each in range(width // 8) for low in (0, 1)]
    return reference.quantize_tensor(x.view(len(x), -1, width)[:, :, order].flatten(1), 1 / factor)


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

    @wraps(multiply_wide)
    def multiply(*arguments: Any) -> None:
        given = signature(multiply_wide).bind(*arguments).arguments
        assert (given["x_scales"] is not None) == (given["weight"].dtype == torch.float8_e4m3fn)
        ran.add(gemm_wide.Form.of(given["weight"], False, given["gelu"], given["out_factor"] is not None))
        multiply_wide(*arguments)

    @wraps(add_wide)
    def add(*arguments: Any, **copy: Any) -> None:
        given = signature(add_wide).bind(*arguments, **copy).arguments
        assert (given["x_scale"] is not None) == (given["weight"].dtype == torch.float8_e4m3fn)
        ran.add(gemm_wide.Form.of(given["weight"], True, False, "copy" in given))
        add_wide(*arguments, **copy)

    twins = ("fits", lambda weight, device: fits(weight)), ("linear", multiply), ("add", add), ("prepare", prepare)
    for name, twin in twins:
        monkeypatch.setattr(gemm_wide, name, twin)
    monkeypatch.setattr(gemm_wide, "_LEAST_DEEP", 512)  # some of the models' projections down
    return compiled, ran


def attend_tiles(
    qkv: Tensor, tiles: Tensor, heads: int, out: Tensor, ticket: Tensor, num_programs: int,
    out_factor: Tensor | None = None, is_upward: bool = False,
) -> None:  # fmt: skip
    """What `attention_hopper.attention` says of itself: rows in no tile are left as they are."""
    assert ticket.tolist() == [0]
    for top, first, end in tiles[2 : 3 * int(tiles[0]) + 2].view(-1, 3).tolist():
        starts, until = torch.zeros(end - first, dtype=torch.int32), min(top + TILE, end)
        own = reference.attention(qkv[first:end].float(), starts, starts + end - first, heads)
        result = own[top - first : until - first]
        out[top:until].copy_(result if out_factor is None else reference.quantize_tensor(result, 1 / out_factor))


def use_attention(monkeypatch: pytest.MonkeyPatch) -> tuple[set[bool], list[bool]]:
    """Attention by tiles in plain PyTorch; which forms will have been compiled, and have run in turn: E4M3 or not."""
    compiled: set[bool] = set()
    ran: list[bool] = []

    def prepare(device: torch.device, size: int, forms: Collection[bool]) -> None:
        assert size in attention_hopper.HEAD_SIZES
        compiled.update(forms)

    @wraps(attend_tiles)
    def attend(*arguments: Any) -> None:
        ran.append(signature(attend_tiles).bind(*arguments).arguments["out_factor"] is not None)
        attend_tiles(*arguments)

    monkeypatch.setattr(attention_hopper, "is_hopper", lambda device: True)
    monkeypatch.setattr(attention_hopper, "attention", attend)
    monkeypatch.setattr(attention_hopper, "prepare", prepare)
    return compiled, ran


def run_block(
    x: Tensor, small: Tensor, sums: Tensor, block: feed_forward.Block, out_sums: Tensor, num_programs: int, eps: float,
    is_upward: bool = False, out_factor: Tensor | None = None,
) -> None:  # fmt: skip
    """What `feed_forward.run` says of itself: rows of up that sum to 0 take the mean away."""
    assert {each.dtype for each in (x, block.up_bias, block.down_bias, block.scale)} == {torch.float16}
    up, down = block.weights
    mean, spread = read_norm(sums, x.shape[1], eps)
    inner = multiply_scaled(small, up, block.x_scale, block.up_scale) * spread + block.up_bias.float()
    inner = reference.quantize_tensor(torch.nn.functional.gelu(inner), 1 / block.inner_factor)
    product = multiply_scaled(inner, down, block.inner_scale, block.down_scale)
    result = product + block.down_bias.float() + (x.float() - mean) * spread * block.scale.float()
    out_sums.copy_(sum_rows(result))
    x.copy_(result)
    if out_factor is not None:
        small.copy_(narrow(result, out_factor, 16))


def use_block(monkeypatch: pytest.MonkeyPatch) -> tuple[set[bool], list[bool]]:
    """The feed-forward block in plain PyTorch, for E4M3; which forms will have been compiled, and have run in turn."""
    compiled: set[bool] = set()
    ran: list[bool] = []

    def fits(up: Tensor, down: Tensor, device: torch.device) -> bool:
        return up.dtype == down.dtype == torch.float8_e4m3fn and tuple(up.shape) == (768, 384)

    def prepare(device: torch.device, forms: Collection[bool]) -> None:
        compiled.update(forms)

    @wraps(run_block)
    def run(*arguments: Any) -> None:
        ran.append(signature(run_block).bind(*arguments).arguments["out_factor"] is not None)
        run_block(*arguments)

    twins = ("fits", fits), ("arrange", lambda *weights: weights), ("run", run), ("prepare", prepare)
    for name, twin in twins:
        monkeypatch.setattr(feed_forward, name, twin)
    return compiled, ran
