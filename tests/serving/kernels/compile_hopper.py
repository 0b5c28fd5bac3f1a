"""Compile what is written in Gluon for capability 9.0 without a GPU: `python -m tests.serving.kernels.compile_hopper`.

Writes what each form of the GEMM compiled to.
"""

import sys
from functools import partial

from serving.kernels import gemm_hopper
from serving.kernels.gemm_hopper import RowNorm
from tests.serving.kernels.launches import Gpu, Launches, e4m3, half, single, write_compiled

H200 = Gpu(90, 132, 232_448)
ROWS = 2100


def list_launches() -> Launches:
    linear = partial(gemm_hopper.linear, num_programs=H200.processors)
    x, inner, sums = half(ROWS, 384), half(ROWS, 1536), single(ROWS, 3, 2)
    weight, bias, one, norm = half(1536, 384), half(1536), single(1), RowNorm(sums, single(1536), 1e-12)
    narrow, matrix = e4m3(ROWS, 384), e4m3(1536, 384)
    scales = {"x_scales": one, "weight_scale": one, "out_factor": one}
    added = {"residual": x, "norm": norm, "out_sums": sums}
    return {
        "plain": partial(linear, x, weight, bias, inner),
        "norm of x": partial(linear, x, weight, bias, inner, gelu=True, norm=norm),
        "norm of the residual": partial(linear, inner, half(384, 1536), half(384), x, **added),
        "E4M3 to E4M3": partial(linear, narrow, matrix, bias, e4m3(ROWS, 1536), gelu=True, norm=norm, **scales),
        "copied in E4M3": partial(linear, narrow, e4m3(384, 384), half(384), x, copy=narrow, **scales, **added),
        "float16 copied in E4M3": partial(
            linear, x, half(384, 384), half(384), x, out_factor=one, copy=narrow, **added
        ),
    }  # fmt: skip


def main() -> int:
    write_compiled(H200, [gemm_hopper], list_launches)
    return 0


if __name__ == "__main__":
    sys.exit(main())
