"""Kernels that start while the one before them ends: Hopper's programmatic dependent launch.

Such a kernel says at its beginning that the next may start, and waits for the one before it before it reads or writes
what a kernel has written. So where a processor has done its part, its next program is there already. None ends without
having waited, because the next waits for it alone. Runs of 4,096 tokens take a tenth less, those of 25,600 3 to 5 %;
those of 131,072 took up to 3 % more.
"""

import triton
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from serving.kernels.gemm import is_hopper

_MOST_ROWS = 32_768


@triton.jit
def take_over():
    """Let the next kernel start, and wait for the one before."""
    gdc_launch_dependents()
    gdc_wait()


def starts_early(x: Tensor) -> bool:
    """Whether kernels on the rows of x gain by it; later GPUs than Hopper have it too, and it was never run there."""
    return len(x) <= _MOST_ROWS and is_hopper(x.device)
