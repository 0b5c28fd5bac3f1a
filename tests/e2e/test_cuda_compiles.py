"""Kernels in CUDA C++ compile for their GPUs on any machine: Hopper, and Jetson Thor where nothing is only Hopper's."""

import ctypes
from pathlib import Path

import pytest

from serving.kernels import compiled, few_tokens_cluster, gemm_wide
from serving.kernels.gemm_wide import Form
from tests.e2e.prepare import COMPILER_FOLDER

pytestmark = pytest.mark.e2e
SOURCES = Path(compiled.__file__).parent
HOPPER, THOR = "sm_90a", "sm_110a"
GEMM_FORMS = [
    Form(adds, gelu, takes, gives)
    for adds, gelu in ((False, False), (False, True), (True, False))
    for takes in (False, True)
    for gives in (False, True)
    if adds or gelu or not gives  # queries, keys and values are never in E4M3
]


class Compiler:
    """NVIDIA's runtime compiler, by its C interface."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(next(COMPILER_FOLDER.glob("**/libnvrtc.so.*"))))

    def compile(self, name: str, architecture: str, macros: dict[str, int]) -> int:
        """The bytes of machine code of `name`.cu; fails with the compiler's words."""
        library, program, size = self._library, ctypes.c_void_p(), ctypes.c_size_t()
        headers = sorted(SOURCES.glob("*.cuh"))
        texts = (ctypes.c_char_p * len(headers))(*[path.read_bytes() for path in headers])
        names = (ctypes.c_char_p * len(headers))(*[path.name.encode() for path in headers])
        source = (SOURCES / f"{name}.cu").read_bytes()
        arguments = (source, f"{name}.cu".encode(), len(headers), texts, names)
        assert library.nvrtcCreateProgram(ctypes.byref(program), *arguments) == 0
        options = [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{k}={v}" for k, v in macros.items())]
        encoded = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        status = library.nvrtcCompileProgram(program, len(options), encoded)
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        assert status == 0, log.value.decode()
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        library.nvrtcDestroyProgram(ctypes.byref(program))
        return size.value


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    return Compiler()


@pytest.mark.parametrize("form", GEMM_FORMS)
def test_the_wide_gemm_compiles(form: Form, compiler: Compiler) -> None:
    assert compiler.compile("gemm_wide", HOPPER, gemm_wide.make_macros(form)) > 10_000


@pytest.mark.parametrize("architecture", [HOPPER, THOR])
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("rows", [16, 32])
def test_few_tokens_as_a_cluster_compiles(rows: int, pooling: str, architecture: str, compiler: Compiler) -> None:
    macros = few_tokens_cluster.make_macros(rows, pooling, normalize=True)
    assert compiler.compile("few_tokens_cluster", architecture, macros) > 10_000


def test_what_does_not_compile_says_why(compiler: Compiler) -> None:
    with pytest.raises(AssertionError, match="GELU"):
        compiler.compile("gemm_wide", HOPPER, {"RESIDUAL": 0})
