"""Kernels compile for their GPUs on any machine: those in CUDA C++ for Hopper, and for Jetson Thor where nothing is
only Hopper's; those that any GPU runs for others.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
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


def list_wide_gemms() -> Iterator[Form]:
    for adds, gelu in ((False, False), (False, True), (True, False)):
        for takes, gives in product((False, True), repeat=2):
            if adds or gelu or not gives:  # queries, keys and values are never in E4M3
                for is_deep in (False, True) if adds and gives else (False,):
                    yield Form(adds, gelu, takes, gives, is_deep)


# What `compile_kernel` takes.
FORMS: dict[str, tuple[str, str, dict[str, int]]] = {
    **{str(form): ("gemm_wide", HOPPER, gemm_wide.make_macros(form)) for form in list_wide_gemms()},
    **{
        f"attention, heads of {size}{', E4M3' * is_narrow}": (
            "attention_hopper", HOPPER, attention_hopper.make_macros(size, is_narrow),
        )
        for size, is_narrow in product(attention_hopper.HEAD_SIZES, (False, True))
    },
    **{
        f"feed-forward{', copies' * copies}": ("feed_forward", HOPPER, feed_forward.make_macros(copies))
        for copies in (False, True)
    },
    **{
        f"{rows} tokens, {pooling}, {architecture}": (
            "few_tokens_cluster", architecture, few_tokens_cluster.make_macros(rows, pooling, normalize=True),
        )
        for rows, pooling, architecture in product((16, 32), ("mean", "cls", "lasttoken"), (HOPPER, JETSON))
    },
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> Iterator[None]:
    """What a GPU's torch has, to be found by the test alone."""
    ctypes.CDLL(str(next(COMPILER_FOLDER.glob("**/libnvrtc.so.*"))))  # the bindings take a library that is there
    sys.path.append(str(COMPILER_FOLDER))
    yield
    sys.path.remove(str(COMPILER_FOLDER))


@pytest.fixture(scope="module")
def images(_compiler: None) -> Iterator[dict[str, Future[bytes]]]:
    """All forms: a compiler uses one core, a machine has some."""
    pool = ThreadPoolExecutor(os.cpu_count())
    yield {form: pool.submit(compile_kernel, *asked) for form, asked in FORMS.items()}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("form", FORMS)
def test_kernel_compiles(form: str, images: dict[str, Future[bytes]]) -> None:
    assert len(images[form].result()) > 10_000


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
