"""What the benchmark of the cuda engine compiles ahead is what it measures against."""

import pytest

pytest.importorskip("triton")

from benchmarks.bench_cuda import _CASES, _list_jobs, _read_case
from benchmarks.torch_baseline import sort_and_cut


def test_sort_and_cut_puts_texts_of_like_length_together() -> None:
    assert sort_and_cut([3, 9, 1, 7, 5], size=2) == [[9, 7], [5, 3], [1]]


@pytest.mark.parametrize("case", list(_CASES))
def test_jobs_hold_every_batch_of_the_baseline(case: str) -> None:
    (_, lengths), jobs = _read_case(case), [batch for _, batch in _list_jobs(case)]
    assert jobs[0] == lengths
    assert sorted(length for batch in jobs[1:] for length in batch) == (sorted(lengths) if "mixed" in case else [])
