"""The cuda engine and the GPU's memory: runs as large as it holds, and what is an error for want of it."""

import logging
import threading
from collections.abc import Callable

from serving.errors import EngineUnavailable

# How torch, Triton and cuBLAS say it: only torch's own allocator has a class for that.
_SAYINGS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

# Held while a graph is captured. CUDA breaks the capture of a GPU for which another thread waits as a whole, and torch
# empties its cache in no other thread meanwhile.
CAPTURING = threading.Lock()

_log = logging.getLogger(__name__)


def empty_cache() -> None:
    """Give the GPU back what torch keeps of it unused."""
    import torch  # noqa: PLC0415  loaded with the engine

    with CAPTURING:
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether less might have fitted."""
    import torch  # noqa: PLC0415  loaded with the engine

    return isinstance(error, torch.OutOfMemoryError) or any(saying in str(error) for saying in _SAYINGS)


def fit_runs(allocate: Callable[[int], object], free: Callable[[], object], asked: int, least: int) -> None:
    """`allocate` runs of `asked` tokens, of half as many where the memory does not hold them, and so on to `least`.

    `free` lets go of what a failed `allocate` holds, before the next. Fewer than asked are logged, once. Raises
    EngineUnavailable, and what `allocate` raises for other reasons.
    """
    if asked < least:
        raise EngineUnavailable(
            f"runs of {asked} tokens do not hold a text of {least}: "
            f"set embedding.custom_kernels.max_tokens to {least} or more"
        )
    tokens = asked
    while not _is_allocated(allocate, tokens):
        free()
        if tokens == least:
            raise EngineUnavailable(
                f"the GPU has no memory for the weights and {least} tokens, one text's: free some of it, or take "
                "another GPU"
            )
        tokens = max(tokens // 2, least)
    if tokens < asked:
        _log.warning("engine out of memory: runs are smaller than asked max_tokens=%d asked=%d", tokens, asked)


def _is_allocated(allocate: Callable[[int], object], tokens: int) -> bool:
    """In a function of its own: an error that is still at hand would keep what the failed try holds."""
    try:
        allocate(tokens)
    except RuntimeError as error:
        # Ending the capture of a graph that failed may raise, too.
        if not (is_out_of_memory(error) or is_out_of_memory(error.__context__)):
            raise
        return False
    return True
