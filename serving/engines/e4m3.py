"""E4M3 linear layers: calibration, scales, and the engine's arithmetic in plain PyTorch, exact on any processor."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from serving.engines.bert import (
    AMAX_NAME,
    LINEARS,
    STATES_NAME,
    BertConfig,
    Layer,
    Packed,
    Weights,
    encode,
)
from serving.kernels import reference

Norm = tuple[Tensor, Tensor]  # scale and shift [K]

# Of a layer, in the order of LINEARS.
MATRICES = ("qkv_weight", "out_weight", "up_weight", "down_weight")
BIASES = ("qkv_bias", "out_bias", "up_bias", "down_bias")
# Inputs with a scale for each row: a layer norm writes them, which sees whole rows. No one program sees those of the
# other two, context and intermediate, whose scale is calibrated.
BY_ROW = (0, 2)
_MARGIN = 2.0  # between the largest input calibration saw and the largest E4M3 can hold: its precision is the same
_SMALLEST_SCALE = 1e-12
_SMALLEST_INPUT_SCALE = 2.0**-15  # its inverse is still a float16, in which kernels quantise


def calibrate(weights: Weights, config: BertConfig, batches: Iterable[Packed]) -> dict[str, Tensor]:
    """Tensors of the engine's file: the largest input that each linear layer sees, and the largest state each norm."""
    amax, states = torch.zeros(config.layers, len(LINEARS)), torch.zeros(config.layers, 2)

    def keep(largest: Tensor, x: Tensor) -> None:
        largest.copy_(torch.maximum(largest, x.abs().amax().float()))

    def see(layer: int, linear: int, x: Tensor) -> Tensor:
        keep(amax[layer, linear], x)
        return x

    for batch in batches:
        encode(weights, config, batch, see, lambda layer, norm, state: keep(states[layer, norm], state))
    return {AMAX_NAME: amax, STATES_NAME: states}


def choose_input_scale(amax: Tensor) -> Tensor:
    """Float32 [1] by which what calibration saw up to `amax` is divided."""
    return (amax * _MARGIN / reference.E4M3_MAX).clamp(min=_SMALLEST_INPUT_SCALE).reshape(1)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 values [N, K] and the float32 [1] scale they are to be multiplied by."""
    scale = (weight.float().abs().amax() / reference.E4M3_MAX).clamp(min=_SMALLEST_SCALE).reshape(1)
    return reference.quantize_tensor(weight, scale), scale


def find_norms(layers: Sequence[Layer]) -> list[list[Norm | None]]:
    """Of each layer, by LINEARS, scale and shift of the layer norm that the E4M3 form of a linear layer holds.

    None for the first query: the embeddings' norm is not left to who reads them.
    """
    before: Norm | None = None
    norms: list[list[Norm | None]] = []
    for layer in layers:
        norms.append([before, None, (layer.out_norm_weight, layer.out_norm_bias), None])
        before = layer.down_norm_weight, layer.down_norm_bias
    return norms


def fold_norm(weight: Tensor, bias: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """Weight [N, K] and bias [N] for rows that `norm` has brought to mean 0 and spread 1, but not scaled and shifted.

    The rows of the weight are centred: that takes away a mean that is still there. Without a norm both are as they are.
    """
    if norm is None:
        return weight, bias
    scale, shift = norm
    scaled = weight * scale
    return scaled - scaled.mean(1, keepdim=True), bias + weight @ shift


def undo_norm(x: Tensor, norm: Norm | None) -> Tensor:
    """Rows [T, K] before scale and shift of their norm; 0 where the scale is 0, which says nothing of them."""
    if norm is None:
        return x
    scale, shift = norm
    return torch.where(scale == 0, 0, (x - shift) / scale)


class ExactE4M3:
    """What the engine computes in E4M3, every product and sum in float32: no kernel's own rounding, no GPU's.

    On Hopper the states of `BY_ROW` are rounded before their norm, as finely, by a calibrated scale: see `cuda_folded`.
    """

    def __init__(self, weights: Weights, config: BertConfig) -> None:
        """All linear layers but those of `config.float16` are rounded, and must have been calibrated."""
        self._config = config
        self._rounded = config.rounded
        self._norms = find_norms(weights.layers)
        layers = zip(weights.layers, self._norms, self._rounded, strict=True)
        self._weights = replace(weights, layers=tuple(_round_weights(*each) for each in layers))

    def encode(self, batch: Packed) -> Tensor:
        """Float32 [B, H] of a packed batch."""
        return encode(self._weights, self._config, batch, self._round_input)

    def _round_input(self, layer: int, linear: int, x: Tensor) -> Tensor:
        if not self._rounded[layer][linear]:
            return x
        if linear in BY_ROW:
            values, scale = reference.quantize_rows(undo_norm(x, self._norms[layer][linear]))
        else:
            amax = self._weights.layers[layer].amax
            assert amax is not None, "calibrated"
            scale = choose_input_scale(amax[linear])
            values = reference.quantize_tensor(x, scale)
        return values.float() * scale


def _round_weights(layer: Layer, norms: list[Norm | None], rounded: list[bool]) -> Layer:
    changed = {}
    for name, bias_name, norm, is_rounded in zip(MATRICES, BIASES, norms, rounded, strict=True):
        if is_rounded:
            weight, changed[bias_name] = fold_norm(getattr(layer, name), getattr(layer, bias_name), norm)
            values, scale = quantize_weight(weight)
            changed[name] = values.float() * scale
    return replace(layer, **changed)
