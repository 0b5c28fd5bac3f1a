"""How busy this machine's NVIDIA GPUs are, asked of their driver's management library (NVML) at each scrape."""

import ctypes
import logging
import math
from collections.abc import Sequence
from typing import Protocol

_LIBRARY = "libnvidia-ml.so.1"

_log = logging.getLogger(__name__)


class Gpu(Protocol):
    """One GPU. What it does not tell is NaN: a Jetson's memory is the machine's own."""

    @property
    def index(self) -> int:
        """Its number among those that the driver shows this process."""
        ...

    def duty_percent(self) -> float:
        """Part of the last sampling period, up to a second, in which a kernel ran."""
        ...

    def memory_bytes(self) -> float:
        """Memory in use, by this process and by others."""
        ...


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class NvmlGpu:
    """See `Gpu`."""

    def __init__(self, nvml: ctypes.CDLL, index: int) -> None:
        """Raises OSError for a GPU that cannot be asked."""
        self._nvml, self.index = nvml, index
        self._handle = ctypes.c_void_p()
        _check(nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(self._handle)))

    def duty_percent(self) -> float:
        """See `Gpu.duty_percent`."""
        answer = _Utilization()
        failed = self._nvml.nvmlDeviceGetUtilizationRates(self._handle, ctypes.byref(answer))
        return math.nan if failed else float(answer.gpu)

    def memory_bytes(self) -> float:
        """See `Gpu.memory_bytes`."""
        answer = _Memory()
        failed = self._nvml.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(answer))
        return math.nan if failed else float(answer.used)


def find_gpus(library: str = _LIBRARY) -> Sequence[Gpu]:
    """The GPUs the driver shows; none where there is no driver, or one that cannot be asked, which is logged."""
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        return ()
    try:
        _check(nvml.nvmlInit_v2())
        count = ctypes.c_uint()
        _check(nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)))
        return [NvmlGpu(nvml, index) for index in range(count.value)]
    except (OSError, AttributeError) as error:  # a library without the function
        _log.warning("gpus are not measured reason=%s", error)
        return ()


def _check(status: int) -> None:
    if status:
        raise OSError(f"NVML answers {status}")
