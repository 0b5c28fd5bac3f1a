import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.errors import (
    ClientGone,
    DeadlineExceeded,
    EngineFailed,
    InputTooLong,
    InvalidRequest,
    NotReady,
    Overloaded,
    RequestTooLarge,
)
from serving.latency_model import Run
from serving.metrics import Metrics
from serving.models import LoadedModel
from serving.service import EmbeddingService
from serving.texts import EmbedRequest, shorten
from tests.bundles import WORDS
from tests.serving.conftest import keep_open, make_settings, with_engine
from tests.serving.engines import FaultyEngine, HeldEngine, WrappedEngine, raise_on

CAT = 12
WAIT = 10
DISTINCT = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS][:500]


def ask(*texts: str, **options: Any) -> EmbedRequest:
    return EmbedRequest(list(texts), is_single=len(texts) == 1, param="texts", **options)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Bench:
    """A service on its own loop, with a clock the test moves."""

    bundle: Path
    model: LoadedModel
    batching: dict[str, float] | None = None
    cache_bytes: int = 0

    def run(self, body: Callable[[EmbeddingService, Clock], Awaitable[None]]) -> Metrics:
        metrics, clock = Metrics(), Clock()

        async def main() -> None:
            settings = make_settings(
                self.bundle, request_timeout_seconds=5, batching=self.batching or {}, cache_bytes=self.cache_bytes
            )
            service = EmbeddingService(keep_open(self.model), settings, metrics.for_model("tiny", "1", "fp32"), clock)
            service.start()
            try:
                await asyncio.wait_for(body(service, clock), WAIT)
            finally:
                service.close()

        asyncio.run(main())
        return metrics


async def wait_for(event: Any) -> None:
    assert await asyncio.to_thread(event.wait, WAIT)


def test_batch_equals_its_singles(bundle: Path, model: LoadedModel) -> None:
    texts = ["hello", "red cat runs", "one two three four five six", "world " * 12]

    async def body(service: EmbeddingService, _: Clock) -> None:
        batch = await service.embed(ask(*texts))
        singles = [(await service.embed(ask(text))).vectors[0] for text in texts]
        np.testing.assert_allclose(batch.vectors, singles, rtol=1e-5, atol=1e-6)  # direction and norm
        assert batch.num_tokens == 3 + 5 + 8 + 14

    Bench(bundle, model).run(body)


def test_dimensions_keep_the_first_values_at_unit_length(bundle: Path, model: LoadedModel) -> None:
    async def body(service: EmbeddingService, _: Clock) -> None:
        full = (await service.embed(ask("red cat"))).vectors[0]
        cut = (await service.embed(ask("red cat", dimensions=3))).vectors[0]
        np.testing.assert_allclose(cut, full[:3] / np.linalg.norm(full[:3]), rtol=1e-6)
        same = (await service.embed(ask("red cat", dimensions=8))).vectors[0]
        assert same.tolist() == full.tolist()
        for wrong in (0, 9, -1):
            with pytest.raises(InvalidRequest, match=f"dimensions is {wrong}, limits 1 and 8"):
                await service.embed(ask("red", dimensions=wrong))

    Bench(bundle, model).run(body)


def test_shorten_leaves_a_zero_vector_finite() -> None:
    assert shorten(np.zeros((1, 4), dtype=np.float32), 2).tolist() == [[0, 0]]


def test_prompt_is_put_before_each_text(bundle: Path, model: LoadedModel) -> None:
    async def body(service: EmbeddingService, _: Clock) -> None:
        prompted = await service.embed(ask("cat", "dog", prompt="query"))
        spelled = await service.embed(ask("red cat", "red dog"))
        assert prompted.vectors.tolist() == spelled.vectors.tolist()
        with pytest.raises(InvalidRequest, match="query"):
            await service.embed(ask("cat", prompt="passage"))

    Bench(bundle, model).run(body)


@pytest.mark.parametrize("count", [1, 100])
def test_long_text_is_cut_or_refused(bundle: Path, model: LoadedModel, count: int) -> None:
    texts = ["hello"] * (count - 1) + ["world " * 40]

    async def body(service: EmbeddingService, _: Clock) -> None:
        assert (await service.embed(ask(*texts))).num_tokens == 3 * (count - 1) + 16
        with pytest.raises(InputTooLong, match=f"text {count - 1} has 42 tokens, limit 16") as raised:
            await service.embed(ask(*texts, truncate=False))
        assert raised.value.param == "texts"

    Bench(bundle, model).run(body)


def test_request_larger_than_every_limit_is_split(bundle: Path, model: LoadedModel) -> None:
    engine = WrappedEngine(model.engine)

    async def body(service: EmbeddingService, _: Clock) -> None:
        embedded = await service.embed(ask(*DISTINCT))
        assert embedded.vectors.shape == (500, 8)

    batching = {"max_batch_size": 16, "max_queue_size": 20, "max_queue_tokens": 50}
    Bench(bundle, with_engine(model, engine), batching).run(body)
    assert max(size for size, _ in engine.shapes) == 16


def test_request_that_must_time_out_is_refused_at_once(bundle: Path, model: LoadedModel) -> None:
    """At 10 ms a token, as learned, hardly 500 tokens fit into the timeout of 5 s."""
    engine = WrappedEngine(model.engine)
    slow = replace(model.cost, runs=tuple(Run(tokens, 0.01 * tokens) for tokens in (10, 100)))

    async def body(service: EmbeddingService, _: Clock) -> None:
        with pytest.raises(RequestTooLarge, match=r"2500 tokens, .* 25 s, limit 5 s: send at most (249|250) in"):
            await service.embed(ask(*DISTINCT))
        assert engine.shapes == []
        assert len((await service.embed(ask(*DISTINCT[:90]))).vectors) == 90
        same = await service.embed(ask(*[DISTINCT[0]] * 500))  # one row for the engine
        assert same.num_tokens == 2500

    Bench(bundle, replace(with_engine(model, engine), cost=slow)).run(body)


def test_overloaded_when_the_queue_it_finds_is_full(bundle: Path, model: LoadedModel) -> None:
    engine = HeldEngine(model.engine)

    async def body(service: EmbeddingService, _: Clock) -> None:
        running = asyncio.create_task(service.embed(ask("red")))
        await wait_for(engine.entered)
        queued = [asyncio.create_task(service.embed(ask(*texts))) for texts in (DISTINCT[:4], *zip(DISTINCT[4:8]))]
        await asyncio.sleep(0)
        for request in (ask("red"), ask(*["red"] * 100)):
            with pytest.raises(Overloaded) as raised:
                await service.embed(request)
            assert raised.value.retry_after_seconds >= 1
        engine.gate.set()
        await asyncio.gather(running, *queued)
        await service.embed(ask("red"))

    Bench(bundle, with_engine(model, engine), {"max_queue_size": 4}).run(body)


def test_deadline_fails_the_request_and_the_engine_counts_as_stuck(bundle: Path, model: LoadedModel) -> None:
    engine = HeldEngine(model.engine)

    async def body(service: EmbeddingService, clock: Clock) -> None:
        stuck = asyncio.create_task(service.embed(ask("red")))
        await wait_for(engine.entered)
        assert service.is_healthy()
        clock.now = 5.01
        with pytest.raises(DeadlineExceeded, match="within 5 s"):
            await stuck
        assert not service.is_healthy()
        with pytest.raises(NotReady, match="does not answer"):
            await service.embed(ask("red"))
        engine.gate.set()

    Bench(bundle, with_engine(model, engine)).run(body)


def test_work_of_a_client_that_hangs_up_is_dropped(bundle: Path, model: LoadedModel) -> None:
    engine = HeldEngine(model.engine)

    async def body(service: EmbeddingService, clock: Clock) -> None:
        hung_up = asyncio.Event()

        async def receive() -> dict[str, str]:
            await hung_up.wait()
            return {"type": "http.disconnect"}

        running = asyncio.create_task(service.embed(ask("red")))
        await wait_for(engine.entered)
        gone = asyncio.create_task(service.embed(ask("cat", "dog"), receive))
        await asyncio.sleep(0)
        clock.now = 1.0  # long enough for the client to be watched
        hung_up.set()
        with pytest.raises(ClientGone):
            await gone
        engine.gate.set()
        await running
        await service.embed(ask("blue"))

    Bench(bundle, with_engine(model, engine)).run(body)
    assert sum(size for size, _ in engine.shapes) == 2


def test_cancelled_request_leaves_no_work(bundle: Path, model: LoadedModel) -> None:
    engine = HeldEngine(model.engine)

    async def body(service: EmbeddingService, _: Clock) -> None:
        running = asyncio.create_task(service.embed(ask("red")))
        await wait_for(engine.entered)
        cancelled = asyncio.create_task(service.embed(ask("cat", "dog")))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        engine.gate.set()
        await running

    Bench(bundle, with_engine(model, engine)).run(body)
    assert sum(size for size, _ in engine.shapes) == 1


def test_poison_text_fails_its_request_and_names_its_place(bundle: Path, model: LoadedModel) -> None:
    engine = HeldEngine(FaultyEngine(model.engine, raise_on(CAT)))

    async def body(service: EmbeddingService, _: Clock) -> None:
        running = asyncio.create_task(service.embed(ask("red")))
        await wait_for(engine.entered)
        poisoned = asyncio.create_task(service.embed(ask("red", "cat", "dog")))
        healthy = asyncio.create_task(service.embed(ask("blue", "dog")))
        await asyncio.sleep(0)
        engine.gate.set()
        with pytest.raises(EngineFailed, match=r"^text 1: "):
            await poisoned
        assert (await healthy).vectors.shape == (2, 8)
        await running

    Bench(bundle, with_engine(model, engine)).run(body)


def test_batches_are_counted(bundle: Path, model: LoadedModel) -> None:
    async def body(service: EmbeddingService, _: Clock) -> None:
        await service.embed(ask("red cat", "dog"))

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, {"model": "tiny", "model_version": "1"} | labels)

    metrics = Bench(bundle, model).run(body)
    assert value("akidb_tokens_total") == 7
    runs = value("akidb_engine_seconds_count", precision="fp32", tokens="64")
    assert runs == value("akidb_batch_size_count")
    assert value("akidb_batch_size_sum") == 2
    assert value("akidb_queue_depth") == value("akidb_queue_tokens") == 0


def test_validation_compares_the_live_engine_with_the_teacher(bundle: Path, model: LoadedModel) -> None:
    async def body(service: EmbeddingService, _: Clock) -> None:
        cosines = await service.validate()
        assert cosines.shape == (64,)
        np.testing.assert_allclose(cosines, 1, atol=1e-6)

    Bench(bundle, model).run(body)


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, {"model": "tiny", "model_version": "1"} | labels)


def test_request_that_would_wait_longer_than_the_objective_is_refused_before_it_is_tokenised(
    bundle: Path, model: LoadedModel
) -> None:
    engine = HeldEngine(model.engine)

    async def body(service: EmbeddingService, _: Clock) -> None:
        running = asyncio.create_task(service.embed(ask("red")))
        await wait_for(engine.entered)
        waiting = asyncio.create_task(service.embed(ask("blue")))  # no text is due before it
        await asyncio.sleep(0)
        for texts in (["green"], ["green"] * 100):
            with pytest.raises(Overloaded, match="a wait of 0 ms"):
                await service.embed(ask(*texts, truncate=False))
        with pytest.raises(Overloaded):
            await service.embed(ask("hello " * 1000, truncate=False))
        engine.gate.set()
        await asyncio.gather(running, waiting)
        await service.embed(ask("green"))

    Bench(bundle, with_engine(model, engine), {"latency_objective_ms": 0.001}).run(body)


def test_identical_texts_that_wait_are_computed_once(bundle: Path, model: LoadedModel) -> None:
    engine = HeldEngine(model.engine)

    async def body(service: EmbeddingService, _: Clock) -> None:
        running = asyncio.create_task(service.embed(ask("red")))
        await wait_for(engine.entered)
        twins = [asyncio.create_task(service.embed(ask("cat", "dog"))) for _ in range(5)]
        late = asyncio.create_task(service.embed(ask("red")))  # shares the row that runs already
        await asyncio.sleep(0)
        twins[0].cancel()
        engine.gate.set()
        answers = await asyncio.gather(*twins[1:])
        expected = (await service.embed(ask("cat", "dog"))).vectors
        for answer in answers:
            assert answer.vectors.tolist() == expected.tolist()
            assert answer.num_tokens == 6
        assert (await late).vectors.tolist() == (await running).vectors.tolist()

    metrics = Bench(bundle, with_engine(model, engine)).run(body)
    assert sum(size for size, _ in engine.shapes) == 1 + 2 + 2
    assert sample(metrics, "akidb_shared_texts_total") == 9


def test_cache_answers_texts_seen_before_but_not_the_validation(bundle: Path, model: LoadedModel) -> None:
    engine = WrappedEngine(model.engine)

    async def body(service: EmbeddingService, _: Clock) -> None:
        first = await service.embed(ask("cat", "dog"))
        second = await service.embed(ask("dog", "red", "cat", "dog"))
        assert second.vectors[[2, 0]].tolist() == first.vectors.tolist()
        assert second.vectors[3].tolist() == first.vectors[1].tolist()
        again = await service.embed(ask("red"))
        assert again.vectors[0].tolist() == second.vectors[1].tolist()
        assert again.num_tokens == 3
        assert sum(size for size, _ in engine.shapes) == 3
        await service.validate()
        await service.validate()
        assert sum(size for size, _ in engine.shapes) == 3 + 2 * 64

    metrics = Bench(bundle, with_engine(model, engine), cache_bytes=100_000).run(body)
    assert sample(metrics, "akidb_cache_lookups_total", result="hit") == 4
    assert sample(metrics, "akidb_cache_lookups_total", result="miss") == 3


def test_failed_text_is_counted_and_not_kept(bundle: Path, model: LoadedModel) -> None:
    engine = FaultyEngine(model.engine, raise_on(CAT))

    async def body(service: EmbeddingService, _: Clock) -> None:
        for _ in range(2):
            with pytest.raises(EngineFailed):
                await service.embed(ask("cat"))

    metrics = Bench(bundle, with_engine(model, engine), cache_bytes=100_000).run(body)
    assert sample(metrics, "akidb_engine_failed_texts_total") == 2
    assert sample(metrics, "akidb_cache_lookups_total", result="hit") == 0
