"""The layers for many tokens on Hopper: no layer norm runs by itself.

Whoever computes a state writes it as it is, with the sums over its rows that its layer norm needs. Who multiplies it by
a matrix has the norm's scale in the matrix and its shift in the bias, and corrects the product by mean and spread; who
adds it normalises what it adds. The norm behind the last layer is left to the pooling. Each kernel begins with the rows
that the one before it wrote last, which the second cache still has: they go down and up in turns.

The GEMM is `gemm_wide` where that is faster, else `gemm_hopper`. Where a matrix is E4M3, the state is written in E4M3
as well, by a calibrated scale: a few states reach a hundred times as far as the others, and their norm, whose mean and
spread come from all of them, does not survive a cut. What `gemm_wide` writes in E4M3 has an order of columns into which
the matrices that read it are brought.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from serving.engines.bert import BertConfig, Layer, Packed, Weights
from serving.engines.cuda_linears import Linear, quantize
from serving.engines.e4m3 import choose_input_scale
from serving.kernels import gemm_wide
from serving.kernels.attention import attention
from serving.kernels.compiled import CompileFailed
from serving.kernels.pool import Norm

_HALF = torch.float16
_log = logging.getLogger(__name__)
Carve = Callable[[int, int, int, torch.dtype], Tensor]


@dataclass(frozen=True, slots=True)
class States:
    """Where the states [T, H] of a run lie: in float16, and in E4M3 with the embeddings' scales [T], where read so."""

    x: Tensor
    narrow: Tensor | None = None
    scales: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Product:
    """Of a state before its norm: the scaled matrix, the bias with the shift, and the matrix's row sums [N]; none where
    they are 0, as `gemm_wide` has it."""

    linear: Linear
    bias: Tensor
    sums: Tensor | None


@dataclass(frozen=True, slots=True)
class _Sum:
    """Added to a state: its norm's scale, and whether `gemm_wide` does it for many rows."""

    linear: Linear
    bias: Tensor
    scale: Tensor
    is_wide: bool


@dataclass(frozen=True, slots=True)
class _Folded:
    """One layer."""

    query: _Product
    output: _Sum
    up: _Product
    down: _Sum


class FoldedLayers:
    """Layers on a workspace of row sums, allocated once."""

    def __init__(
        self,
        weights: Weights,
        config: BertConfig,
        linears: Sequence[Sequence[Linear]],
        max_tokens: int,
        is_steady: bool,
    ) -> None:
        """`linears`: the layers' own, on the device, of which output and down are used as they are, their
        columns perhaps in another order, and all say which is E4M3. `is_steady`: see `attention`."""
        self._config, self._is_steady, device = config, is_steady, linears[0][1].weight.device
        has_wide = _prepare_wide(linears)
        before: tuple[Layer, _Folded] | None = None
        self._layers: list[_Folded] = []
        for layer, own in zip(weights.layers, linears, strict=True):
            self._layers.append(_fold(layer, own, before, has_wide))
            before = layer, self._layers[-1]
        last = weights.layers[-1]
        self._norm = last.down_norm_weight.to(device, _HALF), last.down_norm_bias.to(device, _HALF)
        # Sums of rows with mean 0 and spread 1, of the states after the attention, and of those after the layer.
        self._plain = torch.tensor([0.0, config.hidden], device=device).repeat(max_tokens, 1, 1)
        self._sums = torch.zeros(2, max_tokens * config.hidden // 128, 2, device=device)
        self._programs = torch.cuda.get_device_properties(device).multi_processor_count

    def run(self, batch: Packed, states: States, carve: Carve, is_long: bool) -> tuple[Norm, bool]:
        """Take the normalised embeddings, written downward, through all layers; `carve` gives pieces of the wide area.

        Returns the norm that is still to come, and whether who reads the states is to go upward.
        """
        config, tokens = self._config, len(states.x)
        before, up = self._plain[:tokens], True
        for number, layer in enumerate(self._layers):
            middle, after = self._take_sums(0, layer.output, tokens), self._take_sums(1, layer.down, tokens)
            follower = self._layers[number + 1].query.linear if number + 1 < config.layers else None
            context = self._attend(layer, batch, states, carve, is_long, None if number == 0 else before, up)
            self._add(context, layer.output, states, (before, middle), layer.up.linear, up)
            inner = carve(0, tokens, config.intermediate, layer.down.linear.dtype)
            self._multiply(layer.up, states, inner, middle, not up, True, layer.down.linear.x_factor)
            self._add(inner, layer.down, states, (middle, after), follower, up)
            before, up = after, not up
        return (after, *self._norm, config.eps), up

    def _take_sums(self, number: int, added: _Sum, tokens: int) -> Tensor:
        """Where the sums [T, parts, 2] of what `added` writes lie: one for the columns of each of its tiles."""
        parts = self._config.hidden // (gemm_wide.COLUMNS if self._goes_wide(added, tokens) else 128)
        return self._sums[number, : tokens * parts].view(tokens, parts, 2)

    def _goes_wide(self, added: _Sum, tokens: int) -> bool:
        """A steady result may not depend on the number of rows."""
        least = 0 if self._is_steady else gemm_wide.least_rows(self._config.hidden, self._programs)
        return added.is_wide and tokens >= least

    def _attend(
        self, layer: _Folded, batch: Packed, states: States, carve: Carve, is_long: bool, sums: Tensor | None, up: bool
    ) -> Tensor:
        config, tokens, output = self._config, len(states.x), layer.output.linear
        qkv = carve(0, tokens, 3 * config.hidden, _HALF)
        context = carve(tokens * 6 * config.hidden, tokens, config.hidden, output.dtype)
        self._multiply(layer.query, states, qkv, sums, up)
        bounds = batch.starts, batch.ends
        attention(qkv, *bounds, config.heads, context, output.x_factor, is_long, self._is_steady, not up)
        return context

    def _multiply(
        self, product: _Product, states: States, out: Tensor, sums: Tensor | None, up: bool, gelu: bool = False,
        out_factor: Tensor | None = None,
    ) -> None:  # fmt: skip
        """A product with the normalised states; without `sums` they are normalised already."""
        own, eps = product.linear, self._config.eps
        x, x_scales = (states.x, None) if own.dtype == _HALF else (states.narrow, states.scales)
        if sums is not None:
            x_scales = own.x_scale
        assert x is not None, "E4M3 states where a layer reads such"
        if product.sums is None:
            known = self._plain[: len(x)] if sums is None else sums
            scales = x_scales, own.weight_scale, out_factor
            gemm_wide.linear(x, own.weight, product.bias, out, self._programs, known, eps, gelu, up, *scales)
            return
        from serving.kernels.gemm_hopper import RowNorm, linear  # noqa: PLC0415  Gluon loads only where it can run

        norm = None if sums is None else RowNorm(sums, product.sums, eps)
        linear(
            x, own.weight, product.bias, out, self._programs, gelu, None, x_scales, own.weight_scale, out_factor, norm,
            is_upward=up,
        )  # fmt: skip

    def _add(
        self, x: Tensor, added: _Sum, states: States, sums: tuple[Tensor, Tensor], reader: Linear | None, up: bool
    ) -> None:
        """Add a product to the states, which are normalised by their sums on the way and summed anew."""
        own, eps, (before, after) = added.linear, self._config.eps, sums
        copy: dict[str, Any] = {}
        if reader is not None and reader.dtype != _HALF:
            copy = {"copy": states.narrow, "out_factor": reader.x_factor}
        if self._goes_wide(added, len(x)):
            gemm_wide.add(
                x, own.weight, added.bias, states.x, self._programs, before, added.scale, eps, after, up,
                own.x_scale, own.weight_scale, **copy,
            )  # fmt: skip
            return
        from serving.kernels.gemm_hopper import RowNorm, linear  # noqa: PLC0415  Gluon loads only where it can run

        linear(
            x, own.weight, added.bias, states.x, self._programs, residual=states.x, x_scales=own.x_scale,
            weight_scale=own.weight_scale, norm=RowNorm(before, added.scale, eps), out_sums=after, is_upward=up, **copy,
        )  # fmt: skip


def _prepare_wide(linears: Sequence[Sequence[Linear]]) -> bool:
    """Whether `gemm_wide` is to be had, for those of the layers' linears that it fits."""
    forms = _list_forms(linears)
    if not forms:
        return False
    try:
        gemm_wide.prepare(linears[0][0].weight.device, forms)
    except CompileFailed as error:
        _log.warning("many tokens run on the GEMM with smaller tiles reason=%s", error)
        return False
    return True


def _list_forms(linears: Sequence[Sequence[Linear]]) -> set[gemm_wide.Form]:
    """What `gemm_wide` is compiled for: a result is in E4M3, or has a copy that is, where its reader takes E4M3."""
    forms = set()
    for number, (query, output, up, down) in enumerate(linears):
        follower = linears[number + 1][0] if number + 1 < len(linears) else None
        readers = None, up, down, follower
        for place, (own, reader) in enumerate(zip((query, output, up, down), readers, strict=True)):
            if gemm_wide.fits(own.weight):
                is_read = reader is not None and reader.dtype != _HALF
                forms.add(gemm_wide.Form(place % 2 == 1, place == 2, own.dtype != _HALF, is_read))
    return forms


def _fold(layer: Layer, linears: Sequence[Linear], before: tuple[Layer, _Folded] | None, has_wide: bool) -> _Folded:
    """The layer on states whose norm, that of the layer `before`, is still to come; the embeddings were normalised."""
    query, output, up, down = linears
    hidden = len(layer.out_bias)
    if before is None:
        scale, shift = torch.ones(hidden), torch.zeros(hidden)
        is_wide = has_wide and gemm_wide.fits(query.weight)
        bias = layer.qkv_bias.to(query.weight.device, _HALF)
        product = _Product(query, bias, None if is_wide else torch.empty(0))
    else:
        earlier, folded = before
        scale, shift = earlier.down_norm_weight, earlier.down_norm_bias
        product = _fold_product(
            layer.qkv_weight,
            layer.qkv_bias,
            query,
            (scale, shift),
            (earlier.state_amax, 1),
            folded.down.is_wide,
            has_wide,
        )
    middle = layer.out_norm_weight, layer.out_norm_bias
    first = _fold_sum(output, layer.out_bias, (scale, shift), has_wide)
    inner = _fold_product(layer.up_weight, layer.up_bias, up, middle, (layer.state_amax, 0), first.is_wide, has_wide)
    if inner.sums is None and down.dtype != _HALF:
        down = replace(down, weight=gemm_wide.reorder(down.weight))
    return _Folded(product, first, inner, _fold_sum(down, layer.down_bias, middle, has_wide))


def _fold_sum(own: Linear, bias: Tensor, norm: tuple[Tensor, Tensor], has_wide: bool) -> _Sum:
    """`norm`: scale and shift of that of the state that is added to."""
    (scale, shift), device = norm, own.weight.device
    is_wide = has_wide and gemm_wide.fits(own.weight)
    return _Sum(own, (bias + shift).to(device, _HALF), scale.to(device, _HALF if is_wide else torch.float32), is_wide)


def _fold_product(
    weight: Tensor, bias: Tensor, own: Linear, norm: tuple[Tensor, Tensor], state: tuple[Tensor | None, int],
    is_reordered: bool, has_wide: bool,
) -> _Product:  # fmt: skip
    """`norm`: scale and shift; `state`: the calibrated states that this multiplies, of which a norm has one, and whose
    E4M3 `is_reordered`.

    A matrix for `gemm_wide` is centred, which takes the mean of a row of states away. The rounding of its values to
    E4M3 is not centred: the mean, a part of the states like any other, times the sum of a row's rounding errors stays.
    """
    (scale, shift), device = norm, own.weight.device
    scaled, folded_bias = weight * scale, (bias + weight @ shift).to(device, _HALF)
    is_wide = has_wide and gemm_wide.fits(own.weight)
    if is_wide:
        scaled = scaled - scaled.mean(1, keepdim=True)
    if own.dtype == _HALF:
        folded = Linear(scaled.to(device, _HALF))
    else:
        amax, number = state
        assert amax is not None, "calibrated"
        folded = quantize(
            gemm_wide.reorder(scaled) if is_reordered else scaled, choose_input_scale(amax[number]), device
        )
    return _Product(folded, folded_bias, None if is_wide else folded.weight.float().sum(1))
