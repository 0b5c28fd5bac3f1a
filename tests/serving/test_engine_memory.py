"""GPU memory that an engine took: summed where a model has several engines, and told in log, API and metrics."""

import asyncio
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from registry.manifest import read_manifest, write_manifest
from serving.api.system import describe_models
from serving.engines import memory_of
from serving.engines.onnxruntime import OnnxRuntimeEngine
from serving.engines.replicas import ReplicatedEngine
from serving.models import LoadedModel
from serving.opening import SwitchedEngine
from serving.settings import ModelSource
from serving.worker import Worker
from tests.serving.conftest import make_settings
from tests.serving.engines import FaultyEngine, WrappedEngine, die
from tests.serving.test_replicas import batch

WAIT = 20
ONE_ENGINE: dict[str, Any] = {"num_threads": 1, "num_instances": 1}  # measured, it may be a pair


class OnGpu(WrappedEngine):
    """An engine that says what it took."""

    memory_bytes = 1000


def test_memory_is_the_sum_of_what_engines_say(model: LoadedModel) -> None:
    silent, telling = WrappedEngine(model.engine), OnGpu(model.engine)
    assert memory_of(silent) is None
    assert memory_of(telling, silent, telling) == 2000
    assert SwitchedEngine(silent, silent).memory_bytes is None
    assert SwitchedEngine(silent, telling).memory_bytes == 1000


def test_memory_on_several_gpus_is_that_of_all_even_of_one_that_is_lost(model: LoadedModel) -> None:
    lost = FaultyEngine(model.engine, die)
    lost.memory_bytes = 500  # type: ignore[attr-defined]
    engine = ReplicatedEngine([lost, OnGpu(model.engine), OnGpu(model.engine)])
    assert engine.memory_bytes == 2500
    engine.embed(*batch(2, 6, 3))
    assert (engine.runtime[-14:], engine.memory_bytes) == ("on 2 of 3 GPUs", 2500)
    assert ReplicatedEngine([WrappedEngine(model.engine)]).memory_bytes is None


def test_memory_is_told_of_the_version_that_has_it(
    bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same version from another bundle, on an engine that says nothing, leaves no number behind."""
    caplog.set_level(logging.INFO)
    again = shutil.copytree(bundles / "v0", tmp_path / "again")
    manifest = read_manifest(again)
    write_manifest(again, manifest.model_copy(update={"model_id": "tests/rebuilt"}))

    async def main() -> None:
        worker = Worker(make_settings(bundles, models={"available": [{"path": bundles / "v0"} | ONE_ENGINE]}))

        def read() -> tuple[float | None, int | None]:
            labels = {"model": "tiny", "model_version": manifest.version}
            gauge = worker.metrics.registry.get_sample_value("akidb_engine_memory_bytes", labels)
            return gauge, describe_models(worker)[0]["engine_memory_bytes"]

        try:
            with monkeypatch.context() as patch:
                patch.setattr(OnnxRuntimeEngine, "memory_bytes", 4096, raising=False)
                await asyncio.wait_for(worker.load(), WAIT)
                assert read() == (4096, 4096)
            await asyncio.wait_for(worker.swap(ModelSource(path=again, **ONE_ENGINE)), WAIT)
            assert read() == (None, None)
        finally:
            worker.close()

    asyncio.run(main())
    loaded = [record.getMessage() for record in caplog.records if record.getMessage().startswith("loaded ")]
    assert [line.rpartition(" ")[2] for line in loaded] == ["memory_bytes=4096", "memory_bytes=None"]
