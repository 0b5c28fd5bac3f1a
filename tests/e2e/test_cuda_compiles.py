"""Kernels compile for their GPUs on any machine: those in CUDA C++ for Hopper, and for Jetson Thor where nothing is
only Hopper's; those that any GPU runs for others.
"""

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.kernels import attention_hopper, feed_forward, few_tokens_cluster, gemm_wide
from serving.kernels.compiled import CompileFailed, compile_kernel
from serving.kernels.gemm_wide import Form
from tests.e2e.prepare import COMPILER_FOLDER
from tests.serving.kernels.compile_portable import MODULES, THOR
from tests.serving.kernels.launches import compile_alone

pytestmark = pytest.mark.e2e
HOPPER, JETSON = "sm_90a", "sm_110a"
GEMM_FORMS = [
    Form(adds, gelu, takes, gives, is_deep)
    for adds, gelu in ((False, False), (False, True), (True, False))
    for takes in (False, True)
    for gives in (False, True)
    for is_deep in ((False, True) if adds and gives else (False,))
    if adds or gelu or not gives  # queries, keys and values are never in E4M3
]


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> Iterator[None]:
    """What a GPU's torch has, to be found by the test alone."""
    ctypes.CDLL(str(next(COMPILER_FOLDER.glob("**/libnvrtc.so.*"))))  # the bindings take a library that is there
    sys.path.append(str(COMPILER_FOLDER))
    yield
    sys.path.remove(str(COMPILER_FOLDER))


@pytest.mark.parametrize("form", GEMM_FORMS)
def test_the_wide_gemm_compiles(form: Form) -> None:
    assert len(compile_kernel("gemm_wide", HOPPER, gemm_wide.make_macros(form))) > 10_000


@pytest.mark.parametrize("is_narrow", [False, True])
@pytest.mark.parametrize("size", attention_hopper.HEAD_SIZES)
def test_attention_compiles(size: int, is_narrow: bool) -> None:
    macros = attention_hopper.make_macros(size, is_narrow)
    assert len(compile_kernel("attention_hopper", HOPPER, macros)) > 10_000


@pytest.mark.parametrize("copies", [False, True])
def test_the_feed_forward_block_compiles(copies: bool) -> None:
    assert len(compile_kernel("feed_forward", HOPPER, feed_forward.make_macros(copies))) > 10_000


@pytest.mark.parametrize("architecture", [HOPPER, JETSON])
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("rows", [16, 32])
def test_few_tokens_as_a_cluster_compiles(rows: int, pooling: str, architecture: str) -> None:
    macros = few_tokens_cluster.make_macros(rows, pooling, normalize=True)
    assert len(compile_kernel("few_tokens_cluster", architecture, macros)) > 10_000


def test_what_does_not_compile_says_why() -> None:
    with pytest.raises(CompileFailed, match="GELU"):
        compile_kernel("gemm_wide", HOPPER, {"RESIDUAL": 0, "DEEP": 0})


def test_all_that_any_gpu_runs_compiles_for_thor(tmp_path: Path) -> None:
    """For others, and some forms alone: `make test`."""
    compiled = compile_alone("compile_portable", tmp_path, str(THOR.capability))
    assert len({each.kernel for kernels in compiled.values() for each in kernels}) == len(MODULES)
    for form, kernels in compiled.items():
        assert len(kernels) == 1, (form, kernels)
        assert THOR.can_run(kernels[0]), (form, kernels)
        assert not kernels[0].is_early, form
