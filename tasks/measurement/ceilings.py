"""What a device can do, measured: the rate of a copy and that of a matrix product, in each compute that a run takes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.measurement.work import Compute, Work

if TYPE_CHECKING:
    import torch

_WARM_UP, _RUNS = 3, 5
_GPU_SIZE, _CPU_SIZE = 8192, 1024  # of the square matrices whose product is the ceiling


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Bytes and floating-point operations a second, the latter in float16 on a GPU and in float32 on the CPU;
    `narrow_flops_per_second`: with E4M3 operands, None where that was not measured."""

    bytes_per_second: float
    flops_per_second: float
    narrow_flops_per_second: float | None = None

    def least_seconds(self, work: Work) -> float | None:
        """What the operations take at the ceilings; None where theirs was not measured."""
        seconds = (work.flops - work.narrow_flops) / self.flops_per_second
        if not work.narrow_flops:
            return seconds
        if self.narrow_flops_per_second is None:
            return None
        return seconds + work.narrow_flops / self.narrow_flops_per_second


def measure_ceilings(compute: Compute, size: int | None = None) -> Ceilings:
    """A copy, counting what is read and written, and a product of random matrices; the best of several each.

    In float32 on the CPU, else on the GPU; `size` of the matrices, by default what fills the device.
    """
    import torch  # noqa: PLC0415  seconds that no other command pays

    on_gpu = compute != "f32"
    size = size or (_GPU_SIZE if on_gpu else _CPU_SIZE)
    device = torch.device("cuda" if on_gpu else "cpu")
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    copy_seconds = _copy_seconds(16 * size**2, device)
    halves = [each.half() if on_gpu else each for each in (left, right)]
    out = torch.empty_like(halves[0])
    product_seconds = _best_seconds(lambda: torch.mm(*halves, out=out), on_gpu)
    narrow = measure_narrow(left, right) if compute == "f8" else None
    return Ceilings(32 * size**2 / copy_seconds, 2 * size**3 / product_seconds, narrow)


def _copy_seconds(num_bytes: int, device: "torch.device") -> float:
    import torch  # noqa: PLC0415  see above

    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _best_seconds(lambda: target.copy_(source), source.is_cuda)


def measure_narrow(left: "torch.Tensor", right: "torch.Tensor") -> float | None:
    """Operations a second of the product of square matrices [N, N] in E4M3, one scale each; None where torch has none.

    With sums in the tensor cores' own precision, the fastest there is.
    """
    import torch  # noqa: PLC0415  see above

    if not hasattr(torch, "_scaled_mm"):  # no public name has it
        return None
    rows, columns = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()
    scale = torch.ones(1, device=left.device)

    def multiply() -> object:
        return torch._scaled_mm(rows, columns, scale, scale, out_dtype=torch.float16, use_fast_accum=True)

    try:
        seconds = _best_seconds(multiply, left.is_cuda)
    except RuntimeError:  # this build, or this GPU, has no such product
        return None
    return float(2 * len(left) ** 3 / seconds)


def _best_seconds(run: Callable[[], object], on_gpu: bool) -> float:
    import torch  # noqa: PLC0415  see above

    seconds = []
    for _ in range(_WARM_UP + _RUNS):
        started = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
