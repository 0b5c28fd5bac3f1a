"""The GEMM in Gluon compiles for its GPU on any machine: its language says what it cannot take only there."""

from pathlib import Path

from tests.serving.kernels.compile_hopper import H200
from tests.serving.kernels.launches import compile_alone


def test_every_form_of_the_gemm_for_hopper_compiles(tmp_path: Path) -> None:
    compiled = compile_alone("compile_hopper", tmp_path)
    assert len(compiled) == 6
    for form, kernels in compiled.items():
        assert [each.kernel for each in kernels] == ["_linear_kernel"], form
        assert H200.can_run(kernels[0]), (form, kernels)
        assert kernels[0].is_early, form
