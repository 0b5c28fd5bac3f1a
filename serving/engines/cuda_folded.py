"""The layers for many tokens on Hopper: no layer norm runs by itself.

Whoever computes a state writes it as it is, with the sums over its rows that its layer norm needs. Who multiplies it by
a matrix has the norm's scale in the matrix and its shift in the bias, and corrects the product by mean and spread; who
adds it normalises what it adds. One layer norm is left, behind the last layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.engines.bert import BertConfig, Layer, Packed, Weights
from serving.kernels.add_norm import add_norm
from serving.kernels.attention import attention

_HALF = torch.float16
Carve = Callable[[int, int, int, torch.dtype], Tensor]


@dataclass(frozen=True, slots=True)
class _Product:
    """Of a state before its norm: the scaled matrix [N, H], the bias with the shift, and the matrix's row sums [N]."""

    weight: Tensor
    bias: Tensor
    sums: Tensor

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, device: torch.device) -> "_Product":
        folded = (weight * scale).to(device, _HALF)
        return cls(folded, (bias + weight @ shift).to(device, _HALF), folded.float().sum(1))


@dataclass(frozen=True, slots=True)
class _Folded:
    """One layer; `scale` and `middle_scale` are of the states that the output and down projections add to."""

    query: _Product
    out_weight: Tensor
    out_bias: Tensor
    scale: Tensor
    up: _Product
    down_weight: Tensor
    down_bias: Tensor
    middle_scale: Tensor


class FoldedLayers:
    """Float16 layers on a workspace of row sums, allocated once."""

    def __init__(
        self, weights: Weights, config: BertConfig, out_weights: Tensor, down_weights: Tensor, max_tokens: int
    ) -> None:
        """`out_weights` and `down_weights`: the layers' [L, H, ...] on the device, which are used as they are."""
        self._config, device = config, out_weights.device
        before = torch.ones(config.hidden), torch.zeros(config.hidden)  # the embeddings were normalised
        self._layers = []
        for number, layer in enumerate(weights.layers):
            matrices = out_weights[number], down_weights[number]
            self._layers.append(_fold(layer, *matrices, *before))
            before = layer.down_norm_weight, layer.down_norm_bias
        self._norm = before[0].to(device, _HALF), before[1].to(device, _HALF)
        self._no_bias = torch.zeros(config.hidden, dtype=_HALF, device=device)
        # Sums of rows with mean 0 and spread 1, of the states after the attention, and of those after the layer.
        self._sums = torch.zeros(3, max_tokens, config.hidden // 128, 2, device=device)
        self._sums[0, :, :, 1] = 128.0
        self._programs = torch.cuda.get_device_properties(device).multi_processor_count

    def run(self, batch: Packed, x: Tensor, carve: Carve, is_long: bool) -> None:
        """Take x [T, H], the normalised embeddings, through all layers; `carve` gives pieces of the wide area."""
        config, tokens = self._config, len(x)
        before, middle, after = (sums[:tokens] for sums in self._sums)
        for layer in self._layers:
            self._attend(layer, batch, x, carve, is_long, before, middle)
            self._feed_forward(layer, x, carve(0, tokens, config.intermediate, _HALF), middle, after)
            before = after
        add_norm(x, None, self._no_bias, *self._norm, config.eps, x)

    def _attend(
        self, layer: _Folded, batch: Packed, x: Tensor, carve: Carve, is_long: bool, before: Tensor, middle: Tensor
    ) -> None:
        from serving.kernels.gemm_hopper import RowNorm, linear  # noqa: PLC0415  Gluon loads only where it can run

        config, tokens, query = self._config, len(x), layer.query
        qkv = carve(0, tokens, 3 * config.hidden, _HALF)
        context = carve(tokens * 6 * config.hidden, tokens, config.hidden, _HALF)
        norm = RowNorm(before, query.sums, config.eps)
        linear(x, query.weight, query.bias, qkv, self._programs, norm=norm)
        attention(qkv, batch.starts, batch.ends, config.heads, context, is_long=is_long)
        norm = RowNorm(before, layer.scale, config.eps)
        linear(
            context, layer.out_weight, layer.out_bias, x, self._programs, residual=x, norm=norm, out_sums=middle
        )  # fmt: skip

    def _feed_forward(self, layer: _Folded, x: Tensor, inner: Tensor, middle: Tensor, after: Tensor) -> None:
        from serving.kernels.gemm_hopper import RowNorm, linear  # noqa: PLC0415  Gluon loads only where it can run

        norm = RowNorm(middle, layer.up.sums, self._config.eps)
        linear(x, layer.up.weight, layer.up.bias, inner, self._programs, gelu=True, norm=norm)
        norm = RowNorm(middle, layer.middle_scale, self._config.eps)
        linear(
            inner, layer.down_weight, layer.down_bias, x, self._programs, residual=x, norm=norm, out_sums=after
        )  # fmt: skip


def _fold(layer: Layer, out_weight: Tensor, down_weight: Tensor, scale: Tensor, shift: Tensor) -> _Folded:
    """The layer on states whose norm, with `scale` and `shift`, is still to come."""
    device, middle_scale, middle_shift = out_weight.device, layer.out_norm_weight, layer.out_norm_bias
    return _Folded(
        query=_Product.of(layer.qkv_weight, layer.qkv_bias, scale, shift, device),
        out_weight=out_weight,
        out_bias=(layer.out_bias + shift).to(device, _HALF),
        scale=scale.to(device, torch.float32),
        up=_Product.of(layer.up_weight, layer.up_bias, middle_scale, middle_shift, device),
        down_weight=down_weight,
        down_bias=(layer.down_bias + middle_shift).to(device, _HALF),
        middle_scale=middle_scale.to(device, torch.float32),
    )
