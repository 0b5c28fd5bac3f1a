"""Compile the kernels that any GPU runs for one that is not here.

`python -m tests.serving.kernels.compile_portable CAPABILITY [FORM ...]`, by default all here; E4M3 is left out where
the GPU lacks it. Writes what each form compiled to.
"""

import argparse
import sys
from functools import partial

import torch

from serving.kernels import add_norm, attention, embed_norm, few_tokens, gemm, pool
from serving.kernels.few_tokens import FewTokens, Stacked
from serving.kernels.gemm import MANY_ROWS
from tests.serving.kernels.launches import Gpu, Launches, e4m3, half, make, single, write_compiled

A100, L40S, THOR, RTX_5090 = (
    Gpu(80, 108, 166_912), Gpu(89, 142, 101_376), Gpu(110, 20, 232_448), Gpu(120, 170, 101_376),
)  # fmt: skip
GPUS = {gpu.capability: gpu for gpu in (A100, L40S, THOR, RTX_5090)}
LEAST_E4M3 = 89
MODULES = add_norm, attention, embed_norm, few_tokens, gemm, pool
ROWS, EPS = 256, 1e-12


def whole(length: int) -> torch.Tensor:
    return make(torch.int32, length)


def can_run(gpu: Gpu, form: str) -> bool:
    return gpu.capability >= LEAST_E4M3 or "E4M3" not in form


def list_launches() -> Launches:
    """Of MiniLM's sizes, and of BERT-base's where those take another form."""
    launches = {"few tokens": run_few_tokens}
    for size, hidden in ((32, 384), (64, 768)):
        qkv, bounds, vector = half(ROWS, 3 * hidden), (whole(ROWS), whole(ROWS)), half(hidden)
        attend = partial(attention.attention, qkv, *bounds, hidden // size)
        norm = partial(add_norm.add_norm, half(ROWS, hidden), None, vector, vector, vector, EPS, half(ROWS, hidden))
        embed = partial(
            embed_norm.embed_norm, *bounds, half(100, hidden), half(512, hidden), vector, vector, EPS,
            half(ROWS, hidden),
        )  # fmt: skip
        narrow = e4m3(ROWS, hidden), single(ROWS)
        launches |= {
            f"attention, heads of {size}": partial(attend, half(ROWS, hidden)),
            f"attention of long texts, heads of {size}": partial(attend, half(ROWS, hidden), is_long=True),
            f"steady attention, heads of {size}": partial(attend, half(ROWS, hidden), is_steady=True),
            f"steady attention to E4M3, heads of {size}": partial(
                attend, e4m3(ROWS, hidden), out_factor=single(1), is_steady=True
            ),
            f"norm, {hidden}": norm,
            f"norm in E4M3, {hidden}": partial(norm, *narrow),
            f"embeddings, {hidden}": embed,
            f"embeddings in E4M3, {hidden}": partial(embed, *narrow),
        }
        for pooling in ("mean", "cls", "lasttoken"):
            launches[f"{pooling} of {hidden}"] = partial(
                pool.pool, half(ROWS, hidden), whole(5), pooling, True, single(4, hidden), whole(4)
            )
    return launches | list_linears()


def list_linears() -> Launches:
    """What cuBLAS does not take."""
    launches: Launches = {}
    for rows, few in ((ROWS, "few"), (2 * MANY_ROWS, "many")):
        x, weight, bias, out = half(rows, 384), half(1536, 384), half(1536), half(rows, 1536)
        narrow = e4m3(rows, 384), e4m3(1536, 384), bias
        scales = {"x_scales": single(rows), "weight_scale": single(1)}
        launches |= {
            f"linear of {few} rows, GELU": partial(gemm.linear, x, weight, bias, out, gelu=True),
            f"linear of {few} rows, float16 to E4M3": partial(
                gemm.linear, x, weight, bias, e4m3(rows, 1536), gelu=True, out_factor=single(1)
            ),
            f"linear of {few} rows, E4M3 to float16": partial(gemm.linear, *narrow, out, **scales),
            f"linear of {few} rows, E4M3": partial(
                gemm.linear, *narrow, e4m3(rows, 1536), gelu=True, out_factor=single(1), **scales
            ),
        }
    return launches


def run_few_tokens() -> None:
    """Two layers of MiniLM; a run is one launch on a GPU."""
    hidden, inner, layers = 384, 1536, 2
    matrices = [
        each
        for columns, depth in ((3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner))
        for each in (half(layers, columns, depth), half(layers, columns))
    ]
    stacked = Stacked(half(100, hidden), half(512, hidden), half(1 + 2 * layers, 2, hidden), *matrices)
    encoder = FewTokens(stacked, 12, EPS, "mean", True)
    encoder.run(*(whole(few_tokens.MAX_TOKENS) for _ in range(3)), whole(3), single(2, hidden))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capability", type=int, choices=GPUS)
    parser.add_argument("forms", nargs="*")
    arguments = parser.parse_args()
    gpu = GPUS[arguments.capability]

    def list_chosen() -> Launches:
        launches = list_launches()
        return {form: launches[form] for form in arguments.forms or launches if can_run(gpu, form)}

    write_compiled(gpu, MODULES, list_chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
