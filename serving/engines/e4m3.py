"""E4M3 linear layers: calibration, scales, and the engine's arithmetic in plain PyTorch, exact on any processor."""

from collections.abc import Iterable
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
    name_linear,
)
from serving.kernels import reference

# Of a layer, in the order of LINEARS.
MATRICES = ("qkv_weight", "out_weight", "up_weight", "down_weight")
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


class ExactE4M3:
    """What the engine computes in E4M3, every product and sum in float32: no kernel's own rounding, no GPU's.

    Folded layers round the states of `BY_ROW` before their norm instead of behind it, as finely: see `cuda_folded`.
    """

    def __init__(self, weights: Weights, config: BertConfig) -> None:
        """All linear layers but those of `config.float16` are rounded, and must have been calibrated."""
        self._config = config
        self._rounded = [
            [name_linear(layer, linear) not in config.float16 for linear in range(len(LINEARS))]
            for layer in range(config.layers)
        ]
        layers = zip(weights.layers, self._rounded, strict=True)
        self._weights = replace(weights, layers=tuple(_round_weights(layer, rounded) for layer, rounded in layers))

    def encode(self, batch: Packed) -> Tensor:
        """Float32 [B, H] of a packed batch."""
        return encode(self._weights, self._config, batch, self._round_input)

    def _round_input(self, layer: int, linear: int, x: Tensor) -> Tensor:
        if not self._rounded[layer][linear]:
            return x
        if linear in BY_ROW:
            values, scale = reference.quantize_rows(x)
        else:
            amax = self._weights.layers[layer].amax
            assert amax is not None, "calibrated"
            scale = choose_input_scale(amax[linear])
            values = reference.quantize_tensor(x, scale)
        return values.float() * scale


def _round_weights(layer: Layer, rounded: list[bool]) -> Layer:
    changed = {}
    for name, is_rounded in zip(MATRICES, rounded, strict=True):
        if is_rounded:
            values, scale = quantize_weight(getattr(layer, name))
            changed[name] = values.float() * scale
    return replace(layer, **changed)
