"""CUDA C++ without a GPU: a kernel compiled for this processor, every thread of it a fiber.

What the hardware does is emulated (`emulated/`): barriers that count, copies that land late and in any order, swizzled
boxes, the tensor cores' operands. So addresses are checked, and that nobody waits in vain. For a kernel that is ordered
clocks tell too (`emulated/order.h`) whether barriers, fences and waits keep every access of memory behind those that it
must follow, and every phase of a barrier behind all who wait for the one before: then they do in any schedule. What a
kernel reads and writes through pointers is not followed.
"""

import ctypes
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from serving.kernels.compiled import _FOLDER, TensorMap

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
_EMULATED = Path(__file__).parent / "emulated"
_OPTIONS = ["-std=c++20", "-O2", "-fPIC", "-shared", "-w", "-Wno-psabi"]
_MEMORY = re.compile(r"extern __shared__ __align__\(1024\) (\w+) (\w+)\[\];")


@dataclass(frozen=True, slots=True)
class Schedule:
    """In which order warps run and when copies land: `seed` % 3 is 0 for some, 1 for late and 2 for at once. Warps of
    `slow`, bits by their number in a program, pause in the programs of `slow_programs`."""

    seed: int = 0
    slow: int = 0
    slow_programs: int = 0xFFFFFFFF


class EmulatedKernel:
    """In the place of `CudaKernel`. `argument`: the type of the kernel's."""

    folder: Path
    argument = "Argument"
    is_ordered = False
    schedule = Schedule()

    def __init__(
        self, name: str, macros: dict[str, int], device: torch.device, threads: int, shared: int, cluster: int = 1
    ) -> None:
        library = self.folder / f"{name}-{'-'.join(map(str, macros.values()))}.so"
        if not library.exists():
            sizes = {"PROGRAMS": cluster, "PROGRAM_THREADS": threads, "SHARED": shared, "ORDERED": int(self.is_ordered)}
            self._compile(name, {**macros, **sizes, "KERNEL": name, "ARGUMENT": self.argument}, library)
        self._run = ctypes.CDLL(str(library)).run
        self._run.restype = ctypes.c_char_p

    def _compile(self, name: str, macros: dict[str, int | str], library: Path) -> None:
        sources = library.with_suffix("")
        sources.mkdir()
        for path in (*_FOLDER.glob("*.cuh"), *_EMULATED.iterdir()):  # the latter take the place of the former
            shutil.copy(path, sources)
        own = r"\1* \2 = (\1*)Thread::own().memory + FIRST;"
        kernel, count = _MEMORY.subn(own, (_FOLDER / f"{name}.cu").read_text())
        assert count == 1
        (sources / "kernel.cu").write_text(kernel)
        defined = [f"-D{key}={value}" for key, value in macros.items()]
        subprocess.run(["c++", *_OPTIONS, *defined, sources / "run.cpp", "-o", library], check=True)

    def launch(self, argument: ctypes.Structure, programs: int, is_early: bool = False) -> None:
        order = self.schedule
        failure = self._run(ctypes.byref(argument), programs, order.seed, order.slow, order.slow_programs)
        assert failure is None, failure


def emulate(module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile the kernel of `module` into `folder` and run it here, its order followed."""
    monkeypatch.setattr(EmulatedKernel, "folder", folder, raising=False)
    monkeypatch.setattr(EmulatedKernel, "is_ordered", True)
    monkeypatch.setattr(module, "CudaKernel", EmulatedKernel)
    monkeypatch.setattr(module, "_load", module._load.__wrapped__)
    monkeypatch.setattr(TensorMap, "of", describe)


def describe(matrix: Tensor, rows: int, columns: int) -> TensorMap:
    """In the place of `TensorMap.of`: `Box` of the emulation."""
    assert matrix.is_contiguous()
    numbers = matrix.data_ptr(), *matrix.shape, rows, columns, matrix.element_size()
    return TensorMap.from_buffer_copy(struct.pack("6q", *numbers).ljust(128))
