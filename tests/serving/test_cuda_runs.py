"""Two batches at a time on the cuda engine, whose GPU is a stand-in that computes on the CPU; and on a GPU."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serving.engines.cuda import CudaEngine, _Streams
from serving.tokenizer import pad_batch
from tests.serving.test_cuda import NEEDS_GPU
from tests.serving.test_cuda_memory import make_batch, make_computing_engine

WAIT = 20


class Gates:
    """What a run's thread waits for on the GPU: each run's, in the order in which they were queued, opens alone."""

    def __init__(self) -> None:
        self.queued, self.gates, self.numbers = threading.Semaphore(0), list[threading.Event](), count()

    def record(self) -> None:
        self.gates.append(threading.Event())
        self.queued.release()

    def wait(self) -> None:
        """The computing stream's, not the host's."""

    def synchronize(self) -> None:
        assert self.gates[next(self.numbers)].wait(WAIT)


def test_a_batch_is_queued_while_another_is_computed_and_a_third_waits_for_a_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine: Any = make_computing_engine(monkeypatch, [], most_tokens=16)
    done = Gates()
    for _ in range(2):
        slot = engine._slots.get()
        slot.done = engine._last.done = done
        engine._slots.put(slot)
    batches = [make_batch(lengths) for lengths in ([3, 4], [5], [1, 2])]
    with ThreadPoolExecutor(3) as pool:
        answers: list[Future[Any]] = []
        for ids, mask, _ in batches[:2]:
            answers.append(pool.submit(engine.embed, ids, mask))
            assert done.queued.acquire(timeout=WAIT)
        answers.append(pool.submit(engine.embed, *batches[2][:2]))
        assert not done.queued.acquire(timeout=0.1)
        done.gates[0].set()
        assert answers[0].result(WAIT).tolist() == batches[0][2]
        assert done.queued.acquire(timeout=WAIT)
        assert not answers[1].done()
        for gate in done.gates[1:]:
            gate.set()
        assert [answer.result(WAIT).tolist() for answer in answers[1:]] == [batch[2] for batch in batches[1:]]


def test_batches_of_many_runs_that_share_two_places_all_end(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_computing_engine(monkeypatch, [], most_tokens=16)
    rng = np.random.default_rng(0)
    batches = [make_batch(rng.integers(1, 16, size).tolist()) for size in rng.integers(1, 30, 60)]
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(engine.embed, ids, mask) for ids, mask, _ in batches]
        for answer, (_, _, expected) in zip(answers, batches, strict=True):
            assert answer.result(WAIT).tolist() == expected
    assert engine._slots.qsize() == 2


def test_a_batch_that_fails_gives_its_places_back(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = make_computing_engine(monkeypatch, [], most_tokens=16)
    whole, runs = engine._compute, count(1)

    def fail_every_fourth(integers: Any, shape: Any) -> torch.Tensor:
        if next(runs) % 4 == 0:
            raise RuntimeError("launch failed")
        vectors: torch.Tensor = whole(integers, shape)
        return vectors

    engine._compute = fail_every_fourth
    ids, mask, expected = make_batch([10, 12, 14])
    for _ in range(10):
        with pytest.raises(RuntimeError, match="launch failed"):
            engine.embed(*make_batch([9] * 5)[:2])
        assert engine._slots.qsize() == 2
    engine._compute = whole
    assert engine.embed(ids, mask).tolist() == expected


def test_a_gpu_that_is_lost_raises_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for it raises as well; nobody waits for a place that is never given back."""
    engine: Any = make_computing_engine(monkeypatch, [], most_tokens=16)

    def lose(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    engine._compute = lose
    monkeypatch.setattr(_Streams, "synchronize", lose)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            engine.embed(*make_batch([9] * 5)[:2])
        assert engine._slots.qsize() == 2


@pytest.mark.gpu
@NEEDS_GPU
def test_two_threads_get_what_one_gets(tmp_path: Path) -> None:
    from tests.serving.kernels.models import make_encoder
    from tests.serving.kernels.packs import TOKENS

    engine = CudaEngine(make_encoder(tmp_path), max_tokens=512)
    rng = np.random.default_rng(0)
    batches = [
        pad_batch([rng.integers(0, TOKENS, length) for length in rng.integers(1, 60, size)])
        for size in rng.integers(1, 40, 60)
    ]
    expected = [engine.embed(*batch) for batch in batches]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            answers = list(pool.map(lambda batch: engine.embed(*batch), batches))
            for answer, vectors in zip(answers, expected, strict=True):
                np.testing.assert_array_equal(answer, vectors)
    engine.close()
