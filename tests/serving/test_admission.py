import numpy as np
import pytest

from serving.admission import Admission, Backlog
from serving.errors import Overloaded


def backlog(seconds: float, due_tokens: int = 100, is_full: bool = False) -> Backlog:
    return Backlog(size=7, tokens=123, is_full=is_full, due_tokens=due_tokens, seconds=seconds)


def test_admission_lets_in_what_is_answered_in_time_19_times_of_20() -> None:
    admission = Admission(objective_seconds=1.0)  # until it learns better: a quarter above the prediction
    admission.check(backlog(0.63), now=0.0)
    with pytest.raises(Overloaded, match="7 texts with 123 tokens are waiting and the limit is a wait of 1000 ms"):
        admission.check(backlog(0.65), now=0.0)


def test_admission_lets_anybody_in_while_no_text_is_due() -> None:
    Admission(0.001).check(backlog(60.0, due_tokens=0), now=0.0)


def test_admission_refuses_at_a_full_queue_whatever_the_wait() -> None:
    with pytest.raises(Overloaded, match="the queue is full"):
        Admission(60.0).check(backlog(0.0, due_tokens=0, is_full=True), now=0.0)


def test_refusal_for_the_wait_stands_until_a_run_ends_or_two_milliseconds_are_over() -> None:
    admission = Admission(objective_seconds=0.5)
    assert admission.standing.get(now=10.0) is None
    with pytest.raises(Overloaded) as raised:
        admission.check(backlog(3.0), now=10.0)
    standing = admission.standing.get(now=10.0019)
    assert standing is not None
    assert (str(standing), standing.retry_after_seconds) == (str(raised.value), 3)
    assert admission.standing.get(now=10.0021) is None
    with pytest.raises(Overloaded):
        admission.check(backlog(3.0), now=11.0)
    admission.standing.drop()
    assert admission.standing.get(now=11.0) is None


def test_full_queue_of_one_kind_of_request_turns_nobody_else_away() -> None:
    admission = Admission(objective_seconds=0.5)
    with pytest.raises(Overloaded, match="the queue is full"):
        admission.check(backlog(3.0, is_full=True), now=10.0)
    assert admission.standing.get(now=10.0) is None


@pytest.mark.parametrize(("wait", "retry_after"), [(0.9, 1), (1.5, 2), (9.0, 9)])
def test_overloaded_says_when_the_queue_will_be_empty(wait: float, retry_after: int) -> None:
    with pytest.raises(Overloaded) as raised:
        Admission(0.5).check(backlog(wait), now=0.0)
    assert raised.value.retry_after_seconds == retry_after


def test_admission_learns_what_the_prediction_leaves_out() -> None:
    admission = Admission(objective_seconds=1.0)
    for factor in np.random.default_rng(0).uniform(1.0, 3.0, 2000):
        admission.observe(0.4, 0.4 * factor)
    assert admission.max_wait_seconds == pytest.approx(0.85 / 2.9, rel=0.1)


def test_admission_learns_nothing_from_an_idle_worker() -> None:
    admission = Admission(objective_seconds=1.0)
    for _ in range(1000):
        admission.observe(0.001, 0.1)
    assert admission.max_wait_seconds == pytest.approx(0.64)
