import threading
from concurrent.futures import Future
from queue import SimpleQueue

import numpy as np
import pytest

from serving.batcher import Batcher, Limits
from serving.engines import Embeddings, Engine
from serving.errors import EngineFailed
from serving.models import LoadedModel
from serving.request_queue import Request, RequestQueue
from serving.runner import EngineRunner, Outcome, run_isolated
from serving.tokenizer import Ids, pad_batch
from tests.serving.engines import FaultyEngine, HeldEngine, WrappedEngine, nan_on, raise_on

CAT, DOG, RED = 12, 13, 6
WAIT = 10


class Harness:
    """A runner whose outcomes land in a queue the test reads."""

    def __init__(self, engine: Engine, limits: Limits | None = None) -> None:
        self.outcomes: SimpleQueue[Outcome] = SimpleQueue()
        self.batcher = Batcher(RequestQueue(10**6, 10**6), limits or Limits(4, 1000), overhead_tokens=1000)
        self.now = 0.0
        self.runner = EngineRunner(
            engine, 8, self.batcher, self.outcomes.put, tokens_per_second=1000.0, clock=lambda: self.now
        )
        self.runner.start()

    def submit(self, *rows: list[int]) -> Request:
        waiter: Future[None] = Future()
        request = Request(len(rows), 8, self.now, waiter)
        self.runner.submit(request, [np.array(row) for row in rows])
        return request

    def next(self) -> Outcome:
        return self.outcomes.get(timeout=WAIT)


def test_runner_runs_a_lone_text_at_once(model: LoadedModel) -> None:
    harness = Harness(WrappedEngine(model.engine))
    request = harness.submit([2, RED, 3])
    outcome = harness.next()
    assert [item.request for item in outcome.batch.items] == [request]
    np.testing.assert_allclose(np.linalg.norm(outcome.vectors, axis=1), 1, rtol=1e-6)
    assert harness.runner.stop(WAIT)


def test_runner_batches_what_arrived_during_a_run(model: LoadedModel) -> None:
    engine = HeldEngine(model.engine)
    harness = Harness(engine)
    harness.submit([2, RED, 3])
    assert engine.entered.wait(WAIT)
    late = [harness.submit([2, RED, 3]) for _ in range(3)]
    engine.gate.set()
    assert len(harness.next().batch.items) == 1
    assert [item.request for item in harness.next().batch.items] == late
    assert harness.runner.stop(WAIT)


def test_runner_prefetches_a_full_batch_only(model: LoadedModel) -> None:
    engine = HeldEngine(model.engine)
    harness = Harness(engine)
    harness.runner.prefetch()  # nothing to do while idle
    harness.submit([2, RED, 3])
    assert engine.entered.wait(WAIT)
    harness.submit([2, RED, 3], [2, DOG, 3])
    harness.runner.prefetch()
    assert len(harness.batcher.queue) == 2
    harness.submit([2, RED, 3], [2, DOG, 3], [2, CAT, 3])
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
    assert harness.runner.is_healthy(5.0, max_run_seconds=5.0)
    assert not harness.runner.is_healthy(5.1, max_run_seconds=5.0)
    assert not harness.runner.stop(0.01)
    engine.gate.set()
    harness.next()
    assert harness.runner.stop(WAIT)
    assert not harness.runner.is_healthy(5.0, max_run_seconds=5.0)


def test_runner_measures_tokens_per_second(model: LoadedModel) -> None:
    engine = HeldEngine(model.engine)
    harness = Harness(engine)
    harness.submit([2, RED, DOG, 3])
    assert engine.entered.wait(WAIT)
    harness.now = 0.002  # 4 tokens in 2 ms: 2,000 a second
    engine.gate.set()
    harness.next()
    assert harness.runner.tokens_per_second == pytest.approx(1100)
    assert harness.runner.stop(WAIT)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_poison_text_fails_alone(model: LoadedModel, size: int) -> None:
    engine = FaultyEngine(model.engine, raise_on(CAT))
    poisoned = size // 2
    rows = [np.array([2, CAT if place == poisoned else RED, 3]) for place in range(size)]
    vectors, failures = run_isolated(engine, rows, *pad_batch(rows), 8)
    assert list(failures) == [poisoned]
    assert vectors.shape == (size, 8)
    good = np.delete(np.arange(size), poisoned)
    expected = model.engine.embed(*pad_batch([np.array([2, RED, 3])]))
    np.testing.assert_allclose(vectors[good], np.repeat(expected, size - 1, axis=0), rtol=1e-5)


def test_batch_of_poison_fails_each_text(model: LoadedModel) -> None:
    rows = [np.array([2, CAT, 3])] * 5
    _, failures = run_isolated(FaultyEngine(model.engine, raise_on(CAT)), rows, *pad_batch(rows), 8)
    assert sorted(failures) == [0, 1, 2, 3, 4]


def test_non_finite_vector_fails_its_text_alone(model: LoadedModel) -> None:
    rows = [np.array([2, token, 3]) for token in (RED, CAT, DOG)]
    _, failures = run_isolated(FaultyEngine(model.engine, nan_on(CAT)), rows, *pad_batch(rows), 8)
    assert list(failures) == [1]
    assert "non-finite" in str(failures[1])


def test_wrong_shape_fails_every_text(model: LoadedModel) -> None:
    def cut(_: Ids, embeddings: Embeddings) -> Embeddings:
        return embeddings[:, :5]

    rows = [np.array([2, RED, 3])] * 2
    vectors, failures = run_isolated(FaultyEngine(model.engine, cut), rows, *pad_batch(rows), 8)
    assert vectors.shape == (2, 8)
    assert all(isinstance(failures[row], EngineFailed) and "(2, 5)" in str(failures[row]) for row in (0, 1))


def test_runner_goes_on_after_a_failed_batch(model: LoadedModel) -> None:
    harness = Harness(FaultyEngine(model.engine, raise_on(CAT, "the text itself")))
    harness.submit([2, CAT, 3])
    failure = harness.next().failures[0]
    assert "the text itself" not in str(failure)
    assert "RuntimeError" in str(failure)
    harness.submit([2, DOG, 3])
    assert harness.next().failures == {}
    assert harness.runner.stop(WAIT)
    assert threading.active_count() < 50
