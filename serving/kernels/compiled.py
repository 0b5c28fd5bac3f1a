"""CUDA C++ for what Triton cannot say: compiled by NVRTC for the GPU at hand, launched on torch's stream.

torch itself depends on both libraries that this takes, NVRTC and cuda-bindings.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent


class CompileFailed(Exception):
    """CUDA, its compiler or their absence; the message says what they said."""


class CudaKernel:
    """The kernel `name` of `name`.cu, which takes one struct; a cluster of `programs` is its whole grid."""

    def __init__(
        self, name: str, macros: dict[str, int], device: torch.device, programs: int, threads: int, shared: int
    ):
        """Compile and load. Raises CompileFailed, also where the GPU cannot hold one such cluster."""
        self._programs, self._threads, self._shared = programs, threads, shared
        torch.cuda.current_stream(device).synchronize()  # torch's context is current from here on
        major, minor = torch.cuda.get_device_capability(device)
        definitions = [f"-D{key}={value}" for key, value in macros.items()]
        options = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17", *definitions]
        try:
            from cuda.bindings import driver  # noqa: PLC0415  only a GPU's torch has it

            self._driver = driver
            self._load(name, _compile((_FOLDER / f"{name}.cu").read_bytes(), name, options))
        except (ImportError, RuntimeError) as error:  # the latter: no such shared library
            raise CompileFailed(str(error)) from None
        if self._count_clusters() < 1:
            raise CompileFailed(f"no {programs} programs of {shared} bytes fit this GPU as one cluster")

    def launch(self, argument: ctypes.Structure) -> None:
        """Once, on torch's current stream; the struct is copied."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        stream, where = torch.cuda.current_stream().cuda_stream, ctypes.addressof(pointers)
        grid, block = (self._programs, 1, 1), (self._threads, 1, 1)
        _check(self._driver.cuLaunchKernel(self._function, *grid, *block, self._shared, stream, where, 0))

    def _load(self, name: str, image: bytes) -> None:
        driver, attributes = self._driver, self._driver.CUfunction_attribute
        self._module = _check(driver.cuModuleLoadData(image))
        self._function = _check(driver.cuModuleGetFunction(self._module, name.encode()))
        for attribute, value in (
            (attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, self._shared),
            (attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1),
        ):
            _check(driver.cuFuncSetAttribute(self._function, attribute, value))

    def _count_clusters(self) -> int:
        """How many clusters the GPU can hold at a time."""
        driver = self._driver
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size = attribute.value.clusterDim
        size.x, size.y, size.z = self._programs, 1, 1
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = self._programs, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self._threads, 1, 1
        config.sharedMemBytes, config.attrs, config.numAttrs = self._shared, [attribute], 1
        return int(_check(driver.cuOccupancyMaxActiveClusters(self._function, config)))


def _compile(source: bytes, name: str, options: list[str]) -> bytes:
    from cuda.bindings import nvrtc  # noqa: PLC0415  only a GPU's torch has it

    headers = sorted(_FOLDER.glob("*.cuh"))
    texts, names = [path.read_bytes() for path in headers], [path.name.encode() for path in headers]
    program = _check(nvrtc.nvrtcCreateProgram(source, f"{name}.cu".encode(), len(headers), texts, names))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
            _check(nvrtc.nvrtcGetProgramLog(program, log))
            raise CompileFailed(log.decode(errors="replace").strip("\0 \n"))
        image = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
        _check(nvrtc.nvrtcGetCUBIN(program, image))
        return image
    finally:
        _check(nvrtc.nvrtcDestroyProgram(program))


def _check(answer: tuple[Any, ...]) -> Any:
    """The value of a call. Raises CompileFailed with the error's name."""
    status, *values = answer
    if int(status) != 0:
        raise CompileFailed(str(status))
    return values[0] if values else None
