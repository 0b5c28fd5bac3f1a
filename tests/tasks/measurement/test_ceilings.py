"""The rates that a run is held against."""

import pytest
import torch

from tasks.measurement.ceilings import Ceilings, measure_ceilings, measure_narrow
from tasks.measurement.work import Work


def test_float32_is_measured_on_the_cpu() -> None:
    ceilings = measure_ceilings("f32", 64)
    assert ceilings.bytes_per_second > 1e6
    assert ceilings.flops_per_second > 1e6
    assert ceilings.narrow_flops_per_second is None


def test_the_product_in_e4m3_is_measured_where_torch_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = torch.randn(64, 64), torch.randn(64, 64)
    taken = []
    multiply = torch._scaled_mm

    def watch(*operands: torch.Tensor, **options: object) -> torch.Tensor:
        taken.append({operand.dtype for operand in operands[:2]})
        return multiply(*operands, **options)

    monkeypatch.setattr(torch, "_scaled_mm", watch)
    rate = measure_narrow(left, right)
    assert rate is not None
    assert rate > 1e5
    assert all(dtypes == {torch.float8_e4m3fn} for dtypes in taken)
    monkeypatch.setattr(torch, "_scaled_mm", _refuse)
    assert measure_narrow(left, right) is None
    monkeypatch.delattr(torch, "_scaled_mm")
    assert measure_narrow(left, right) is None


def _refuse(*operands: torch.Tensor, **options: object) -> torch.Tensor:
    raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9")


def test_operations_take_what_their_own_ceiling_says() -> None:
    ceilings = Ceilings(1e9, 1e9, 2e9)
    assert ceilings.least_seconds(Work(0, 3e9)) == pytest.approx(3)
    assert ceilings.least_seconds(Work(0, 3e9, 3e9)) == pytest.approx(1.5)
    assert ceilings.least_seconds(Work(0, 3e9, 2e9)) == pytest.approx(2)
    assert Ceilings(1e9, 1e9).least_seconds(Work(0, 3e9, 2e9)) is None
    assert Ceilings(1e9, 1e9).least_seconds(Work(0, 3e9)) == pytest.approx(3)
