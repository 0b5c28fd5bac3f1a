"""Compile launches of kernels for a GPU that is not there.

In a process of its own, because that process takes the GPU for its own from then on: `compile_alone` runs a module that
calls `write_compiled`. Tensors say that they lie on the GPU and have no memory, so that whoever launches a kernel
decides as there.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

Launches = dict[str, Callable[[], object]]
_LEAST_CODE = 10_000  # bytes, with what an empty kernel's file holds


@dataclass(frozen=True, slots=True)
class Gpu:
    """What kernels ask of one: ten times its capability, its multiprocessors, bytes of memory that programs share."""

    capability: int
    processors: int
    shared_bytes: int

    def can_run(self, each: "Compiled") -> bool:
        """Whether there is machine code, and memory for it."""
        return each.code_bytes > _LEAST_CODE and each.shared_bytes <= self.shared_bytes


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel's bytes of machine code and of shared memory, and whether it starts while the one before it ends."""

    kernel: str
    code_bytes: int
    shared_bytes: int
    is_early: bool


class _Absent:
    """A driver of which Triton asks no more than what it compiles for."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)


class _Warmed:
    """A kernel that is compiled instead of launched, and noted."""

    def __init__(self, name: str, kernel: Any, compiled: list[Compiled]) -> None:
        self._name, self._kernel, self._compiled = name, kernel, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_it(*arguments: Any, **options: Any) -> None:
            done = self._kernel.warmup(*arguments, grid=grid, **options)
            is_early = bool(done.metadata.launch_pdl) or "griddepcontrol" in done.asm["ptx"]
            self._compiled.append(Compiled(self._name, len(done.asm["cubin"]), done.metadata.shared, is_early))

        return compile_it


def write_compiled(gpu: Gpu, modules: Iterable[ModuleType], list_launches: Callable[[], Launches]) -> None:
    """Compile what each launch asks of the modules' kernels, and write it for `compile_alone`."""
    driver.set_active(_Absent(gpu.capability))  # type: ignore[no-untyped-call]
    major, minor = divmod(gpu.capability, 10)
    properties = SimpleNamespace(
        major=major, minor=minor, multi_processor_count=gpu.processors, shared_memory_per_block_optin=gpu.shared_bytes
    )
    torch.cuda.get_device_properties = lambda device=None: properties
    compiled: list[Compiled] = []
    for module in modules:
        for name, kernel in list(vars(module).items()):
            if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
                setattr(module, name, _Warmed(name, kernel, compiled))
    found = {}
    with FakeTensorMode():
        for form, launch in list_launches().items():
            launch()
            found[form] = [asdict(each) for each in compiled]
            compiled.clear()
    sys.stdout.write(json.dumps(found))


def compile_alone(module: str, cache: Path, *arguments: str) -> dict[str, list[Compiled]]:
    """By form, what a module of this folder compiles, run by itself with an empty cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.serving.kernels.{module}", *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return {form: [Compiled(**each) for each in kernels] for form, kernels in json.loads(done.stdout).items()}


def make(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def half(*shape: int) -> Tensor:
    return make(torch.float16, *shape)


def e4m3(*shape: int) -> Tensor:
    return make(torch.float8_e4m3fn, *shape)


def single(*shape: int) -> Tensor:
    return make(torch.float32, *shape)
