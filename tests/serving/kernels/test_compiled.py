"""Kernels in CUDA C++ as the host has them: on which GPU they are loaded, and what they are given."""

import ctypes
import re
import sys
import threading
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serving.engines.cuda_memory import is_out_of_memory
from serving.kernels import attention_hopper, compiled, feed_forward, few_tokens_cluster, gemm_wide
from serving.kernels.compiled import _FOLDER, CompileFailed, CudaKernel, TensorMap


class Gpus:
    """The current GPU of each thread, as CUDA has it: the first, until somebody asks for another."""

    def __init__(self) -> None:
        self._own = threading.local()

    @property
    def current(self) -> int:
        return int(getattr(self._own, "index", 0))

    def device(self, device: torch.device) -> "Gpus":
        self._own.index = device.index
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *problem: object) -> None:
        self._own.index = 0


def stand_in(monkeypatch: pytest.MonkeyPatch, driver: object) -> Gpus:
    """Hopper GPUs with that driver, on which kernels compile to nothing."""
    gpus = Gpus()
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver))
    monkeypatch.setattr(torch.cuda, "device", gpus.device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(compiled, "compile_kernel", lambda name, architecture, macros: b"")
    return gpus


@pytest.mark.parametrize(
    ("kernel", "arguments"),
    [
        (gemm_wide, ([gemm_wide.Form(adds, False, False, False) for adds in (False, True)],)),
        (attention_hopper, (64, [False, True])),
    ],
    ids=["wide GEMM", "attention"],
)
def test_forms_of_a_kernel_are_loaded_on_their_gpu(
    kernel: Any, arguments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are compiled in threads."""
    gpus, loaded = stand_in(monkeypatch, driver=None), []

    def load(own: CudaKernel, name: str, image: bytes) -> None:
        loaded.append((threading.current_thread() is threading.main_thread(), gpus.current))

    monkeypatch.setattr(CudaKernel, "_load", load)
    kernel.prepare(torch.device("cuda", 1), *arguments)
    kernel._load.cache_clear()
    assert loaded == [(False, 1)] * 2
    assert gpus.current == 0


class Status(IntEnum):
    """As the bindings have CUDA's errors."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_IMAGE = 200


@pytest.mark.parametrize(
    ("status", "kind"), [(Status.CUDA_ERROR_OUT_OF_MEMORY, torch.OutOfMemoryError), (Status(200), CompileFailed)]
)
def test_loading_a_kernel_tells_want_of_memory_from_what_is_wrong_with_it(
    status: Status, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, SimpleNamespace(cuModuleLoadData=lambda image: (status, None), CUfunction_attribute=None))
    with pytest.raises(kind, match=status.name) as raised:
        CudaKernel("gemm_wide", {}, torch.device("cuda", 0), threads=32, shared=0)
    assert is_out_of_memory(raised.value) == (kind is torch.OutOfMemoryError)


@pytest.mark.parametrize(
    ("argument", "name", "file"),
    [
        (gemm_wide._Argument, "Argument", "gemm_wide.cu"),
        (feed_forward._Argument, "Argument", "feed_forward_group.cuh"),
        (attention_hopper._Argument, "Argument", "attention_hopper.cu"),
        (few_tokens_cluster._Input, "Input", "few_tokens_layout.cuh"),
    ],
)
def test_a_kernels_argument_is_its_struct(argument: type[ctypes.Structure], name: str, file: str) -> None:
    """Every field where the kernel has it: the same names in the same order, of the same sizes."""
    (struct,) = re.findall(rf"struct {name} \{{(.*?)\n\}};", (_FOLDER / file).read_text(), re.DOTALL)
    sizes, fields = {"TensorMap": 128, "float": 4, "int": 4}, []
    for kind, names in re.findall(r"(?:const )?(\w+)\b([^;]*);", re.sub(r"//.*", "", struct)):
        fields.extend((name.strip(" *"), 8 if "*" in name else sizes[kind]) for name in names.split(","))
    own = [(field, ctypes.sizeof(kind)) for field, kind in argument._fields_]
    assert own[:-1] == fields
    assert ctypes.sizeof(argument) == -(-sum(size for _, size in fields) // 64) * 64
    assert ctypes.sizeof(TensorMap) == 128
