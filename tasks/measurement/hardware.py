"""What this node is: named in every speed report, and part of the key under which speeds are cached."""

import os
import platform
from pathlib import Path

from serving.engines import num_cores

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


def describe_hardware() -> str:
    """One line: processor, cores, memory, instruction sets, system."""
    flags = " ".join(cpu_flags()) or "no vector extensions known here"
    return (
        f"{cpu_model()}, {num_cores()} cores, {memory_gib():.0f} GiB, {flags}, {platform.system()} {platform.machine()}"
    )


def _cpuinfo(key: str) -> str | None:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return None
    lines = (line.partition(":") for line in path.read_text(encoding="utf-8").splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == key), None)
