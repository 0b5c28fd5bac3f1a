from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from queue import SimpleQueue

import numpy as np
import pytest

from serving.batcher import Batcher, Limits
from serving.containment import GuardedEngine, OpenEngine
from serving.engines import Engine
from serving.errors import EngineUnavailable
from serving.models import LoadedModel
from serving.request_queue import Request, RequestQueue
from serving.runner import EngineRunner, Outcome
from tests.serving.engines import FaultyEngine, HeldEngine, WrappedEngine, die, raise_on
from tests.serving.latency import make_latency_model

CAT, DOG, RED = 12, 13, 6
WAIT = 10


class Harness:
    """A runner whose outcomes land in a queue the test reads."""

    def __init__(
        self,
        engine: Engine,
        limits: Limits | None = None,
        num_threads: int = 1,
        reopen: OpenEngine | None = None,
        num_computing: int = 0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.outcomes: SimpleQueue[Outcome] = SimpleQueue()
        self.batcher = Batcher(
            RequestQueue(10**6, 10**6), limits or Limits(4, 1000), make_latency_model(1000, tokens_per_second=1000)
        )
        self.now = 0.0
        self.clock = clock or (lambda: self.now)
        self.guard = GuardedEngine(engine, 8, np.array([2, RED, 3]), reopen=reopen)
        self.runner = EngineRunner(
            self.guard,
            self.batcher,
            self.outcomes.put,
            num_threads=num_threads,
            num_computing=num_computing,
            clock=self.clock,
        )
        self.runner.start()
        self.texts = count(1)

    def submit(self, *rows: list[int]) -> Request:
        waiter: Future[None] = Future()
        request = Request(len(rows), 8, self.clock(), waiter)
        self.runner.submit(request, [np.array(row) for row in rows])
        return request

    def submit_new(self) -> Request:
        """A text that no other has."""
        return self.submit([2, *(RED if bit == "1" else DOG for bit in f"{next(self.texts):06b}"), 3])

    def next(self) -> Outcome:
        return self.outcomes.get(timeout=WAIT)


def owners(outcome: Outcome) -> list[Request]:
    return [request for item in outcome.batch.items for request, _ in item.places]


def test_runner_runs_a_lone_text_at_once(model: LoadedModel) -> None:
    harness = Harness(WrappedEngine(model.engine))
    request = harness.submit([2, RED, 3])
    outcome = harness.next()
    assert owners(outcome) == [request]
    np.testing.assert_allclose(np.linalg.norm(outcome.vectors, axis=1), 1, rtol=1e-6)
    assert harness.runner.stop(WAIT)


def test_runner_batches_what_arrived_during_a_run(model: LoadedModel) -> None:
    engine = HeldEngine(model.engine)
    harness = Harness(engine)
    harness.submit([2, RED, 3])
    assert engine.entered.wait(WAIT)
    late = [harness.submit_new() for _ in range(3)]
    engine.gate.set()
    assert len(harness.next().batch.items) == 1
    assert owners(harness.next()) == late
    assert harness.runner.stop(WAIT)


def test_runner_prefetches_a_full_batch_only(model: LoadedModel) -> None:
    engine = HeldEngine(model.engine)
    harness = Harness(engine)
    harness.runner.prefetch()  # nothing to do while idle
    harness.submit([2, RED, 3])
    assert engine.entered.wait(WAIT)
    harness.submit_new()
    harness.submit_new()
    harness.runner.prefetch()
    assert len(harness.batcher.queue) == 2
    for _ in range(3):
        harness.submit_new()
    harness.runner.prefetch()
    harness.runner.prefetch()  # one batch ahead, not two
    assert len(harness.batcher.queue) == 1
    engine.gate.set()
    assert [len(harness.next().batch.items) for _ in range(3)] == [1, 4, 1]
    assert harness.runner.stop(WAIT)


def test_runner_waits_for_the_timer_while_a_batch_is_not_full(model: LoadedModel) -> None:
    harness = Harness(WrappedEngine(model.engine), Limits(2, 1000, max_wait_seconds=10))
    harness.submit([2, RED, 3])
    harness.submit([2, DOG, 3])  # full: leaves although the clock stands still
    assert len(harness.next().batch.items) == 2
    assert harness.runner.stop(WAIT)


def test_runner_is_unhealthy_while_stuck_and_when_ended(model: LoadedModel) -> None:
    engine = HeldEngine(model.engine)
    harness = Harness(engine)
    harness.submit([2, RED, 3])
    assert engine.entered.wait(WAIT)
    harness.now = 5.0
    assert harness.runner.is_healthy(max_run_seconds=5.0)
    harness.now = 5.1
    assert not harness.runner.is_healthy(max_run_seconds=5.0)
    assert not harness.runner.can_answer(max_run_seconds=5.0)
    assert harness.runner.replace_stuck(max_run_seconds=5.0) == []  # there is no way to open another engine
    assert not harness.runner.stop(0.01)
    engine.gate.set()
    harness.next()
    assert harness.runner.stop(WAIT)
    assert not harness.runner.is_healthy(max_run_seconds=5.0)


def test_runner_learns_from_what_runs_took(model: LoadedModel) -> None:
    engine = HeldEngine(model.engine)
    harness = Harness(engine)
    before = harness.batcher.model.predict(4)
    harness.submit([2, RED, DOG, 3])
    assert engine.entered.wait(WAIT)
    harness.now = 2 * before
    engine.gate.set()
    harness.next()
    assert harness.batcher.model.predict(4) > 1.1 * before
    assert harness.runner.stop(WAIT)


def test_backlog_is_the_rest_of_the_run_and_what_is_due(model: LoadedModel) -> None:
    engine = HeldEngine(model.engine)
    harness = Harness(engine)  # a run takes 1 s and a millisecond a token
    assert harness.runner.backlog(60).seconds == pytest.approx(1.0)
    harness.submit([2, RED, 3])
    assert engine.entered.wait(WAIT)
    harness.now = 0.25
    found = harness.runner.backlog(60)
    assert (found.size, found.tokens, found.due_tokens) == (0, 0, 0)
    assert found.seconds == pytest.approx(1.003 - 0.25 + 1.0)
    harness.submit([2, DOG, 3])
    found = harness.runner.backlog(60)
    assert (found.size, found.tokens, found.due_tokens) == (1, 3, 3)
    assert found.seconds == pytest.approx(1.003 - 0.25 + 1.003)
    engine.gate.set()
    for _ in range(2):
        harness.next()
    assert harness.runner.stop(WAIT)


def test_two_threads_run_two_batches_at_a_time(model: LoadedModel) -> None:
    engine = HeldEngine(model.engine)
    harness = Harness(engine, num_threads=2)
    harness.submit([2, RED, 3])
    assert engine.entered.wait(WAIT)
    engine.entered.clear()
    harness.submit([2, DOG, 3])
    assert engine.entered.wait(WAIT)
    assert harness.runner.backlog(60).seconds == pytest.approx((2 * 1.003 + 1.0) / 2)
    engine.gate.set()
    assert {len(harness.next().batch.items) for _ in range(2)} == {1}
    assert harness.runner.stop(WAIT)


def test_stuck_thread_is_replaced_and_its_late_answer_dropped(model: LoadedModel) -> None:
    stuck = HeldEngine(model.engine)
    harness = Harness(stuck, reopen=lambda: WrappedEngine(model.engine))
    lost = harness.submit([2, RED, 3])
    assert stuck.entered.wait(WAIT)
    harness.now = 6.0
    waiting = harness.submit([2, DOG, 3])
    (item,) = harness.runner.replace_stuck(max_run_seconds=5.0)
    assert item.places == [(lost, 0)]
    assert owners(harness.next()) == [waiting]
    assert harness.runner.is_healthy(max_run_seconds=5.0)
    stuck.gate.set()
    again = harness.submit_new()
    assert owners(harness.next()) == [again]
    assert harness.runner.stop(WAIT)
    assert harness.outcomes.empty()


def test_threads_that_hang_one_after_the_other_in_one_engine_cost_one(model: LoadedModel) -> None:
    stuck, opened = HeldEngine(model.engine), list[Engine]()

    def reopen() -> Engine:
        opened.append(WrappedEngine(model.engine))
        return opened[-1]

    harness = Harness(stuck, num_threads=2, reopen=reopen)
    for asked in (1.0, 3.0):
        harness.now = asked
        harness.submit_new()
        assert stuck.entered.wait(WAIT)
        stuck.entered.clear()
    for now in (7.0, 9.0):
        harness.now = now
        assert len(harness.runner.replace_stuck(max_run_seconds=5.0)) == 1
        waiting = harness.submit_new()
        assert owners(harness.next()) == [waiting]
    assert (len(opened), harness.runner._count_hanging()) == (1, 1)
    stuck.gate.set()
    assert harness.runner.stop(WAIT)


def test_runner_gives_up_replacing_engines_that_all_hang(model: LoadedModel) -> None:
    engines = [HeldEngine(model.engine, is_free=lambda ids: (ids == RED).any()) for _ in range(3)]
    rest = iter(engines[1:])
    harness = Harness(engines[0], reopen=lambda: next(rest))
    for place, engine in enumerate(engines):
        harness.submit([2, DOG, *[CAT] * place, 3])
        assert engine.entered.wait(WAIT)
        harness.now += 6.0
        assert len(harness.runner.replace_stuck(max_run_seconds=5.0)) == (1 if place < 2 else 0)
    assert not harness.runner.can_answer(max_run_seconds=5.0)
    for engine in engines:
        engine.gate.set()


def test_runner_goes_on_after_a_failed_batch(model: LoadedModel) -> None:
    harness = Harness(FaultyEngine(model.engine, raise_on(CAT, "the text itself")))
    harness.submit([2, CAT, 3])
    failure = harness.next().failures[0]
    assert "the text itself" not in str(failure)
    assert "RuntimeError" in str(failure)
    harness.submit([2, DOG, 3])
    assert harness.next().failures == {}
    assert harness.runner.stop(WAIT)


def test_runner_opens_a_dead_engine_anew_and_answers_the_batch_it_died_on(model: LoadedModel) -> None:
    harness = Harness(FaultyEngine(model.engine, die), reopen=lambda: WrappedEngine(model.engine))
    harness.submit([2, DOG, 3])
    assert harness.next().failures == {}
    assert harness.runner.is_healthy(max_run_seconds=5.0)
    assert harness.runner.stop(WAIT)


def test_runner_is_unhealthy_while_a_dead_engine_cannot_be_opened(model: LoadedModel) -> None:
    def refuse() -> Engine:
        raise EngineUnavailable("the file is gone")

    harness = Harness(FaultyEngine(model.engine, die), reopen=refuse)
    harness.submit([2, DOG, 3])
    assert list(harness.next().failures) == [0]
    assert not harness.runner.is_healthy(max_run_seconds=5.0)
    assert not harness.runner.can_answer(max_run_seconds=5.0)
    assert harness.runner.stop(WAIT)


class SmallEngine(WrappedEngine):
    """Has learned that more than 9 tokens do not fit."""

    memory_limit_tokens = 9


def test_runner_forms_the_batches_that_the_engine_has_learned_to_hold(model: LoadedModel) -> None:
    engine = SmallEngine(model.engine)
    harness = Harness(engine)
    harness.submit([2, RED, 3])
    harness.next()
    assert harness.batcher.max_tokens == SmallEngine.memory_limit_tokens
    harness.submit(*([2, token, 3] for token in (CAT, DOG, 7, 8)))  # no row of the first
    assert sum(len(harness.next().batch.items) for _ in range(2)) == 4
    assert max(rows * width for rows, width in engine.shapes) == SmallEngine.memory_limit_tokens
    assert harness.runner.stop(WAIT)
