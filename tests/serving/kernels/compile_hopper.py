"""Compile what is written in Gluon for capability 9.0 without a GPU: `python -m tests.serving.kernels.compile_hopper`.

Prints one JSON object: the bytes of machine code of each form of the GEMM. Run by itself, because the driver that
Triton sees here is not there.
"""

import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from serving.kernels import gemm_hopper
from serving.kernels.gemm_hopper import RowNorm, linear

ROWS = 2100


class Absent:
    """A driver of which Triton asks no more than what it compiles for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Warmed:
    """A kernel that is compiled instead of launched."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: self._kernel.warmup(*arguments, grid=grid, **options)


def half(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float16)


def compile_linear() -> dict[str, Any]:
    gemm_hopper._linear_kernel = Warmed(gemm_hopper._linear_kernel)
    x, inner, sums = half(ROWS, 384), half(ROWS, 1536), torch.empty(ROWS, 3, 2)
    weight, factors = half(1536, 384), torch.empty(1536)
    narrow, one = torch.empty(ROWS, 384, dtype=torch.float8_e4m3fn), torch.empty(1)
    matrix, inner8 = torch.empty(1536, 384, dtype=torch.float8_e4m3fn), inner.to(torch.float8_e4m3fn)
    return {
        "plain": linear(x, weight, half(1536), inner, 132),
        "norm of x": linear(x, weight, half(1536), inner, 132, True, norm=RowNorm(sums, factors, 1e-12)),
        "norm of the residual": linear(
            inner, half(384, 1536), half(384), x, 132, residual=x, norm=RowNorm(sums, factors, 1e-12), out_sums=sums
        ),
        "E4M3 to E4M3": linear(
            narrow, matrix, half(1536), inner8, 132, True, None, one, one, one, RowNorm(sums, factors, 1e-12)
        ),
        "copied in E4M3": linear(
            narrow,
            matrix[:384],
            half(384),
            x,
            132,
            residual=x,
            x_scales=one,
            weight_scale=one,
            out_factor=one,
            norm=RowNorm(sums, factors, 1e-12),
            out_sums=sums,
            copy=narrow,
        ),
        "float16 copied in E4M3": linear(
            x,
            weight[:384],
            half(384),
            x,
            132,
            residual=x,
            out_factor=one,
            norm=RowNorm(sums, factors, 1e-12),
            out_sums=sums,
            copy=narrow,
        ),
    }


def main() -> int:
    driver.set_active(Absent())  # type: ignore[no-untyped-call]
    sys.stdout.write(json.dumps({name: len(kernel.asm["cubin"]) for name, kernel in compile_linear().items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
