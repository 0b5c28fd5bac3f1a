"""One engine on each of several GPUs. The engines are real or stand in for the cuda engine; the GPUs are not there."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from registry.manifest import EngineEntry, digest_of, read_manifest
from serving.autotune import Setup
from serving.engines import Embeddings, Engine, open_engine
from serving.engines.replicas import ReplicatedEngine, open_on_devices
from serving.errors import EngineUnavailable
from serving.models import LoadedModel, load_model
from serving.opening import Opener
from serving.settings import ModelSource
from serving.texts import EmbedRequest
from serving.tokenizer import Ids
from serving.worker import Worker
from tests.serving.conftest import make_settings, serve, with_engine
from tests.serving.engines import FaultyEngine, HeldEngine, WrappedEngine, die, raise_on
from tests.serving.test_models import copy_bundle, engine_entries, rewrite

CAT, WAIT = 12, 20


def batch(*ids: int) -> tuple[Ids, Ids]:
    rows = np.array([ids])
    return rows, np.ones_like(rows)


def test_each_batch_goes_to_an_engine_that_has_nothing_to_do(model: LoadedModel) -> None:
    held = [HeldEngine(model.engine) for _ in range(3)]
    engine = ReplicatedEngine(held)
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(engine.embed, *batch(2, 6, 3)) for _ in range(4)]
        for each in held:
            assert each.entered.wait(WAIT)
        assert [len(each.shapes) for each in held] == [0, 0, 0]
        for each in held:
            each.gate.set()
        answers = [future.result(WAIT) for future in running]
    assert sum(len(each.shapes) for each in held) == 4
    for answer in answers:
        np.testing.assert_array_equal(answer, answers[0])


def test_lone_batches_keep_to_one_engine(model: LoadedModel) -> None:
    engines = [WrappedEngine(model.engine) for _ in range(2)]
    engine = ReplicatedEngine(engines)
    for _ in range(5):
        engine.embed(*batch(2, 6, 3))
    assert [len(each.shapes) for each in engines] == [5, 0]


def test_engine_that_fails_where_another_answers_gets_no_more_batches(
    model: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = FaultyEngine(model.engine, die), WrappedEngine(model.engine)
    engine = ReplicatedEngine([bad, good])
    assert engine.runtime == f"{model.engine.runtime} on 2 of 2 GPUs"
    for _ in range(3):
        np.testing.assert_array_equal(engine.embed(*batch(2, 6, 3)), model.engine.embed(*batch(2, 6, 3)))
    assert (len(bad.shapes), len(good.shapes)) == (1, 3)
    assert engine.runtime.endswith(" on 1 of 2 GPUs")
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [
        "engine gets no more batches gpu=0 left=1 error=RuntimeError"
    ]
    engine.close()
    assert (bad.is_closed, good.is_closed) == (False, True)


def test_version_that_lost_a_gpu_leaves_no_series_behind(bundles: Path) -> None:
    """What its engine is called has changed meanwhile."""

    async def main() -> bytes:
        worker = Worker(make_settings(bundles / "v0"))
        loaded = load_model(ModelSource(path=bundles / "v0"))
        engine = ReplicatedEngine([FaultyEngine(loaded.engine, die), loaded.engine])
        worker.add(with_engine(loaded, engine))
        await worker.resolve(None).embed(EmbedRequest(["red cat"], is_single=True, param="text"))
        assert engine.runtime.endswith(" on 1 of 2 GPUs")
        await worker.swap(ModelSource(path=bundles / "v1"))
        worker.close()
        return worker.metrics.render()

    shown = [line for line in asyncio.run(main()).splitlines() if line.startswith(b"akidb_model_info{")]
    assert len(shown) == 1
    assert digest_of(bundles / "v1").encode() in shown[0]


def test_batch_that_every_engine_raises_on_costs_none_of_them(model: LoadedModel) -> None:
    """Both wait for the other at the same time."""
    together = threading.Barrier(2, timeout=WAIT)
    num_first = 0

    def poison(input_ids: Ids, embeddings: Embeddings) -> Embeddings:
        nonlocal num_first
        if (input_ids == CAT).any():
            num_first += 1
            if num_first <= 2:
                together.wait()
            raise RuntimeError("poison")
        return embeddings

    engine = ReplicatedEngine([FaultyEngine(model.engine, poison) for _ in range(2)])
    with ThreadPoolExecutor(2) as pool:
        failing = [pool.submit(engine.embed, *batch(2, CAT, 3)) for _ in range(2)]
        assert all(isinstance(future.exception(WAIT), RuntimeError) for future in failing)
    assert engine.embed(*batch(2, 6, 3)).shape == (1, 8)
    assert engine.runtime.endswith(" on 2 of 2 GPUs")


def test_last_engine_s_failures_are_its_own(model: LoadedModel) -> None:
    engine = ReplicatedEngine([FaultyEngine(model.engine, die), FaultyEngine(model.engine, raise_on(CAT))])
    assert engine.embed(*batch(2, 6, 3)).shape == (1, 8)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="poison"):
            engine.embed(*batch(2, CAT, 3))
    assert engine.embed(*batch(2, 6, 3)).shape == (1, 8)


def test_memory_limit_is_the_least_of_those_learned(model: LoadedModel) -> None:
    engines = [WrappedEngine(model.engine) for _ in range(3)]
    engine = ReplicatedEngine(engines)
    assert engine.memory_limit_tokens is None
    for each, limit in zip(engines, (None, 4096, 1024), strict=True):
        each.memory_limit_tokens = limit  # type: ignore[attr-defined]
    assert engine.memory_limit_tokens == 1024


class FakeCuda:
    """CUDA with `count` GPUs, of which one is current."""

    def __init__(self, patch: pytest.MonkeyPatch, count: int) -> None:
        self.current = 0
        patch.setattr("torch.cuda.device_count", lambda: count)
        patch.setattr("torch.cuda.device", self._use)

    @contextmanager
    def _use(self, device: int) -> Iterator[None]:
        before, self.current = self.current, device
        yield
        self.current = before


class OnGpu(WrappedEngine):
    """Stands in for the cuda engine on the current GPU."""

    def __init__(self, inner: Engine, device: int) -> None:
        super().__init__(inner)
        self.device = device

    @property
    def runtime(self) -> str:
        return "cuda 13.0"


@pytest.fixture
def opened(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> list[OnGpu]:
    """What was opened in place of cuda engines, on a machine with two GPUs."""
    cuda, engines = FakeCuda(monkeypatch, 2), []  # type: ignore[var-annotated]

    def open_one(path: Path, compute: str, max_tokens: int) -> OnGpu:
        engines.append(OnGpu(model.engine, cuda.current))
        return engines[-1]

    monkeypatch.setattr("serving.engines.cuda.CudaEngine", open_one)
    return engines


def entry() -> EngineEntry:
    return EngineEntry(runtime="cuda", file="model.safetensors", sha256="0" * 64, size=1, compute="f16")


def test_engine_is_opened_on_each_gpu_asked_for(opened: list[OnGpu], tmp_path: Path) -> None:
    engine = open_engine(tmp_path, entry(), devices=(1, 0))
    assert ([each.device for each in opened], engine.runtime) == ([1, 0], "cuda 13.0 on 2 of 2 GPUs")
    assert open_engine(tmp_path, entry(), devices=(1,)) is opened[2]
    assert opened[2].device == 1
    assert open_engine(tmp_path, entry()) is opened[3]
    with pytest.raises(EngineUnavailable, match=r"embedding\.multi_gpu\.devices has 2, CUDA shows GPUs 0 to 1"):
        open_engine(tmp_path, entry(), devices=(0, 2))
    assert len(opened) == 4


def test_engines_are_closed_where_one_of_them_does_not_open(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, first = FakeCuda(monkeypatch, 2), WrappedEngine(model.engine)

    def open_one() -> Engine:
        if cuda.current == 1:
            raise EngineUnavailable("the GPU has no memory")
        return first

    with pytest.raises(EngineUnavailable, match="no memory"):
        open_on_devices(open_one, (0, 1))
    assert first.is_closed


def test_machine_without_a_gpu_says_so_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch, 0)

    def open_one() -> Engine:
        raise EngineUnavailable("no NVIDIA GPU")

    with pytest.raises(EngineUnavailable, match="no NVIDIA GPU"):
        open_on_devices(open_one, (0, 1))


@pytest.fixture
def cuda_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A bundle with a cuda engine, as the manifest says, and another one."""
    folder = copy_bundle(bundle, tmp_path)
    rewrite(folder, engines=engine_entries(folder, "cuda", "onnxruntime"))
    return folder


def test_worker_runs_a_batch_on_each_gpu_at_the_same_time(cuda_bundle: Path, opened: list[OnGpu]) -> None:
    own = load_model(ModelSource(path=cuda_bundle), devices=(0, 1))
    assert own.choice.large == Setup("cuda", own.choice.large.num_threads, 2)
    held = [HeldEngine(each) for each in opened]
    prepared = replace(own, engine=ReplicatedEngine(held), reopen=None, open_spare=None)
    with serve(make_settings(cuda_bundle), prepared) as (url, _), ThreadPoolExecutor(2) as clients:
        running = [
            clients.submit(httpx.post, f"{url}/api/v1/embed", json={"text": text}, timeout=WAIT)
            for text in ("red cat", "blue dog")
        ]
        for each in held:
            assert each.entered.wait(WAIT)
        for each in held:
            each.gate.set()
        assert [future.result().status_code for future in running] == [200, 200]
        (described,) = httpx.get(f"{url}/api/v1/models").json()["models"]
    assert (described["engine"], described["engine_setup"][:7]) == ("cuda 13.0 on 2 of 2 GPUs", "cuda:2x")


def test_engines_are_opened_anew_on_the_same_gpus(cuda_bundle: Path, opened: list[OnGpu]) -> None:
    own = load_model(ModelSource(path=cuda_bundle), devices=(0, 1))
    assert own.reopen is not None
    assert own.reopen().runtime == own.engine.runtime
    assert [each.device for each in opened] == [0, 1, 0, 1]


def test_setting_without_effect_is_said(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    opener = Opener(ModelSource(path=bundle), read_manifest(bundle), lambda *_: None, devices=(0, 1))
    assert "embedding.multi_gpu is for the cuda engine alone model=tiny" in caplog.text
    best = opener.open_best(digest_of(bundle), [np.full(3, 6)])
    best.engine.close()
    assert best.choice.large.runtime == "onnxruntime"
