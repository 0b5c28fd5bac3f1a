"""The shapes that graphs are captured for cover every run and waste little; cuBLAS gets little memory meanwhile."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engines.cuda import _small_workspace, list_shapes, make_shape, round_tokens


@given(st.integers(1, 200_000))
def test_round_tokens_adds_less_than_a_step(tokens: int) -> None:
    rounded = round_tokens(tokens)
    assert tokens <= rounded < tokens + max(16, tokens / 8)
    assert round_tokens(rounded) == rounded


@pytest.mark.parametrize("max_tokens", [16, 100, 5000, 131_072])
def test_list_shapes_holds_the_shape_of_every_run(max_tokens: int) -> None:
    shapes = list_shapes(max_tokens, 4096)
    assert shapes[0].tokens == max_tokens
    assert len(set(shapes)) == len(shapes) < 300
    for tokens in {1, 2, 17, 99, 4095, 4097, max_tokens - 1, max_tokens} & set(range(1, max_tokens + 1)):
        for is_long in (False, True):
            assert make_shape(min(round_tokens(tokens), max_tokens), 4096, is_long) in shapes


@pytest.mark.parametrize("chosen", [None, ":16:8"])
def test_small_workspace_leaves_the_environment_as_it_was(chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.delenv(name, raising=False)
    if chosen:
        monkeypatch.setenv(name, chosen)
    with _small_workspace():
        assert os.environ[name] == (chosen or ":4096:1")
    assert os.environ.get(name) == chosen
