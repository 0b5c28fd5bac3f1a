"""The worker under load: overload, drain, faults and a long run. What it does is asserted, never how fast."""

import asyncio
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from benchmarks.clients import LOST, REFUSED, Target
from benchmarks.load import (
    LoadResult,
    constant_arrivals,
    render_post,
    run_closed,
    run_load,
    run_open,
)
from registry.manifest import read_manifest
from serving.models import LoadedModel, load_model
from serving.settings import ModelSource
from tests.bundles import GOLDEN_TEXTS, make_bundle
from tests.serving.conftest import make_settings, serve, with_engine
from tests.serving.engines import FaultyEngine, HeldEngine, nan_on, raise_on
from tests.worker import RunningWorker, run_worker

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

CAT = 12  # the id of "cat" in the tiny bundle's vocabulary
CLIENTS = 32


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    make_bundle(folder)
    return folder


def render(url: str, texts: Sequence[str]) -> list[bytes]:
    return [render_post(f"{url}/api/v1/embed", {"text": text}) for text in texts]


def closed(url: str, texts: Sequence[str], num_requests: int, clients: int = CLIENTS) -> LoadResult:
    load = run_closed(Target.of(url), render(url, texts), clients=clients, num_requests=num_requests)
    return run_load(load)


def get(url: str, path: str) -> httpx.Response:
    return httpx.get(url + path, trust_env=False)


def test_overload_is_answered_200_or_429_and_service_is_normal_afterwards(fp32_bundle: Path) -> None:
    queue = ("--batching-max-queue-size", "64", "--batching-max-batch-size", "8")
    with run_worker(fp32_bundle, *queue) as worker:
        url = worker.base_url
        texts = [f"sentence number {index} about the weather in the mountains" for index in range(500)]
        load = run_open(Target.of(url), render(url, texts), constant_arrivals(1500, 4), connections=512)
        result = run_load(load)
        assert set(result.statuses.tolist()) == {200, 429}
        assert result.num_unguided == 0, "every 429 says when to come back"
        assert closed(url, texts, 50, clients=1).count(200) == 50
        assert get(url, "/readyz").status_code == 200
        metrics = get(url, "/metrics").text
    manifest = read_manifest(fp32_bundle)
    labels = f'error="overloaded",model="{manifest.model_name}",model_version="{manifest.version}"'
    assert f"akidb_embed_errors_total{{{labels}}} {float(result.count(429))}" in metrics


def test_sigterm_under_load_answers_every_accepted_request_and_readiness_fails_first(bundle: Path) -> None:
    with run_worker(bundle, "--drain-grace-seconds", "2") as worker:
        result, unready_at = run_load(_terminate_under_load(worker))
        assert worker.process.wait(30) == 0
    before = result.sent < unready_at
    assert before.sum() > CLIENTS
    assert set(result.statuses[before].tolist()) == {200}
    # Of those sent later none got half an answer or an error page: they were served, told so, or met a closed door.
    assert set(result.statuses.tolist()) <= {200, 503, LOST, REFUSED}


async def _terminate_under_load(worker: RunningWorker) -> tuple[LoadResult, float]:
    """Clients ask all the time, SIGTERM arrives in the middle. The time: when readiness was seen to fail."""
    url = worker.base_url
    requests = render(url, GOLDEN_TEXTS)
    clock = asyncio.get_running_loop().time
    started = clock()
    load = asyncio.create_task(run_closed(Target.of(url), requests, clients=CLIENTS, seconds=60, clock=clock))
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        while "akidb_batch_size_count" not in (await client.get("/metrics")).text:
            await asyncio.sleep(0)
        worker.process.send_signal(signal.SIGTERM)
        while (await client.get("/readyz")).status_code == 200:
            await asyncio.sleep(0)
        unready_at = clock() - started
        reply = await client.post("/api/v1/embed", json={"text": "red"})
        assert reply.status_code == 200, "unready, yet still answering: routers need the time to look away"
    return await load, unready_at


def test_drain_answers_requests_whose_texts_still_wait(fp32_bundle: Path) -> None:
    """Minutes of work for the engine in a few requests: all of them are answered although the signal came first."""
    with run_worker(fp32_bundle, "--batching-latency-objective-ms", "60000") as worker:
        url = f"{worker.base_url}/api/v1/embed"
        texts = [f"text {index} of a long list that the engine needs a while for" for index in range(8 * 128)]
        bodies = [render_post(url, {"texts": texts[start : start + 128]}) for start in range(0, len(texts), 128)]
        result = run_load(_drain(worker, bodies))
        assert worker.process.wait(60) == 0
    assert list(result.statuses) == [200] * 8


async def _drain(worker: RunningWorker, bodies: list[bytes]) -> LoadResult:
    target = Target.of(worker.base_url)
    load = asyncio.create_task(run_closed(target, bodies, clients=len(bodies), num_requests=len(bodies)))
    async with httpx.AsyncClient(base_url=worker.base_url, trust_env=False) as client:
        while _gauge((await client.get("/metrics")).text, "akidb_queue_depth") < 512:
            assert not load.done(), "the queue never held 512 texts"
            await asyncio.sleep(0)
    worker.process.send_signal(signal.SIGTERM)
    return await load


def _gauge(page: str, name: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(f"{name}{{"))


@contextmanager
def faulty(bundle: Path, fault: object, **settings: object) -> Iterator[tuple[str, HeldEngine]]:
    """A worker whose engine has `fault`; its engine computes only while `gate` is set, which it is."""
    model: LoadedModel = load_model(ModelSource(path=bundle))
    engine = HeldEngine(FaultyEngine(model.engine, fault))  # type: ignore[arg-type]
    engine.gate.set()
    with serve(make_settings(bundle, **settings), with_engine(model, engine)) as (url, _):
        yield url, engine


@pytest.mark.parametrize("fault", [raise_on(CAT), nan_on(CAT)], ids=["raises", "not-finite"])
def test_engine_that_fails_on_a_text_hurts_that_request_only(bundle: Path, fault: object) -> None:
    texts = ["one cat" if index % 20 == 7 else GOLDEN_TEXTS[index % 8] for index in range(400)]
    assert sum("cat" in text for text in texts) == 20
    with faulty(bundle, fault) as (url, _):
        result = closed(url, texts, 2000)
        assert result.count(500) == 100
        assert result.count(200) == 1900
        assert closed(url, GOLDEN_TEXTS[:8], 100).count(200) == 100
        assert get(url, "/healthz").status_code == 200


def test_engine_that_hangs_costs_its_requests_a_504_and_health_tells(bundle: Path) -> None:
    def no_fault(_: object, embeddings: np.ndarray) -> np.ndarray:
        return embeddings

    with faulty(bundle, no_fault, request_timeout_seconds=0.3) as (url, engine):
        assert closed(url, GOLDEN_TEXTS, 64).count(200) == 64
        engine.gate.clear()
        stuck = closed(url, GOLDEN_TEXTS, CLIENTS)
        assert set(stuck.statuses.tolist()) <= {503, 504}
        assert stuck.count(504) >= 1
        engine.gate.set()
        while get(url, "/readyz").status_code != 200:
            pass
        assert closed(url, GOLDEN_TEXTS, 64).count(200) == 64


def test_soak_keeps_memory_flat(bundle: Path) -> None:
    """20,000 requests; the first tenth fills what a process fills once."""
    with run_worker(bundle) as worker:
        url, process = worker.base_url, psutil.Process(worker.process.pid)
        texts = [
            f"{first} {second} {third}" for first in GOLDEN_TEXTS for second, third in (("red", "dog"), ("one", ""))
        ]
        assert closed(url, texts, 2000).count(200) == 2000
        before = process.memory_info().rss
        assert closed(url, texts, 18_000).count(200) == 18_000
        assert process.memory_info().rss <= 1.05 * before
