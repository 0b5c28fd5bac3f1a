"""A bundle that changes on disk is swapped in, once it stands still; one that is damaged is refused once."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from registry.manifest import digest_of
from serving.settings import ModelSource
from serving.sources import fingerprint
from serving.watch import Watcher
from serving.worker import Worker
from tests.serving.conftest import make_settings

WAIT = 20


class Ticks:
    """A clock that the test moves: `tick` lets the watcher look once and returns when it has."""

    def __init__(self) -> None:
        self._go, self._looked = asyncio.Semaphore(0), asyncio.Semaphore(0)
        self.intervals: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.intervals.append(seconds)
        self._looked.release()
        await self._go.acquire()

    async def tick(self) -> None:
        self._go.release()
        await self._looked.acquire()


def follow(path: Path, body: Callable[[Worker, Ticks], Awaitable[None]]) -> Worker:
    """Run `body` on a worker that serves and watches `path`."""

    async def main() -> Worker:
        worker, ticks = Worker(make_settings(path)), Ticks()
        watcher = Watcher(worker.swap, 5)
        try:
            handled = fingerprint(path)
            await worker.load()
            watcher.follow(ModelSource(path=path), "tiny", handled)
            watching = asyncio.create_task(watcher.run(ticks.sleep))
            await ticks._looked.acquire()
            await asyncio.wait_for(body(worker, ticks), WAIT)
            assert set(ticks.intervals) == {5}
            assert not watching.done()
            watching.cancel()
        finally:
            worker.close()
        return worker

    return asyncio.run(main())


def digest(worker: Worker) -> str:
    return worker.resolve(None).model.digest


def failures(worker: Worker) -> float | None:
    return worker.metrics.registry.get_sample_value("akidb_model_load_failures_total", {"model": "tiny"})


def test_line_that_names_another_bundle_swaps_it_in(bundles: Path, tmp_path: Path) -> None:
    pointer = tmp_path / "current"
    pointer.write_text(str(bundles / "v0"))

    async def body(worker: Worker, ticks: Ticks) -> None:
        before = worker.resolve(None)
        await ticks.tick()
        pointer.write_text(f"{bundles / 'v1'}\n")
        await ticks.tick()
        assert worker.resolve(None) is before  # it may still be written
        await ticks.tick()
        assert digest(worker) == digest_of(bundles / "v1")
        after = worker.resolve(None)
        for _ in range(3):
            await ticks.tick()
        assert worker.resolve(None) is after

    follow(pointer, body)


def test_folder_whose_bundle_is_exchanged_is_swapped_in(bundles: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundles / "v0", folder)

    async def body(worker: Worker, ticks: Ticks) -> None:
        folder.rename(tmp_path / "old")
        await ticks.tick()
        shutil.copytree(bundles / "v2", folder)
        await ticks.tick()
        await ticks.tick()
        assert digest(worker) == digest_of(bundles / "v2")

    assert failures(follow(folder, body)) is None


@pytest.mark.parametrize(("name", "reason"), [("damaged", "has digest"), ("other", "of model other, not of tiny")])
def test_bundle_that_cannot_be_served_is_refused_once_and_the_old_one_serves_on(
    bundles: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, reason: str
) -> None:
    pointer = tmp_path / "current"
    pointer.write_text(str(bundles / "v0"))

    async def body(worker: Worker, ticks: Ticks) -> None:
        before = worker.resolve(None)
        pointer.write_text(str(bundles / name))
        for _ in range(5):
            await ticks.tick()
        assert worker.resolve(None) is before
        assert worker.is_ready
        pointer.write_text(str(bundles / "v1"))
        for _ in range(2):
            await ticks.tick()
        assert digest(worker) == digest_of(bundles / "v1")

    worker = follow(pointer, body)
    assert [record.levelname for record in caplog.records if reason in record.getMessage()] == ["ERROR"]
    labels = {"model": "tiny" if name == "damaged" else "other"}
    assert worker.metrics.registry.get_sample_value("akidb_model_load_failures_total", labels) == 1


def test_defect_in_one_swap_does_not_end_the_watch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        swapped = []

        async def swap(source: ModelSource, model: str) -> None:
            swapped.append(model)
            raise RuntimeError("a defect")

        watcher, ticks = Watcher(swap, 1), Ticks()
        watcher.follow(ModelSource(path=tmp_path), "tiny", "something else")
        watching = asyncio.create_task(watcher.run(ticks.sleep))
        await ticks._looked.acquire()
        for number in range(1, 3):
            (tmp_path / f"file{number}").write_text("x")
            await ticks.tick()
            await ticks.tick()
            assert len(swapped) == number
        watching.cancel()

    asyncio.run(main())
    assert caplog.text.count("watched bundle failed model=tiny") == 2


def test_worker_watches_when_the_settings_say_so(bundles: Path, tmp_path: Path) -> None:
    pointer = tmp_path / "current"
    pointer.write_text(str(bundles / "v0"))

    async def main() -> None:
        models = {"available": [{"path": pointer}], "watch_seconds": 0.01}
        worker = Worker(make_settings(pointer, models=models))
        await worker.load()
        pointer.write_text(str(bundles / "v1"))
        wanted = digest_of(bundles / "v1")

        async def wait() -> None:
            while digest(worker) != wanted:
                await asyncio.sleep(0)

        await asyncio.wait_for(wait(), WAIT)
        worker.refuse()
        worker.close()

    asyncio.run(main())
