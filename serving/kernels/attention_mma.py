"""Attention in CUDA C++: see attention_mma.cu. `attention` chooses it, and is its twin where it cannot be compiled."""

import ctypes
import logging
from functools import cache

import torch
from torch import Tensor

from serving.kernels.compiled import CompileFailed, CudaKernel

_ROWS, _KEYS, _STAGES, _THREADS = 128, 64, 3, 128
_log = logging.getLogger(__name__)


class _Input(ctypes.Structure):
    """`Input` of the kernel."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qkv", "starts", "ends", "out", "factor")),
        ("num_tokens", ctypes.c_int),
        ("hidden", ctypes.c_int),
        ("scale", ctypes.c_float),
    ]


def attend(
    qkv: Tensor, starts: Tensor, ends: Tensor, size: int, scale: float, out: Tensor, out_factor: Tensor | None,
    is_steady: bool,
) -> bool:  # fmt: skip
    """See `attention.attention`, with heads of `size` and scores times `scale` to the base 2.

    Returns whether there is a kernel; where not, nothing was done.
    """
    kernel = _load(qkv.device, size, is_steady, out_factor is not None)
    if kernel is None:
        return False
    num_tokens, hidden = out.shape
    factor = 0 if out_factor is None else out_factor.data_ptr()
    argument = _Input(
        qkv.data_ptr(), starts.data_ptr(), ends.data_ptr(), out.data_ptr(), factor, num_tokens, hidden, scale
    )
    kernel.launch(argument, (hidden // size, -(-num_tokens // _ROWS)))
    return True


def make_macros(size: int, is_steady: bool, is_narrow: bool) -> dict[str, int]:
    """What the kernel is compiled with."""
    return {"D": size, "STEADY": int(is_steady), "NARROW": int(is_narrow)}


@cache
def _load(device: torch.device, size: int, is_steady: bool, is_narrow: bool) -> CudaKernel | None:
    macros = make_macros(size, is_steady, is_narrow)
    shared = 2 * size * (_ROWS + 2 * _KEYS * _STAGES)  # bytes: the queries, and a ring of keys and values
    try:
        return CudaKernel("attention_mma", macros, device, _THREADS, shared)
    except CompileFailed as error:
        _log.warning("attention runs on its Triton kernel reason=%s", error)
        return None
