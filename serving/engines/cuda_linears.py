"""Linear layers in the form their kernels take: float16, or E4M3 with its scales."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.engines.bert import Layer, name_linear
from serving.engines.e4m3 import MATRICES, choose_input_scale, quantize_weight


@dataclass(frozen=True, slots=True)
class Linear:
    """A weight [N, K]: float16, or E4M3 with float32 [1] scales: its own, and that of its input with the inverse."""

    weight: Tensor
    weight_scale: Tensor | None = None
    x_scale: Tensor | None = None
    x_factor: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What its input has to be."""
        return self.weight.dtype


def load_linears(number: int, layer: Layer, float16: Collection[str], device: torch.device) -> list[Linear]:
    """The linear layers of layer `number`, in the order of MATRICES; those named in `float16` stay so."""
    assert layer.amax is not None, "calibrated"
    linears = []
    for linear_number, matrix in enumerate(MATRICES):
        weight = getattr(layer, matrix)
        if name_linear(number, linear_number) in float16:
            linears.append(Linear(weight.to(device, torch.float16)))
        else:
            linears.append(quantize(weight, choose_input_scale(layer.amax[linear_number]), device))
    return linears


def quantize(weight: Tensor, x_scale: Tensor, device: torch.device) -> Linear:
    """An E4M3 layer whose input is to be divided by `x_scale` (float32 [1])."""
    values, weight_scale = quantize_weight(weight)
    return Linear(values.to(device), weight_scale.to(device), x_scale.to(device), (1.0 / x_scale).to(device))
