"""The worker's state: which versions of which models it serves, and whether it loads, serves, drains or is closed."""

import asyncio
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from registry.manifest import Manifest
from serving.autotune import Choice
from serving.errors import ChangeRefused, ConfigInvalid, LoadFailed, NotReady, RequestError, ServingError
from serving.gpus import find_gpus
from serving.metrics import Metrics
from serving.models import LoadedModel, load_model
from serving.priority import low_priority
from serving.served import Served
from serving.service import EmbeddingService
from serving.settings import ModelSource, Settings
from serving.sources import fingerprint, locate_bundle
from serving.versions import ModelVersions
from serving.watch import Watcher

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Change:
    """What a load or a swap did: the version meant, whether it is new here, and the versions that go for it."""

    model: str
    version: str
    digest: str
    is_new: bool
    retired: tuple[str, ...] = ()


class Audience(Protocol):
    """Others who send requests to the worker's services: told of each change, asked before a version is freed."""

    async def announce(self) -> None:
        """Return when new requests go by what is served now."""
        ...

    async def released(self, service: EmbeddingService) -> None:
        """Return when no request will come to `service` any more."""
        ...


class Nobody:
    """No others: what the worker does is known at once."""

    async def announce(self) -> None:
        """See `Audience`."""

    async def released(self, service: EmbeddingService) -> None:
        """See `Audience`."""


class Worker(Served[EmbeddingService]):
    """Models by name. Whatever changes them needs a running event loop, one change at a time; requests never wait."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.metrics: Metrics = Metrics()
        self.metrics.watch_gpus(find_gpus())
        self.audience: Audience = Nobody()
        self._changing = asyncio.Lock()
        self._retiring: dict[EmbeddingService, asyncio.Task[None]] = {}
        self._watching: asyncio.Task[None] | None = None

    async def load(self) -> None:
        """Load what is configured, then serve; a model is served as soon as it is loaded.

        Raises BundleRejected, EngineUnavailable or ConfigInvalid.
        """
        watcher = Watcher(self.swap, self.settings.models.watch_seconds)
        for source in self.settings.models.available:
            handled = await asyncio.to_thread(fingerprint, source.path)
            model = await self._open(source)
            self._add_first(model)
            await self.audience.announce()
            watcher.follow(source, model.name, handled)
        self._apply_settings()
        if self.phase == "loading":
            self.phase = "serving"
        if self.settings.models.watch_seconds:
            self._watching = asyncio.create_task(watcher.run())

    def add(self, model: LoadedModel) -> None:
        """Serve a model that the caller loaded. Raises ConfigInvalid when the settings do not fit it."""
        self._add_first(model)
        if self.phase == "loading":
            self.phase = "serving"

    async def add_version(self, source: ModelSource) -> Change:
        """Load a bundle and serve it: a new model answers at once, a new version of one when it is given a weight.

        A bundle that is served already changes nothing. Raises LoadFailed or NotReady.
        """
        async with self._changing:
            change = await self._bring(source)
            await self.audience.announce()
            return change

    async def swap(self, source: ModelSource, expected_model: str | None = None) -> Change:
        """Load a bundle and let it answer every new request of its model; the other versions answer theirs and go.

        A bundle that is served already is not loaded again. Raises LoadFailed, also for a bundle of another model than
        `expected_model`, and NotReady; what was served then still is.
        """
        async with self._changing:
            change = await self._bring(source, expected_model)
            versions = self.models[change.model]
            gone = versions.take_over(versions.services[change.version])
            if not change.is_new and not gone:
                return change
            self._retire(versions, gone)
            self.metrics.count_swap(change.model, change.version)
            await self.audience.announce()
            retired = tuple(service.model.manifest.version for service in gone)
            _log.info("swapped model=%s version=%s retired=%s", change.model, change.version, _list(retired) or "none")
            return Change(change.model, change.version, change.digest, change.is_new, retired)

    async def unload(self, name: str, version: str | None = None) -> tuple[str, ...]:
        """Serve one version of a model, or all of it, no longer; returns the versions that go.

        Raises ModelNotFound, NotReady, or ChangeRefused: for the default model and for the only version with a weight.
        """
        async with self._changing:
            self._check_serving()
            versions = self.find(name)
            if version is None:
                if name == self.default:
                    raise ChangeRefused(
                        f"{name} is the default model: swap it, or serve another as the default", "model"
                    )
                del self.models[name]
                gone = list(versions.services.values())
            else:
                versions.find(version)
                try:
                    gone = [versions.remove(version)]
                except RequestError:
                    raise ChangeRefused(
                        f"no other version of {name} has a weight: give one a weight", "version"
                    ) from None
            self._retire(versions, gone)
            await self.audience.announce()
            return tuple(service.model.manifest.version for service in gone)

    def set_weights(self, name: str, weights: Mapping[str, float]) -> Mapping[str, float]:
        """Share the requests of a model out between its versions; returns every version's weight.

        Raises ModelNotFound or InvalidRequest.
        """
        versions = self.find(name)
        versions.set_weights(weights)
        self._show_weights(versions)
        return versions.weights

    @property
    def draining(self) -> list[EmbeddingService]:
        """Versions that are given no more requests and still answer some."""
        return list(self._retiring)

    @property
    def is_ready(self) -> bool:
        """Whether new requests are welcome."""
        return self.phase == "serving" and self.is_healthy

    @property
    def is_healthy(self) -> bool:
        """Whether every engine's thread is alive and answers in time."""
        return all(service.is_healthy() for service in self.services)

    def is_model_ready(self, name: str) -> bool:
        """Whether new requests for one model are welcome: it may be served while others still load.

        Raises ModelNotFound, or NotReady while the model may yet be loaded.
        """
        return self.phase in ("loading", "serving") and self.find(name).is_ready

    def begin_drain(self) -> None:
        """Turn unready; requests are still answered."""
        if self.phase != "closed":
            self.phase = "draining"

    def refuse(self) -> None:
        """Answer no further request; those accepted go on."""
        self.phase = "closed"

    def close(self) -> None:
        """End every service."""
        self.phase = "closed"
        for task in (self._watching, *self._retiring.values()):
            if task is not None:
                task.cancel()
        for service in (*self.services, *self._retiring):
            service.close()

    def _check_serving(self) -> None:
        if self.phase != "serving":
            raise NotReady(f"the worker is {self.phase}: models change while it serves")

    def _apply_settings(self) -> None:
        """What the settings say about models by name. Raises ConfigInvalid for one that no bundle has."""
        default, weights = self.settings.models.default, self.settings.traffic.weights
        named = {"embedding.models.default": [default] if default else [], "embedding.traffic.weights": list(weights)}
        for key, names in named.items():
            for name in names:
                if name not in self.models:
                    raise ConfigInvalid(f"{key} names model {name}, but the models served are {_list(self.models)}")
        for name, shares in weights.items():
            try:
                self.set_weights(name, shares)
            except RequestError as error:
                raise ConfigInvalid(f"embedding.traffic.weights.{name}: {error}") from None

    async def _bring(self, source: ModelSource, expected_model: str | None = None) -> Change:
        """Serve the bundle of `source` unless it is served already; as a further version it gets no weight yet."""
        self._check_serving()
        model: LoadedModel | None = None
        try:
            located = await asyncio.to_thread(locate_bundle, source.path)
            name = source.name or expected_model  # one bundle may be served under several
            for service in self.services:
                if service.model.digest == located.digest and name in (None, service.model.name):
                    return _describe(service, is_new=False)
            model = await self._open(source)
            if expected_model not in (None, model.name):
                raise ConfigInvalid(f"the bundle is of model {model.name}, not of {expected_model}")
            self._check_serving()
            return _describe(self._add(model), is_new=True)
        except ServingError as error:
            if model is not None:
                model.engine.close()
            if isinstance(error, NotReady):
                raise
            self.metrics.count_load_failure(model.name if model else source.name or expected_model)
            raise LoadFailed(f"{source.path.name} is not served: {error}") from error

    async def _open(self, source: ModelSource) -> LoadedModel:
        """Load a bundle in a thread, out of the way of those that answer."""
        return await asyncio.to_thread(self._load_quietly if self.models else self._load_model, source)

    def _load_quietly(self, source: ModelSource) -> LoadedModel:
        with low_priority():
            # What is measured beside traffic says nothing: take the layout that was measured at the start.
            return self._load_model(source, self.services[0].model.choice)

    def _add_first(self, model: LoadedModel) -> None:
        """Serve `model` at start-up: a model and version stand there once."""
        if model.name in self.models and model.manifest.version in self.models[model.name].services:
            model.engine.close()
            raise ConfigInvalid(f"embedding.models.available has {model.name} {model.manifest.version} twice")
        self._add(model)

    def _add(self, model: LoadedModel) -> EmbeddingService:
        """Serve `model`, as a further version without weight where it has others. Raises ConfigInvalid."""
        longest = model.manifest.max_seq_length
        batch_tokens = self.settings.batching.sizes(model.has_custom_kernels).batch_tokens
        if batch_tokens < longest:
            raise ConfigInvalid(
                f"embedding.batching.max_batch_tokens = {batch_tokens} is less than the "
                f"{longest} tokens one text of {model.name} may have"
            )
        versions = self.models.get(model.name)
        if versions is not None:
            versions.check(model)
        metrics = self.metrics.for_model(model.name, model.manifest.version, model.manifest.precision)
        service = EmbeddingService(model, self.settings, metrics)
        service.start()
        if versions is None:
            versions = self.models[model.name] = ModelVersions(model.name, service)
            self.default = self.default or self.settings.models.default or model.name
        else:
            replaced = versions.add(service)
            self._retire(versions, [replaced] if replaced else [])
        metrics.describe_model(model.digest, model.engine.runtime, model.manifest.precision, model.memory_bytes)
        self._show_weights(versions)
        return service

    def _retire(self, versions: ModelVersions[EmbeddingService], gone: Iterable[EmbeddingService]) -> None:
        """Let services answer what they accepted, then free them; nothing waits for that."""
        is_served = self.models.get(versions.name) is versions
        for service in gone:
            model, version = service.model, service.model.manifest.version
            service.metrics.forget_model()
            if not is_served or version not in versions.services:
                service.metrics.forget_version()
            self._retiring[service] = asyncio.get_running_loop().create_task(self._finish(service))
            _log.info("draining model=%s version=%s requests=%d", model.name, version, service.num_accepted)
        if is_served:
            self._show_weights(versions)

    async def _finish(self, service: EmbeddingService) -> None:
        try:
            await self.audience.released(service)
            await service.retire()
        finally:
            del self._retiring[service]
        _log.info("freed model=%s version=%s", service.model.name, service.model.manifest.version)

    def _show_weights(self, versions: ModelVersions[EmbeddingService]) -> None:
        for version, service in versions.services.items():
            service.metrics.set_weight(versions.weights[version])

    def _load_model(self, source: ModelSource, layout: Choice | None = None) -> LoadedModel:
        def count_fallback(manifest: Manifest, runtime: str) -> None:
            self.metrics.count_fallback(source.name or manifest.model_name, manifest.version, runtime)

        located = locate_bundle(source.path)
        model = load_model(
            source.model_copy(update={"path": located.folder}),
            count_fallback,
            self.settings.models.public_key,
            layout,
            self.settings.custom_kernels,
            self.settings.multi_gpu.devices,
        )
        _log.info(
            "loaded model=%s version=%s engine=%r tokens_per_second=%.0f overhead_tokens=%.1f memory_bytes=%s",
            model.name,
            model.manifest.version,
            model.engine.runtime,
            model.cost.tokens_per_second,
            model.cost.overhead_tokens,
            model.memory_bytes,
        )
        return model


def _describe(service: EmbeddingService, is_new: bool) -> Change:
    model = service.model
    return Change(model.name, model.manifest.version, model.digest, is_new)


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
