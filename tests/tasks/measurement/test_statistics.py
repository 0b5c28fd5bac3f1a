import math

import numpy as np
import pytest

from tasks.measurement.statistics import loss_interval, mean_interval, statistic_interval


def test_mean_interval_covers_the_true_mean_about_95_times_in_100() -> None:
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(200):
        measured = mean_interval(rng.exponential(2.0, 80))
        assert measured.low <= measured.value <= measured.high
        hits += measured.low <= 2.0 <= measured.high
    assert 180 <= hits <= 198


def test_mean_interval_equals_the_normal_one_where_that_holds() -> None:
    values = np.random.default_rng(3).normal(10, 1, 2000)
    measured = mean_interval(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert measured.value == pytest.approx(values.mean())
    assert measured.high - measured.value == pytest.approx(half, rel=0.1)
    assert measured.value - measured.low == pytest.approx(half, rel=0.1)


def test_mean_interval_is_the_same_every_time() -> None:
    values = np.random.default_rng(0).random(50)
    assert mean_interval(values) == mean_interval(values)


def test_loss_interval_is_narrower_in_pairs_than_apart() -> None:
    rng = np.random.default_rng(11)
    teacher = rng.random(500)
    candidate = np.clip(teacher * 0.99 + rng.normal(0, 0.01, 500), 0, 1)
    paired = loss_interval(candidate, teacher)
    apart = loss_interval(rng.permutation(candidate), teacher)
    assert paired.value == pytest.approx(1 - candidate.mean() / teacher.mean())
    assert paired.value == pytest.approx(apart.value)
    assert paired.high - paired.low < 0.2 * (apart.high - apart.low)


def test_loss_interval_covers_the_true_loss_about_95_times_in_100() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(200):
        teacher = rng.beta(2, 2, 150)
        measured = loss_interval(teacher * rng.choice([1.0, 0.9], 150), teacher)
        hits += measured.low <= 0.05 <= measured.high
    assert 180 <= hits <= 198


def test_loss_interval_of_a_system_against_itself_is_zero() -> None:
    teacher = np.random.default_rng(0).random(30)
    measured = loss_interval(teacher, teacher)
    assert (measured.value, measured.low, measured.high) == pytest.approx((0, 0, 0), abs=1e-12)


def test_loss_interval_of_a_teacher_that_scores_nothing_is_not_a_number() -> None:
    measured = loss_interval(np.zeros(5), np.zeros(5))
    assert all(math.isnan(number) for number in (measured.value, measured.low, measured.high))


def test_loss_interval_of_a_teacher_that_scores_almost_nothing_does_not_pass_a_gate() -> None:
    teacher = np.zeros(4)
    teacher[0] = 1.0  # about a third of the resamples draw only zeros
    measured = loss_interval(teacher, teacher)
    assert not measured.high <= 0.01


def test_statistic_interval_resamples_each_sample_by_itself() -> None:
    drawn: list[tuple[tuple[int, ...], ...]] = []

    def statistic(*rows: np.ndarray) -> np.ndarray:
        drawn.append(tuple(part.shape for part in rows))
        assert [int(part.max()) < size for part, size in zip(rows, (3, 50), strict=True)] == [True, True]
        return np.asarray(rows[0].mean(axis=1) + rows[1].mean(axis=1))

    assert statistic_interval(statistic, 3, 50).value == 1 + 24.5
    assert drawn[0] == ((1, 3), (1, 50))
    assert set(drawn[1:]) == {((200, 3), (200, 50))}


def test_statistic_interval_contains_its_point_even_where_resamples_never_reach_it() -> None:
    values = np.arange(200.0)
    measured = statistic_interval(lambda rows: values[rows].min(axis=1), len(values))
    assert measured.value == measured.low == 0
    assert measured.high > 0
