"""Kernels that start while the one before them ends: Hopper's programmatic dependent launch.

Such a kernel says at its beginning that the next may start, and waits for the one before it before it reads or writes
what a kernel has written. So where a processor has done its part, its next program is there already. None ends without
having waited, because the next waits for it alone. Runs of 4,096 tokens take a tenth less; those of 131,072 took up to
3 % more.
"""

from functools import cache

import torch
import triton
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_HAS_HANDOVER = (9, 0)
_MOST_ROWS = 8192


@triton.jit
def take_over():
    """Let the next kernel start, and wait for the one before."""
    gdc_launch_dependents()
    gdc_wait()


def starts_early(x: Tensor) -> bool:
    """Whether kernels on the rows of x gain by it, and its GPU has it; the interpreter has not."""
    return x.is_cuda and len(x) <= _MOST_ROWS and _read_capability(x.device) >= _HAS_HANDOVER


@cache
def _read_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
