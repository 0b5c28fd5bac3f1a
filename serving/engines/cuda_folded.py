"""The layers for many tokens on Hopper: no layer norm runs by itself.

Whoever computes a state writes it as it is, with the sums over its rows that its layer norm needs. Who multiplies it by
a matrix has the norm's scale in the matrix and its shift in the bias, and corrects the product by mean and spread; who
adds it normalises what it adds. The norm behind the last layer is left to the pooling. Each kernel begins with the rows
that the one before it wrote last, which the second cache still has: they go down and up in turns.

Where a matrix is E4M3, the state is written in E4M3 as well, by a calibrated scale: a few states reach a hundred times
as far as the others, and their norm, whose mean and spread come from all of them, does not survive a cut.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from serving.engines.bert import BertConfig, Layer, Packed, Weights
from serving.engines.cuda_linears import Linear, quantize
from serving.engines.e4m3 import choose_input_scale
from serving.kernels.attention import attention
from serving.kernels.pool import Norm

_HALF = torch.float16
Carve = Callable[[int, int, int, torch.dtype], Tensor]


@dataclass(frozen=True, slots=True)
class States:
    """Where the states [T, H] of a run lie: in float16, and in E4M3 with the embeddings' scales [T], where read so."""

    x: Tensor
    narrow: Tensor | None = None
    scales: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Product:
    """Of a state before its norm: the scaled matrix, the bias with the shift, and the matrix's row sums [N]."""

    linear: Linear
    bias: Tensor
    sums: Tensor


@dataclass(frozen=True, slots=True)
class _Folded:
    """One layer; `scale` and `middle_scale` are of the states that the output and down projections add to."""

    query: _Product
    output: Linear
    out_bias: Tensor
    scale: Tensor
    up: _Product
    down: Linear
    down_bias: Tensor
    middle_scale: Tensor


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
        """`linears`: the layers' own, on the device, of which output and down are used as they are and all say which
        is E4M3. `is_steady`: see `attention`."""
        self._config, self._is_steady, device = config, is_steady, linears[0][1].weight.device
        before: Layer | None = None
        self._layers: list[_Folded] = []
        for layer, own in zip(weights.layers, linears, strict=True):
            self._layers.append(_fold(layer, own, before))
            before = layer
        last = weights.layers[-1]
        self._norm = last.down_norm_weight.to(device, _HALF), last.down_norm_bias.to(device, _HALF)
        # Sums of rows with mean 0 and spread 1, of the states after the attention, and of those after the layer.
        self._sums = torch.zeros(3, max_tokens, config.hidden // 128, 2, device=device)
        self._sums[0, :, :, 1] = 128.0
        self._programs = torch.cuda.get_device_properties(device).multi_processor_count

    def run(self, batch: Packed, states: States, carve: Carve, is_long: bool) -> tuple[Norm, bool]:
        """Take the normalised embeddings, written downward, through all layers; `carve` gives pieces of the wide area.

        Returns the norm that is still to come, and whether who reads the states is to go upward.
        """
        config, tokens = self._config, len(states.x)
        before, middle, after = (sums[:tokens] for sums in self._sums)
        up = True
        for number, layer in enumerate(self._layers):
            follower = self._layers[number + 1].query.linear if number + 1 < config.layers else None
            context = self._attend(layer, batch, states, carve, is_long, None if number == 0 else before, up)
            self._add(context, layer.output, layer.out_bias, states, (before, layer.scale, middle), layer.up.linear, up)
            inner = carve(0, tokens, config.intermediate, layer.down.dtype)
            self._multiply(layer.up, states, inner, middle, not up, True, layer.down.x_factor)
            self._add(inner, layer.down, layer.down_bias, states, (middle, layer.middle_scale, after), follower, up)
            before, up = after, not up
        return (after, *self._norm, config.eps), up

    def _attend(
        self, layer: _Folded, batch: Packed, states: States, carve: Carve, is_long: bool, sums: Tensor | None, up: bool
    ) -> Tensor:
        config, tokens, output = self._config, len(states.x), layer.output
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
        from serving.kernels.gemm_hopper import RowNorm, linear  # noqa: PLC0415  Gluon loads only where it can run

        own, norm = product.linear, None
        x, x_scales = (states.x, None) if own.dtype == _HALF else (states.narrow, states.scales)
        if sums is not None:
            norm, x_scales = RowNorm(sums, product.sums, self._config.eps), own.x_scale
        linear(
            x, own.weight, product.bias, out, self._programs, gelu, None, x_scales, own.weight_scale, out_factor, norm,
            is_upward=up,
        )  # fmt: skip

    def _add(
        self, x: Tensor, own: Linear, bias: Tensor, states: States, norm: tuple[Tensor, Tensor, Tensor],
        reader: Linear | None, up: bool,
    ) -> None:  # fmt: skip
        """Add a product to the states, which `norm` normalises on the way (their sums, their scale) and sums anew."""
        from serving.kernels.gemm_hopper import RowNorm, linear  # noqa: PLC0415  Gluon loads only where it can run

        sums, scale, out_sums = norm
        copy: dict[str, Any] = {}
        if reader is not None and reader.dtype != _HALF:
            copy = {"copy": states.narrow, "out_factor": reader.x_factor}
        linear(
            x, own.weight, bias, states.x, self._programs, residual=states.x, x_scales=own.x_scale,
            weight_scale=own.weight_scale, norm=RowNorm(sums, scale, self._config.eps), out_sums=out_sums, is_upward=up,
            **copy,
        )  # fmt: skip


def _fold(layer: Layer, linears: Sequence[Linear], before: Layer | None) -> _Folded:
    """The layer on states whose norm, that of the layer `before`, is still to come; the embeddings were normalised."""
    query, output, up, down = linears
    device, hidden = output.weight.device, len(layer.out_bias)
    if before is None:
        scale, shift = torch.ones(hidden), torch.zeros(hidden)
        product = _Product(query, layer.qkv_bias.to(device, _HALF), torch.empty(0))
    else:
        scale, shift = before.down_norm_weight, before.down_norm_bias
        product = _fold_product(layer.qkv_weight, layer.qkv_bias, scale, shift, query, (before.state_amax, 1))
    middle_scale, middle_shift = layer.out_norm_weight, layer.out_norm_bias
    return _Folded(
        query=product,
        output=output,
        out_bias=(layer.out_bias + shift).to(device, _HALF),
        scale=scale.to(device, torch.float32),
        up=_fold_product(layer.up_weight, layer.up_bias, middle_scale, middle_shift, up, (layer.state_amax, 0)),
        down=down,
        down_bias=(layer.down_bias + middle_shift).to(device, _HALF),
        middle_scale=middle_scale.to(device, torch.float32),
    )


def _fold_product(
    weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, own: Linear, state: tuple[Tensor | None, int]
) -> _Product:
    """`state`: the calibrated states that this multiplies, of which a norm has one."""
    device, scaled = own.weight.device, weight * scale
    if own.dtype == _HALF:
        folded = Linear(scaled.to(device, _HALF))
    else:
        amax, norm = state
        assert amax is not None, "calibrated"
        folded = quantize(scaled, choose_input_scale(amax[norm]), device)
    return _Product(folded, (bias + weight @ shift).to(device, _HALF), folded.weight.float().sum(1))
