"""Linear layers in the form their kernels take: float16, or E4M3 with its scales."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.engines.bert import Layer, name_linear
from serving.engines.e4m3 import (
    BIASES,
    BY_ROW,
    MATRICES,
    Norm,
    choose_input_scale,
    find_norms,
    fold_norm,
    quantize_weight,
)


@dataclass(frozen=True, slots=True)
class Linear:
    """A weight [N, K]: float16, or E4M3 with float32 [1] scales: its own, and that of its input with the inverse.

    Of E4M3 that reads what a norm writes, the norm is in the weight and in `bias` (float16 [N]): see `fold_norm`.
    """

    weight: Tensor
    weight_scale: Tensor | None = None
    x_scale: Tensor | None = None
    x_factor: Tensor | None = None
    bias: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What its input has to be."""
        return self.weight.dtype


def load_linears(layers: Sequence[Layer], float16: Collection[str], device: torch.device) -> list[list[Linear]]:
    """The linear layers of each layer, in the order of MATRICES; those named in `float16` stay so."""
    return [
        [
            _load_linear(layer, linear, norm, device, is_half=name_linear(number, linear) in float16)
            for linear, norm in enumerate(norms)
        ]
        for number, (layer, norms) in enumerate(zip(layers, find_norms(layers), strict=True))
    ]


def _load_linear(layer: Layer, number: int, norm: Norm | None, device: torch.device, is_half: bool) -> Linear:
    weight = getattr(layer, MATRICES[number])
    if is_half:
        return Linear(weight.to(device, torch.float16))
    assert layer.amax is not None, "calibrated"
    weight, bias = fold_norm(weight, getattr(layer, BIASES[number]), norm)
    values, scale = quantize_weight(weight)
    folded = bias.to(device, torch.float16) if number in BY_ROW else None
    x_scale, x_factor = (each.to(device) for each in scale_input(layer.amax[number]))
    return Linear(values.to(device), scale.to(device), x_scale, x_factor, folded)


def scale_input(amax: Tensor) -> tuple[Tensor, Tensor]:
    """What an input up to `amax` is divided by, and the inverse: float32 [1]."""
    scale = choose_input_scale(amax)
    return scale, 1.0 / scale
