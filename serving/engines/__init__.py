"""Engines behind one protocol: token ids in, sentence embeddings out."""

import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from serving.cgroup import cpu_quota
from serving.errors import EngineUnavailable
from serving.telemetry import disable_telemetry
from serving.tokenizer import Ids

if TYPE_CHECKING:  # engines run where a bundle's manifest cannot be read: on a machine that only measures
    from registry.manifest import EngineEntry

Embeddings = NDArray[np.float32]

GPU_RUNTIMES = ("cuda", "tensorrt")
RUNS_OF_CUDA = 2  # batches that the cuda engine takes at a time on one GPU, of which it computes one

# What shows an NVIDIA driver: that of a server, of a Jetson, and the one that Windows lends to its Linux (WSL 2).
_DRIVER_PATHS = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/nvgpu", "/usr/lib/wsl/lib/libcuda.so.1")

_log = logging.getLogger(__name__)


class Engine(Protocol):
    """A loaded model. As many threads may run batches at the same time as it was opened for, one unless said."""

    @property
    def runtime(self) -> str:
        """The vendor runtime and its version, such as `onnxruntime 1.31.1`."""
        ...

    @property
    def compiles_shapes(self) -> bool:
        """Whether the first run of each shape is slow, so that callers keep to few shapes (`ShapeGrid`)."""
        ...

    @property
    def is_packed(self) -> bool:
        """Whether a run computes the texts' own tokens alone, so that those of unlike lengths may share one."""
        ...

    def embed(self, input_ids: Ids, attention_mask: Ids) -> Embeddings:
        """Pooled, normalised sentence embeddings, float32 [B, D], of int64 [B, T] ids and mask."""
        ...

    def close(self) -> None:
        """Free the engine's memory; it cannot be used afterwards."""
        ...


def close_engine(engine: Engine) -> None:
    """Close an engine that failed: one whose GPU is lost raises there, too, which is logged."""
    try:
        engine.close()
    except Exception as error:  # vendors' errors share no base class
        _log.warning("engine does not close engine=%s error=%s", engine.runtime, type(error).__name__)


def memory_of(*engines: Engine) -> int | None:
    """Bytes of GPU memory that they took together when they were opened; None where no engine says."""
    told = [getattr(engine, "memory_bytes", None) for engine in engines]
    known = [size for size in told if size is not None]
    return sum(known) if known else None


def num_cores() -> int:
    """Cores this process may keep busy: fewer than the machine has where `taskset` or a container's limit says so.

    A limit of two and a half cores' time counts as three.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return math.ceil(min(cores, cpu_quota()))


def has_nvidia_driver() -> bool:
    """Whether the kernel has a driver of an NVIDIA GPU; looks at files alone."""
    return any(Path(path).exists() for path in _DRIVER_PATHS)


def open_engine(
    folder: Path,
    entry: "EngineEntry",
    num_threads: int = 0,
    num_instances: int = 1,
    cache: Path | None = None,
    max_tokens: int = 131_072,
    on_gpu: bool = False,
    is_exact: bool = False,
    on_rebuild: Callable[[], object] = lambda: None,
    devices: Sequence[int] = (),
) -> Engine:
    """Load the engine `entry` of a bundle folder: `num_instances` runs at a time, each on `num_threads` (0: all cores).

    With a folder `cache` an engine that was compiled before need not be compiled for another number of threads.
    `max_tokens` is the largest run of the cuda engine, which is opened on each of `devices` (none: on the current one).
    `on_gpu` puts onnxruntime on an NVIDIA GPU; `is_exact` asks it or OpenVINO for the arithmetic of the graph as
    written, slow but the same on every processor. `on_rebuild` hears of a TensorRT plan that was there and had to be
    built again.
    Raises EngineUnavailable when the runtime is not installed, not known here or refuses the file.
    """
    disable_telemetry()
    if entry.runtime == "onnxruntime":
        from serving.engines.onnxruntime import OnnxRuntimeEngine  # noqa: PLC0415  a runtime loads only when chosen

        return OnnxRuntimeEngine(folder / entry.file, num_threads, is_exact, entry.compute, on_gpu)
    if entry.runtime == "openvino":
        from serving.engines.openvino import OpenVinoEngine  # noqa: PLC0415  a runtime loads only when chosen

        return OpenVinoEngine(folder / entry.file, entry.compute, num_threads, num_instances, cache, is_exact)
    if entry.runtime == "avx512":
        from serving.engines.avx512 import Avx512Engine  # noqa: PLC0415  a runtime loads only when chosen

        return Avx512Engine(folder / entry.file, num_threads, num_instances)
    return _open_gpu_engine(folder / entry.file, entry, max_tokens, on_rebuild, devices)


def _open_gpu_engine(
    path: Path, entry: "EngineEntry", max_tokens: int, on_rebuild: Callable[[], object], devices: Sequence[int]
) -> Engine:
    if entry.runtime == "cuda":
        from serving.engines.cuda import CudaEngine  # noqa: PLC0415  a runtime loads only when chosen

        if not devices:
            return CudaEngine(path, entry.compute, max_tokens)
        from serving.engines.replicas import open_on_devices  # noqa: PLC0415  it imports this module

        return open_on_devices(lambda: CudaEngine(path, entry.compute, max_tokens), devices)
    if entry.runtime == "tensorrt":
        from serving.engines.tensorrt import TensorRtEngine  # noqa: PLC0415  a runtime loads only when chosen

        return TensorRtEngine(path, on_rebuild=on_rebuild)
    raise EngineUnavailable(
        f"this worker has no engine {entry.runtime!r}: it has avx512, onnxruntime, openvino, tensorrt and cuda"
    )
