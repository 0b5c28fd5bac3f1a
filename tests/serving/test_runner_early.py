"""A second batch for an engine that computes one at a time: given early where it is full."""

import time
from itertools import count
from threading import Event, Semaphore, get_ident

import pytest

from serving.batcher import Limits
from serving.engines import Embeddings, Engine
from serving.models import LoadedModel
from serving.tokenizer import Ids
from tests.serving.conftest import wait_until
from tests.serving.engines import FaultyEngine, WrappedEngine
from tests.serving.test_runner import RED, WAIT, Harness, owners


class GatedEngine(WrappedEngine):
    """Each run, in order of their beginnings, waits for a gate of its own."""

    def __init__(self, inner: Engine) -> None:
        super().__init__(inner)
        self.begun, self.gates, self._next = Semaphore(0), [Event() for _ in range(4)], count()

    def embed(self, input_ids: Ids, attention_mask: Ids) -> Embeddings:
        gate = self.gates[next(self._next)]
        self.begun.release()
        assert gate.wait(WAIT)
        return super().embed(input_ids, attention_mask)


def begin_two(model: LoadedModel) -> tuple[GatedEngine, Harness]:
    """An engine that computes a batch of one text and has a full one, of four, behind it."""
    engine = GatedEngine(model.engine)
    harness = Harness(engine, num_threads=2, num_computing=1)
    for texts in (1, 4):
        for _ in range(texts):
            harness.submit_new()
        assert engine.begun.acquire(timeout=WAIT)
    return engine, harness


def test_next_batch_is_given_early_only_where_it_is_full(model: LoadedModel) -> None:
    engine = GatedEngine(model.engine)
    harness = Harness(engine, num_threads=2, num_computing=1)
    harness.submit_new()
    assert engine.begun.acquire(timeout=WAIT)
    for _ in range(3):
        harness.submit_new()
    assert not engine.begun.acquire(timeout=0.1)
    assert len(harness.batcher.queue) == 3
    harness.submit_new()
    assert engine.begun.acquire(timeout=WAIT)
    harness.submit_new()
    for gate in engine.gates:
        gate.set()
    assert sorted(len(harness.next().batch.items) for _ in range(3)) == [1, 1, 4]
    assert harness.runner.stop(WAIT)


def test_what_waited_for_a_run_to_end_starts_then(model: LoadedModel) -> None:
    engine, harness = begin_two(model)
    harness.submit_new()
    engine.gates[0].set()
    assert len(harness.next().batch.items) == 1
    assert not engine.begun.acquire(timeout=0.1), "the batch that was full is computed now, this one may grow"
    engine.gates[1].set()
    assert len(harness.next().batch.items) == 4
    assert engine.begun.acquire(timeout=WAIT)
    for _ in range(4):
        harness.submit_new()
    assert engine.begun.acquire(timeout=WAIT), "whichever thread is idle"
    for gate in engine.gates:
        gate.set()
    assert sorted(len(harness.next().batch.items) for _ in range(2)) == [1, 4]
    assert harness.runner.stop(WAIT)


def test_thread_that_waits_for_the_other_to_end_takes_what_fills_a_batch_meanwhile(model: LoadedModel) -> None:
    engine, harness = begin_two(model)
    engine.gates[0].set()
    harness.next()
    for _ in range(4):
        harness.submit_new()
    assert engine.begun.acquire(timeout=WAIT)
    for gate in engine.gates:
        gate.set()
    assert [len(harness.next().batch.items) for _ in range(2)] == [4, 4]
    assert harness.runner.stop(WAIT)


def test_what_one_request_leaves_for_a_second_batch_is_given_early(model: LoadedModel) -> None:
    engine = GatedEngine(model.engine)
    harness = Harness(engine, num_threads=2, num_computing=1)
    harness.submit(*([2, *([RED] * place), 3] for place in range(9)))
    for _ in range(2):
        assert engine.begun.acquire(timeout=WAIT)
    assert len(harness.batcher.queue) == 1
    for gate in engine.gates:
        gate.set()
    assert sorted(len(harness.next().batch.items) for _ in range(3)) == [1, 4, 4]
    assert harness.runner.stop(WAIT)


def test_timer_runs_on_where_the_other_thread_waits_for_a_run_to_end(model: LoadedModel) -> None:
    engine = GatedEngine(model.engine)
    limits = Limits(4, 1000, max_wait_seconds=0.2)
    harness = Harness(engine, limits, num_threads=2, num_computing=1, clock=time.perf_counter)
    for _ in range(8):
        harness.submit_new()
    for _ in range(2):
        assert engine.begun.acquire(timeout=WAIT)
    engine.gates[0].set()
    harness.next()
    wait_until(lambda: harness.runner._num_idle == 1)
    late = harness.submit_new()
    engine.gates[1].set()
    harness.next()
    engine.gates[2].set()
    assert owners(harness.next()) == [late]
    assert harness.runner.stop(WAIT)


def test_backlog_counts_a_batch_that_waits_for_another_whole(model: LoadedModel) -> None:
    engine, harness = begin_two(model)
    short, full = 1.008, 1.032  # seconds of a run: 1, and a millisecond a token
    harness.now = 0.5
    assert harness.runner.backlog(60).seconds == pytest.approx(short - 0.5 + full + 1.0)
    harness.now = 0.75
    harness.batcher.model.observe = lambda _: None  # type: ignore[method-assign]  # predictions stay what they are
    engine.gates[0].set()
    harness.next()
    harness.now = 1.0
    assert harness.runner.backlog(60).seconds == pytest.approx(full - 0.25 + 1.0)
    for gate in engine.gates:
        gate.set()
    harness.next()
    assert harness.runner.stop(WAIT)


def test_all_that_an_engine_was_given_is_given_up_with_it(model: LoadedModel) -> None:
    stuck = GatedEngine(model.engine)
    harness = Harness(stuck, num_threads=2, num_computing=1, reopen=lambda: WrappedEngine(model.engine))
    harness.submit_new()
    assert stuck.begun.acquire(timeout=WAIT)
    harness.now = 4.0
    for _ in range(4):
        harness.submit_new()
    assert stuck.begun.acquire(timeout=WAIT)
    harness.now = 6.0
    assert len(harness.runner.replace_stuck(max_run_seconds=5.0)) == 5
    assert harness.runner.replace_stuck(max_run_seconds=1.0) == []
    waiting = harness.submit_new()
    assert owners(harness.next()) == [waiting]
    assert (len(harness.runner._abandoned), harness.runner._count_hanging()) == (2, 1)
    stuck.gates[1].set()
    wait_until(lambda: len(harness.runner._abandoned) == 1)
    for gate in stuck.gates:
        gate.set()
    wait_until(lambda: not harness.runner._abandoned)
    assert harness.runner.stop(WAIT)
    assert harness.outcomes.empty()


def test_lone_texts_find_the_same_thread(model: LoadedModel) -> None:
    threads = list[int]()

    def note(_: Ids, vectors: Embeddings) -> Embeddings:
        threads.append(get_ident())
        return vectors

    harness = Harness(FaultyEngine(model.engine, note), num_threads=2, num_computing=1)
    for _ in range(6):
        wait_until(lambda: harness.runner._num_idle + harness.runner._num_parked == 2)
        harness.submit_new()
        harness.next()
    assert len(set(threads)) == 1
    assert harness.runner.stop(WAIT)


def test_run_that_was_given_early_counts_from_the_end_of_the_one_before(model: LoadedModel) -> None:
    engine, harness = begin_two(model)
    observed = list[float]()
    harness.batcher.model.observe = lambda run: observed.append(run.seconds)  # type: ignore[method-assign]
    outcomes = []
    for number, ended in enumerate((3.0, 5.0)):
        harness.now = ended
        engine.gates[number].set()
        outcomes.append(harness.next())
    assert observed == [3.0, 2.0]
    assert [outcome.engine_seconds for outcome in outcomes] == [3.0, 2.0]
    assert harness.runner.stop(WAIT)
