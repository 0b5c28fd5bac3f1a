"""CUDA C++ for what Triton cannot say: compiled by NVRTC for the GPU at hand, launched on torch's stream.

torch itself depends on both libraries that this takes, NVRTC and cuda-bindings.
"""

import ctypes
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

_FOLDER = Path(__file__).parent
_NO_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"
_Form = TypeVar("_Form")


class CompileFailed(Exception):
    """CUDA, its compiler or their absence; the message says what they said."""


class TensorMap(ctypes.Structure):
    """A matrix as the copy engine sees it, in boxes of a tile's size: `TensorMap` of cluster.cuh."""

    _fields_ = [("bytes", ctypes.c_char * 128)]

    @classmethod
    def of(cls, matrix: Tensor, rows: int, columns: int) -> "TensorMap":
        """Boxes of `rows` x `columns`, 64 or 128 bytes (a swizzle's span), of a contiguous float16 or E4M3 [M, N]."""
        from cuda.bindings import driver  # noqa: PLC0415  only a GPU's torch has it

        (height, width), size = matrix.shape, matrix.element_size()
        types, swizzles = driver.CUtensorMapDataType, driver.CUtensorMapSwizzle
        ones, box = [driver.cuuint32_t(1)] * 2, [driver.cuuint32_t(columns), driver.cuuint32_t(rows)]
        encoded = driver.cuTensorMapEncodeTiled(
            types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 if size == 2 else types.CU_TENSOR_MAP_DATA_TYPE_UINT8,
            2, matrix.data_ptr(), [driver.cuuint64_t(width), driver.cuuint64_t(height)],
            [driver.cuuint64_t(size * width)], box, ones,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzles.CU_TENSOR_MAP_SWIZZLE_128B if columns * size == 128 else swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )  # fmt: skip
        return cls.from_buffer_copy(ctypes.string_at(_check(encoded).getPtr(), ctypes.sizeof(cls)))


class CudaKernel:
    """The kernel `name` of `name`.cu, which takes one struct; in clusters of so many programs, or in none."""

    def __init__(
        self, name: str, macros: dict[str, int], device: torch.device, threads: int, shared: int, cluster: int = 1
    ):
        """Compile and load. Raises CompileFailed, also where the GPU cannot hold one such cluster; OutOfMemoryError."""
        self._threads, self._shared, self._cluster = threads, shared, cluster
        major, minor = torch.cuda.get_device_capability(device)
        with torch.cuda.device(device):  # a new thread has the first GPU
            torch.cuda.current_stream().synchronize()  # torch's context is current from here on
            try:
                from cuda.bindings import driver  # noqa: PLC0415  only a GPU's torch has it

                self._driver = driver
                self._load(name, compile_kernel(name, f"sm_{major}{minor}a", macros))
            except torch.OutOfMemoryError:
                raise
            except (ImportError, RuntimeError) as error:  # the latter: no such shared library
                raise CompileFailed(str(error)) from None
            if cluster > 1 and not self._count_clusters():
                raise CompileFailed(f"no {cluster} programs of {shared} bytes fit this GPU as one cluster")

    def launch(self, argument: ctypes.Structure, programs: int, is_early: bool = False) -> None:
        """Once, on torch's current stream; the struct is copied. `is_early`: see `handover`."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        config = self._configure(programs, is_early)
        config.hStream = self._driver.CUstream(torch.cuda.current_stream().cuda_stream)
        _check(self._driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(pointers), 0))

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
        """How many the GPU can hold at a time."""
        return int(_check(self._driver.cuOccupancyMaxActiveClusters(self._function, self._configure(self._cluster))))

    def _configure(self, programs: int, is_early: bool = False) -> Any:
        driver, identifiers = self._driver, self._driver.CUlaunchAttributeID
        config, attributes = driver.CUlaunchConfig(), []
        if self._cluster > 1:
            attributes.append(driver.CUlaunchAttribute())
            attributes[-1].id = identifiers.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            size = attributes[-1].value.clusterDim
            size.x, size.y, size.z = self._cluster, 1, 1
        if is_early:
            attributes.append(driver.CUlaunchAttribute())
            attributes[-1].id = identifiers.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attributes[-1].value.programmaticStreamSerializationAllowed = 1
        config.gridDimX, config.gridDimY, config.gridDimZ = programs, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self._threads, 1, 1
        config.sharedMemBytes, config.attrs, config.numAttrs = self._shared, attributes, len(attributes)
        return config


def load_beside(load: Callable[[_Form], object], forms: Collection[_Form]) -> None:
    """Load all forms of a kernel, each in a thread. Raises what `load` raises."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(load, forms))


def compile_kernel(name: str, architecture: str, macros: dict[str, int]) -> bytes:
    """Machine code of `name`.cu for an architecture (`sm_90a`); no GPU is needed. Raises CompileFailed."""
    from cuda.bindings import nvrtc  # noqa: PLC0415  only a GPU's torch has it

    source = (_FOLDER / f"{name}.cu").read_bytes()
    options = [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{key}={macros[key]}" for key in macros)]
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
    """The value of a call. Raises CompileFailed with the error's name, and OutOfMemoryError where it is that."""
    status, *values = answer
    if int(status) != 0:
        # Want of memory says nothing against a kernel: who needs less may have it.
        raise torch.OutOfMemoryError(status.name) if status.name == _NO_MEMORY else CompileFailed(status.name)
    return values[0] if values else None
