"""What the benchmark of the cuda engine compiles ahead is what it measures against; its models are as ours are."""

from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.bench_cuda import _CASES, _MODELS, _list_jobs, _read_case, _write_model
from benchmarks.torch_baseline import sort_and_cut
from serving.engines.bert import keep_by_default, read_config


def test_sort_and_cut_puts_texts_of_like_length_together() -> None:
    assert sort_and_cut([3, 9, 1, 7, 5], size=2) == [[9, 7], [5, 3], [1]]


@pytest.mark.parametrize("case", list(_CASES))
def test_jobs_hold_every_batch_of_the_baseline(case: str) -> None:
    (_, lengths), jobs = _read_case(case), [batch for _, batch in _list_jobs(case)]
    assert jobs[0] == lengths
    assert sorted(length for batch in jobs[1:] for length in batch) == (sorted(lengths) if "mixed" in case else [])


def test_models_keep_the_layers_in_float16_that_any_file_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_MODELS, "minilm", _MODELS["minilm"] | {"num_hidden_layers": 1, "intermediate_size": 384})
    config = read_config(_write_model("minilm", tmp_path).with_name("config.json"))
    assert config.float16 == keep_by_default(384, 1) != frozenset()
