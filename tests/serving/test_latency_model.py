import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.latency_model import Quantile, Run
from tests.serving.latency import make_latency_model

sizes = st.lists(st.integers(1, 8192), min_size=1, max_size=60)


def test_model_predicts_the_line_of_its_prior() -> None:
    model = make_latency_model(overhead_tokens=20, tokens_per_second=10_000)
    assert model.overhead_tokens == pytest.approx(20)
    assert model.overhead_seconds == pytest.approx(0.002)
    assert model.seconds_per_token == pytest.approx(1e-4)
    assert model.predict(480) == pytest.approx(0.05)


def test_model_learns_another_line_from_runs_of_several_sizes() -> None:
    model = make_latency_model(overhead_tokens=20, tokens_per_second=10_000)
    noise = np.random.default_rng(0).uniform(0.9, 1.1, 300)
    for place, factor in enumerate(noise):
        tokens = (16, 128, 1024)[place % 3]
        model.observe(Run(tokens, factor * (0.001 + tokens / 40_000)))
    for tokens in (16, 128, 1024):
        assert model.predict(tokens) == pytest.approx(0.001 + tokens / 40_000, rel=0.1)
    assert 1.0 < model.predict_p95(128) / model.predict(128) < 1.25


def test_model_keeps_the_slope_while_it_sees_one_size_only() -> None:
    model = make_latency_model(overhead_tokens=20, tokens_per_second=10_000)
    for _ in range(2000):
        model.observe(Run(16, 0.0036))
    assert model.predict(2000) == pytest.approx(0.202, rel=0.02)


def test_one_run_far_off_the_line_moves_it_by_little() -> None:
    model = make_latency_model(overhead_tokens=20, tokens_per_second=10_000)
    for _ in range(50):
        model.observe(Run(100, 0.012))
    model.observe(Run(100, 12.0))
    assert model.predict(100) == pytest.approx(0.012, rel=0.1)


@given(sizes, st.floats(0, 1), st.randoms())
@settings(max_examples=100, deadline=None)
def test_model_never_predicts_a_run_that_is_free_or_a_larger_one_that_is_faster(
    sizes: list[int], noise: float, random: object
) -> None:
    model = make_latency_model()
    for size in sizes:
        model.observe(Run(size, random.uniform(1e-6, 1e-6 + noise)))  # type: ignore[attr-defined]
    assert model.overhead_seconds >= 0
    assert 0 < model.predict(1) < model.predict(10_000) <= model.predict_p95(10_000)


@given(st.floats(0.001, 10))
def test_largest_run_within_a_time_is_the_largest(seconds: float) -> None:
    model = make_latency_model(overhead_tokens=20, tokens_per_second=10_000)
    tokens = model.max_tokens(seconds)
    assert tokens == 0 or model.predict_p95(tokens) <= seconds * (1 + 1e-9)
    assert model.predict_p95(tokens + 1) > seconds * (1 - 1e-9)


def test_quantile_follows_the_stream_and_stays_within_its_bounds() -> None:
    quantile = Quantile(0.95, start=1.0, low=0.5, high=4.0)
    for ratio in np.random.default_rng(0).uniform(0, 2, 20_000):
        quantile.observe(ratio)
    assert quantile.value == pytest.approx(1.9, rel=0.1)
    for _ in range(1000):
        quantile.observe(100.0)
    assert quantile.value == 4.0
    for _ in range(10_000):
        quantile.observe(0.0)
    assert quantile.value == 0.5
