"""Several models and versions in one worker: load, swap, drain, unload, weights, and what a failure leaves alone."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from registry.signing import make_keys, sign
from serving.app import create_app
from serving.autotune import Choice
from serving.errors import ChangeRefused, ConfigInvalid, InvalidRequest, LoadFailed, ModelNotFound, NotReady
from serving.models import LoadedModel, load_model
from serving.service import EmbeddingService
from serving.settings import ModelSource
from serving.texts import EmbedRequest
from serving.worker import Worker
from tests.serving.conftest import make_settings, with_engine
from tests.serving.engines import HeldEngine

WAIT = 20


def source(bundles: Path, name: str, **options: Any) -> ModelSource:
    return ModelSource(path=bundles / name, **options)


def run(settings: Any, body: Callable[[Worker], Awaitable[None]]) -> Worker:
    """Run `body` on a worker that has loaded what the settings name."""

    async def main() -> Worker:
        worker = Worker(settings)
        try:
            await asyncio.wait_for(worker.load(), WAIT)
            await asyncio.wait_for(body(worker), WAIT)
        finally:
            worker.close()
        return worker

    return asyncio.run(main())


def settings_of(bundles: Path, *names: str, **changes: Any) -> Any:
    models = {"available": [{"path": bundles / name} for name in names]} | changes.pop("models", {})
    return make_settings(bundles, models=models, **changes)


def version_of(service: EmbeddingService) -> str:
    return service.model.manifest.version


def ask(text: str = "red cat") -> EmbedRequest:
    return EmbedRequest([text], is_single=True, param="text")


def metric(worker: Worker, name: str, **labels: str) -> float | None:
    return worker.metrics.registry.get_sample_value(name, labels)


async def settle(worker: Worker) -> None:
    """Wait until what drains is freed."""
    await asyncio.gather(*worker._retiring.values())


def test_several_models_answer_side_by_side(bundles: Path) -> None:
    async def body(worker: Worker) -> None:
        assert list(worker.models) == ["tiny", "other"]
        assert (worker.phase, worker.is_ready, worker.default) == ("serving", True, "tiny")
        assert worker.resolve(None) is worker.resolve("tiny")
        vectors = [(await worker.resolve(name).embed(ask())).vectors for name in ("tiny", "other")]
        assert not np.allclose(*vectors)
        with pytest.raises(ModelNotFound, match="serves tiny, other"):
            worker.resolve("third")

    run(settings_of(bundles, "v0", "other"), body)
    run(
        settings_of(bundles, "v0", "other", models={"default": "other"}), lambda worker: expect_default(worker, "other")
    )


async def expect_default(worker: Worker, name: str) -> None:
    assert worker.resolve(None).model.name == name


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (("v0", "v0"), {}, "has tiny fp32-onnx-[0-9a-f]{12} twice"),
        (
            ("v0", "other"),
            {"models": {"default": "third"}},
            "models.default names model third, but the models served are tiny, other",
        ),
        (("v0", "wide"), {}, "dimension 12, tiny is served with 8"),
        (("v0",), {"traffic": {"weights": {"tiny": {"v9": 1}}}}, r"embedding\.traffic\.weights\.tiny: .*not served"),
        (
            ("v0",),
            {"traffic": {"weights": {"other": {"v9": 1}}}},
            "weights names model other, but the models served are tiny",
        ),
    ],
)
def test_settings_that_do_not_fit_the_bundles_stop_the_worker(
    bundles: Path, names: tuple[str, ...], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigInvalid, match=message):
        run(settings_of(bundles, *names, **changes), expect_nothing)


async def expect_nothing(worker: Worker) -> None:
    raise AssertionError("the worker serves")


def test_model_answers_while_others_still_load(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    entered, gate = threading.Event(), threading.Event()

    class Slow(Worker):
        def _load_model(self, asked: ModelSource, layout: Choice | None = None) -> LoadedModel:
            if asked.path.name == "other":
                entered.set()
                assert gate.wait(WAIT)
            return super()._load_model(asked, layout)

    async def main() -> None:
        worker = Slow(settings_of(bundles, "v0", "other"))
        with pytest.raises(NotReady):
            worker.resolve("tiny")
        loading = asyncio.create_task(worker.load())
        await asyncio.to_thread(entered.wait, WAIT)
        assert (worker.phase, worker.is_ready, worker.is_model_ready("tiny")) == ("loading", False, True)
        await worker.resolve("tiny").embed(ask())
        for name in ("other", "third"):
            with pytest.raises(NotReady):
                worker.is_model_ready(name)
        with pytest.raises(NotReady, match="is loading"):
            await worker.swap(source(bundles, "v1"))
        gate.set()
        await loading
        assert worker.is_ready
        assert worker.is_model_ready("other")
        with pytest.raises(ModelNotFound):
            worker.is_model_ready("third")
        worker.begin_drain()
        assert not worker.is_model_ready("other")
        worker.close()

    asyncio.run(main())


def test_swap_answers_old_requests_with_the_old_version_and_then_frees_it(bundles: Path) -> None:
    async def body(worker: Worker) -> None:
        first = load_model(source(bundles, "v1"))
        engine = HeldEngine(first.engine)
        (old,) = worker.models["tiny"].services.values()
        worker.models["tiny"].take_over(worker._add(with_engine(first, engine)))
        worker._retire(worker.models["tiny"], [old])
        await settle(worker)
        held = worker.resolve("tiny")
        accepted = asyncio.create_task(held.embed(ask()))
        assert await asyncio.to_thread(engine.entered.wait, WAIT)

        change = await worker.swap(source(bundles, "v2"))
        assert (change.is_new, change.retired) == (True, (version_of(held),))
        assert version_of(worker.resolve("tiny")) == change.version
        assert not np.allclose((await worker.resolve("tiny").embed(ask())).vectors, first.golden.embeddings[0])
        assert (worker.draining, engine.is_closed) == ([held], False)
        assert worker.is_ready

        engine.gate.set()
        expected = first.engine.embed(*(np.array([row]) for row in ([2, 6, 12, 3], [1, 1, 1, 1])))
        np.testing.assert_allclose((await accepted).vectors, expected, atol=1e-6)
        await settle(worker)
        assert (worker.draining, engine.is_closed) == ([], True)

    run(settings_of(bundles, "v0"), body)


def test_swap_to_what_is_served_is_no_change(bundles: Path) -> None:
    async def body(worker: Worker) -> None:
        before = worker.resolve("tiny")
        change = await worker.swap(source(bundles, "v0"))
        assert (change.is_new, change.retired, change.version) == (False, (), version_of(before))
        assert worker.resolve("tiny") is before
        assert not worker.draining

    worker = run(settings_of(bundles, "v0"), body)
    assert metric(worker, "akidb_model_swaps_total", model="tiny", model_version="any") is None


def test_bundle_that_is_served_under_two_names_is_swapped_under_each(bundles: Path) -> None:
    """As its watcher does, which knows the name of each."""

    async def body(worker: Worker) -> None:
        for name, own in (("alias", "alias"), ("tiny", None)):
            change = await worker.swap(ModelSource(path=bundles / "v1", name=own), name)
            assert (change.model, change.is_new, len(change.retired)) == (name, True, 1)
        assert len({versions.main.model.digest for versions in worker.models.values()}) == 1
        again = await worker.swap(source(bundles, "v1"))
        assert (again.is_new, again.retired) == (False, ())

    available = [{"path": bundles / "v0", "name": "alias"}, {"path": bundles / "v0"}]
    run(settings_of(bundles, models={"available": available}), body)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("damaged", "model.onnx in .* has digest"),
        ("nowhere", "holds no manifest.json"),
        ("wide", "dimension 12, tiny is served with 8"),
        ("long", "max_batch_tokens = 512 is less than the 600 tokens"),
    ],
)
def test_failed_load_says_why_and_leaves_what_is_served(bundles: Path, name: str, message: str) -> None:
    async def body(worker: Worker) -> None:
        before = worker.resolve("tiny")
        for change in (worker.swap, worker.add_version):
            with pytest.raises(LoadFailed, match=f"^{name} is not served: .*{message}"):
                await change(source(bundles, name))
        assert worker.resolve("tiny") is before
        assert (worker.is_ready, worker.draining, list(worker.models)) == (True, [], ["tiny"])
        await before.embed(ask())

    worker = run(settings_of(bundles, "v0", batching={"max_batch_tokens": 512}), body)
    model = "tiny" if name in ("wide", "long") else "none"
    assert metric(worker, "akidb_model_load_failures_total", model=model) == 2


def test_swap_refuses_a_bundle_of_another_model_than_expected(bundles: Path) -> None:
    async def body(worker: Worker) -> None:
        with pytest.raises(LoadFailed, match="the bundle is of model other, not of tiny"):
            await worker.swap(source(bundles, "other"), "tiny")
        assert list(worker.models) == ["tiny"]

    run(settings_of(bundles, "v0"), body)


def test_versions_share_requests_by_weight_key_and_header(bundles: Path) -> None:
    async def body(worker: Worker) -> None:
        first = version_of(worker.resolve("tiny"))
        second = (await worker.add_version(source(bundles, "v1"))).version
        chosen = {version_of(worker.resolve("tiny")) for _ in range(50)}
        assert chosen == {first}  # a version that was only loaded gets nothing
        assert version_of(worker.resolve("tiny", [(b"x-model-version", second.encode())])) == second
        with pytest.raises(ModelNotFound, match=f"no such version of tiny, served are {first}, {second}") as raised:
            worker.resolve("tiny", [(b"x-model-version", b"v9")])
        assert raised.value.param == "x-model-version"

        assert worker.set_weights("tiny", {second: 3, first: 1}) == {first: 1.0, second: 3.0}
        plain = [version_of(worker.resolve("tiny")) for _ in range(400)]
        assert 290 <= plain.count(second) <= 310
        keys = [[(b"x-who", b"user-%d" % number)] for number in range(400)]
        sticky = [version_of(worker.resolve("tiny", key)) for key in keys]
        assert sticky == [version_of(worker.resolve("tiny", key)) for key in keys]
        assert 260 <= sticky.count(second) <= 340
        assert version_of(worker.resolve("tiny", [*keys[0], (b"x-model-version", first.encode())])) == first
        for name, weights in (("tiny", {"v9": 1}), ("tiny", {first: 0}), ("tiny", {})):
            with pytest.raises(InvalidRequest):
                worker.set_weights(name, weights)
        labels = {"model": "tiny", "model_version": second}
        assert metric(worker, "akidb_model_traffic_weight", **labels) == 3

    run(settings_of(bundles, "v0", traffic={"key_header": "x-who"}), body)


def test_weights_of_the_settings_hold_from_the_start(bundles: Path) -> None:
    manifests = [load_model(source(bundles, name)).manifest for name in ("v0", "v1")]
    weights = {manifests[1].version: 1}

    async def body(worker: Worker) -> None:
        assert version_of(worker.resolve("tiny")) == manifests[1].version
        assert worker.models["tiny"].main is worker.resolve("tiny")

    run(settings_of(bundles, "v0", "v1", traffic={"weights": {"tiny": weights}}), body)


def test_unload_frees_a_version_or_a_model_and_refuses_what_would_leave_none(bundles: Path) -> None:
    async def body(worker: Worker) -> None:
        first, second = (
            version_of(worker.models["tiny"].main),
            (await worker.add_version(source(bundles, "v1"))).version,
        )
        with pytest.raises(ChangeRefused, match="no other version of tiny has a weight"):
            await worker.unload("tiny", first)
        with pytest.raises(ChangeRefused, match="tiny is the default model"):
            await worker.unload("tiny")
        for missing in (("third", None), ("tiny", "v9")):
            with pytest.raises(ModelNotFound):
                await worker.unload(*missing)
        worker.set_weights("tiny", {second: 1})
        assert await worker.unload("tiny", first) == (first,)
        assert await worker.unload("other") != ()
        await settle(worker)
        assert [version_of(service) for service in worker.services] == [second]
        assert metric(worker, "akidb_queue_depth", model="tiny", model_version=first) is None
        assert metric(worker, "akidb_model_traffic_weight", model="tiny", model_version=second) == 1
        with pytest.raises(ModelNotFound):
            worker.resolve("other")

    run(settings_of(bundles, "v0", "other"), body)


def test_same_version_from_another_bundle_takes_its_place(bundles: Path, tmp_path: Path) -> None:
    from registry.manifest import read_manifest, write_manifest

    shutil.copytree(bundles / "v0", tmp_path / "again")
    manifest = read_manifest(tmp_path / "again")
    write_manifest(tmp_path / "again", manifest.model_copy(update={"model_id": "tests/rebuilt"}))

    async def body(worker: Worker) -> None:
        before = worker.resolve("tiny")
        change = await worker.swap(source(tmp_path, "again"))
        await settle(worker)
        after = worker.resolve("tiny")
        assert (change.is_new, after is before, len(worker.services)) == (True, False, 1)
        assert after.model.manifest.model_id == "tests/rebuilt"
        labels = {"model": "tiny", "model_version": change.version}
        assert metric(worker, "akidb_queue_depth", **labels) == 0
        assert metric(worker, "akidb_model_traffic_weight", **labels) == 1

    run(settings_of(bundles, "v0"), body)


def test_no_change_once_the_worker_drains(bundles: Path) -> None:
    async def body(worker: Worker) -> None:
        worker.begin_drain()
        for change in (worker.swap(source(bundles, "v1")), worker.unload("tiny")):
            with pytest.raises(NotReady, match="is draining"):
                await change

    run(settings_of(bundles, "v0"), body)


def test_ten_swaps_under_load_fail_no_request_and_mix_no_versions(bundles: Path) -> None:
    models = [load_model(source(bundles, name)) for name in ("v0", "v1")]
    ids = models[0].tokenizer.encode(["red cat"])
    mask = [np.ones_like(row) for row in ids]
    expected = {
        model.manifest.version: model.engine.embed(np.array(ids), np.array(mask))[0].tolist() for model in models
    }

    async def body(worker: Worker) -> None:
        answered: dict[str, int] = dict.fromkeys(expected, 0)
        is_over = asyncio.Event()

        async def client(http: httpx.AsyncClient) -> None:
            while not is_over.is_set():
                answer = await http.post("/api/v1/embed", json={"text": "red cat"})
                assert answer.status_code == 200, answer.text
                document = answer.json()
                np.testing.assert_allclose(document["embedding"], expected[document["model_version"]], atol=1e-6)
                answered[document["model_version"]] += 1

        transport = httpx.ASGITransport(create_app(worker))
        async with httpx.AsyncClient(transport=transport, base_url="http://worker") as http:
            clients = [asyncio.create_task(client(http)) for _ in range(32)]
            for number in range(1, 11):
                change = await worker.swap(source(bundles, f"v{number % 2}"))
                before = dict(answered)
                while answered == before:  # clients meet this version before the next comes
                    await asyncio.sleep(0)
                assert len(change.retired) == 1
            is_over.set()
            await asyncio.gather(*clients)
        assert all(answered.values())
        await settle(worker)
        assert len(worker.services) == 1

    worker = run(settings_of(bundles, "v0"), body)
    swaps = [metric(worker, "akidb_model_swaps_total", model="tiny", model_version=version) for version in expected]
    assert swaps == [5, 5]


def test_unsigned_bundle_is_refused_where_a_public_key_is_configured(bundles: Path, tmp_path: Path) -> None:
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    make_keys(private, public)
    signed = shutil.copytree(bundles / "v0", tmp_path / "signed")
    (signed / "manifest.sig").write_bytes(sign((signed / "manifest.json").read_bytes(), private))
    later = shutil.copytree(bundles / "v1", tmp_path / "later")
    (later / "manifest.sig").write_bytes((signed / "manifest.sig").read_bytes())
    asking = settings_of(tmp_path, "signed")
    asking = asking.model_copy(update={"models": asking.models.model_copy(update={"public_key": public})})

    async def body(worker: Worker) -> None:
        for folder, reason in ((bundles, "is not signed"), (tmp_path, "was made by no key of")):
            with pytest.raises(LoadFailed, match=reason):
                await worker.swap(source(folder, "v1" if folder == bundles else "later"))
        assert version_of(worker.resolve("tiny"))

    run(asking, body)
