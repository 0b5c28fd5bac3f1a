"""Kernels that start while the one before them ends: Hopper's programmatic dependent launch.

Such a kernel says at its beginning that the next may start, and waits for the one before it before it reads or writes
what a kernel has written. So where a processor has done its part, its next program is there already.
"""

from functools import cache

import torch
import triton
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_HAS_HANDOVER = (9, 0)


@triton.jit
def take_over():
    """Let the next kernel start, and wait for the one before."""
    gdc_launch_dependents()
    gdc_wait()


def can_hand_over(x: Tensor) -> bool:
    """Whether the GPU that holds x has it; the interpreter has not."""
    return x.is_cuda and _capability(x.device) >= _HAS_HANDOVER


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
