"""What this node is: named in every speed report, and part of the key under which speeds are cached."""

import os
import platform
import subprocess
from collections import Counter
from pathlib import Path

from serving.engines import has_nvidia_driver, num_cores

_DRIVER_SECONDS = 30.0
# Those that add up products of int8 in 32 bits: without one of them kernels do it in 16, slower, and saturate.
INT8_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})
# Instruction sets that decide how fast int8 and bf16 run.
_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
)


def cpu_model() -> str:
    """The processor's own name, or its architecture where the system does not tell."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> tuple[str, ...]:
    """The instruction sets this processor has, of those that matter here."""
    present = set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())
    return tuple(flag for flag in _FLAGS if flag in present)


def memory_gib() -> float:
    """Memory of the node in GiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def list_gpus() -> tuple[str, ...]:
    """NVIDIA GPUs of each kind, with the driver's version; none without a driver, or where it does not answer."""
    if not has_nvidia_driver():
        return ()
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=_DRIVER_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return ()
    kinds = Counter(line.strip() for line in done.stdout.splitlines() if line.strip())
    return tuple(kind if count == 1 else f"{count} x {kind}" for kind, count in kinds.items())


def describe_hardware() -> str:
    """One line: processor, cores, memory, instruction sets, system, GPUs."""
    flags = " ".join(cpu_flags()) or "no vector extensions known here"
    system = f"{platform.system()} {platform.machine()}"
    parts = (cpu_model(), f"{num_cores()} cores", f"{memory_gib():.0f} GiB", flags, system, *list_gpus())
    return ", ".join(parts)


def _cpuinfo(key: str) -> str | None:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return None
    lines = (line.partition(":") for line in path.read_text(encoding="utf-8").splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == key), None)
