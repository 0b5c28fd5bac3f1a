"""The shapes that graphs are captured for cover every run and waste little; cuBLAS gets little memory meanwhile."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engines.bert import BertConfig
from serving.engines.cuda import CudaEngine, _make_encoder, _small_workspace, check_sizes
from serving.engines.cuda_shapes import list_shapes, make_shape, round_tokens
from serving.engines.packing import split_rows
from serving.errors import EngineUnavailable


@given(st.integers(1, 200_000))
def test_round_tokens_adds_less_than_a_step(tokens: int) -> None:
    rounded = round_tokens(tokens)
    assert tokens <= rounded < tokens + max(16, tokens / 8)
    assert round_tokens(rounded) == rounded


@pytest.mark.parametrize("max_tokens", [16, 100, 5000, 131_072])
def test_list_shapes_holds_the_shape_of_every_run(max_tokens: int) -> None:
    shapes = list_shapes(max_tokens, 4096, has_long=True)
    assert shapes[0].tokens == max_tokens
    assert len(set(shapes)) == len(shapes) < 300
    for tokens in {1, 2, 17, 99, 4095, 4097, max_tokens - 1, max_tokens} & set(range(1, max_tokens + 1)):
        for is_long in (False, True):
            assert make_shape(min(round_tokens(tokens), max_tokens), 4096, is_long) in shapes
    assert list_shapes(max_tokens, 4096, has_long=False) == [shape for shape in shapes if not shape.long]


def make_config(**changes: int) -> BertConfig:
    sizes = {"vocabulary": 10, "positions": 512, "hidden": 384, "layers": 1, "heads": 12, "intermediate": 1536}
    return BertConfig(**{**sizes, **changes}, eps=1e-12, pooling="mean", normalize=True)


@pytest.mark.parametrize("changes", [{}, {"heads": 6}, {"positions": 16}, {"hidden": 128, "heads": 2}])
def test_sizes_that_the_kernels_know_pass(changes: dict[str, int]) -> None:
    check_sizes(Path("config.json"), make_config(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 48}, "num_attention_heads 48 makes heads of 8, the kernels know 32 and 64"),
        ({"heads": 3}, "num_attention_heads 3 makes heads of 128, the kernels know 32 and 64"),
        ({"hidden": 320, "heads": 10}, "hidden_size 320 is no multiple of 128"),
        ({"intermediate": 1600}, "intermediate_size 1600 is no multiple of 128"),
        ({"positions": 15}, "max_position_embeddings 15 is less than 16"),
    ],
)
def test_sizes_that_the_kernels_do_not_know_are_named_with_the_way_out(changes: dict[str, int], message: str) -> None:
    with pytest.raises(EngineUnavailable, match=rf"^config\.json: {message}: build it for onnxruntime"):
        check_sizes(Path("config.json"), make_config(**changes))


@pytest.fixture
def encoder_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Any]:
    """`_make_encoder` for runs of so many tokens, of an encoder that has its limits alone."""

    def make(weights: Any, config: Any, device: Any, max_tokens: int, max_rows: int) -> SimpleNamespace:
        return SimpleNamespace(max_tokens=max_tokens, max_rows=max_rows, long_length=32)

    encoders = SimpleNamespace(Encoder=make, Fp8Encoder=make)
    monkeypatch.setitem(sys.modules, "serving.engines.cuda_encoder", encoders)
    nothing: Any = None
    return lambda max_tokens: _make_encoder(nothing, nothing, nothing, "f16", max_tokens)


@pytest.mark.parametrize("max_tokens", [1, 5, 16, 32, 33, 512])
def test_runs_of_few_tokens_hold_a_text_of_as_many(max_tokens: int, encoder_of: Callable[[int], Any]) -> None:
    encoder = encoder_of(max_tokens)
    assert encoder.max_tokens == max_tokens
    assert encoder.max_rows >= max(1, max_tokens // 16)
    assert {shape.rows for shape in list_shapes(max_tokens, encoder.max_rows, True)} <= {
        *range(1, encoder.max_rows + 1)
    }


def test_texts_of_one_token_are_split_by_rows_into_runs_of_a_listed_shape(encoder_of: Callable[[int], Any]) -> None:
    """A run has a row for every 16 tokens of its limit: 40 tokens are far from 512, and still two runs."""
    engine, lengths = CudaEngine.__new__(CudaEngine), np.ones(40, dtype=np.int64)
    engine._encoder = encoder_of(512)
    limits = engine._encoder.max_tokens, engine._encoder.max_rows
    assert limits == (512, 32)
    runs = list(split_rows(lengths, *limits))
    assert runs == [slice(0, 32), slice(32, 40)]
    shapes = [engine._choose_shape(lengths[run]) for run in runs]
    assert [(shape.tokens, shape.rows) for shape in shapes] == [(32, 32), (16, 16)]
    assert set(shapes) <= set(list_shapes(*limits, has_long=True))


@pytest.mark.parametrize(
    ("lengths", "is_long"),
    [
        ([32] * 128, True),
        ([31] * 200, False),
        ([32] * 100, False),  # few tokens, whatever their texts
        ([512] * 10 + [1] * 100, True),  # a token attends to 502 others
    ],
)
def test_long_texts_are_those_that_the_encoder_says_whatever_rows_a_graph_has(
    lengths: list[int], is_long: bool, encoder_of: Callable[[int], Any]
) -> None:
    engine = CudaEngine.__new__(CudaEngine)
    engine._encoder = encoder_of(131_072)
    assert engine._choose_shape(np.array(lengths)).long == is_long
    engine._encoder.long_length = None
    assert not engine._choose_shape(np.array(lengths)).long


@pytest.mark.parametrize("chosen", [None, ":16:8"])
def test_small_workspace_leaves_the_environment_as_it_was(chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.delenv(name, raising=False)
    if chosen:
        monkeypatch.setenv(name, chosen)
    with _small_workspace():
        assert os.environ[name] == (chosen or ":4096:1")
    assert os.environ.get(name) == chosen
