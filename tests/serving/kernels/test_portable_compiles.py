"""The kernels that any GPU runs compile for others than Hopper on any machine; `make e2e` has all forms for Thor."""

from pathlib import Path

import pytest

from tests.serving.kernels.compile_portable import GPUS, can_run
from tests.serving.kernels.launches import compile_alone

FORMS = {
    "attention, heads of 32": "_attention_kernel",
    "steady attention to E4M3, heads of 64": "_attention_kernel",
    "norm, 384": "_add_norm_kernel",
    "embeddings in E4M3, 768": "_embed_norm_kernel",
    "mean of 384": "_pool_kernel",
    "linear of few rows, GELU": "_linear_kernel",
    "linear of many rows, GELU": "_linear_kernel",
    "linear of many rows, E4M3": "_linear_kernel",
    "few tokens": "_encode_kernel",
}


@pytest.mark.parametrize("capability", GPUS)
def test_kernels_compile(capability: int, tmp_path: Path) -> None:
    """None of them starts early, which was run on Hopper alone: see `handover`."""
    gpu = GPUS[capability]
    expected = {form: [kernel] for form, kernel in FORMS.items() if can_run(gpu, form)}
    compiled = compile_alone("compile_portable", tmp_path, str(capability), *expected)
    assert {form: [each.kernel for each in kernels] for form, kernels in compiled.items()} == expected
    for form, kernels in compiled.items():
        assert gpu.can_run(kernels[0]), (form, kernels)
        assert not kernels[0].is_early, form
