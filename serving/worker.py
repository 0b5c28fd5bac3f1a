"""The worker's state: which models it serves, and whether it is loading, serving, draining or closed."""

import asyncio
import logging
from typing import Literal

from registry.manifest import Manifest
from serving.errors import ConfigInvalid, ModelNotFound, NotReady
from serving.metrics import Metrics
from serving.models import LoadedModel, load_model
from serving.service import EmbeddingService
from serving.settings import ModelSource, Settings

Phase = Literal["loading", "serving", "draining", "closed"]

_log = logging.getLogger(__name__)


class Worker:
    """Services by model name. `add` and `load` need a running event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.services: dict[str, EmbeddingService] = {}
        self.default: str | None = None
        self.phase: Phase = "loading"

    async def load(self) -> None:
        """Load what is configured in a thread, then serve.

        Raises BundleRejected, EngineUnavailable or ConfigInvalid.
        """
        loop = asyncio.get_running_loop()
        for source in self.settings.models.available:
            self.add(await loop.run_in_executor(None, self._load_model, source))

    def add(self, model: LoadedModel) -> None:
        """Serve `model`. Raises ConfigInvalid when the settings do not fit it."""
        default, longest = self.settings.models.default, model.manifest.max_seq_length
        if default is not None and default != model.name:
            raise ConfigInvalid(f"embedding.models.default = {default!r}, but the model served is {model.name!r}")
        if self.settings.batching.max_batch_tokens < longest:
            raise ConfigInvalid(
                f"embedding.batching.max_batch_tokens = {self.settings.batching.max_batch_tokens} is less than the "
                f"{longest} tokens one text of {model.name} may have"
            )
        metrics = self.metrics.for_model(model.name, model.manifest.version)
        metrics.describe_model(model.digest, model.engine.runtime, model.manifest.precision)
        service = EmbeddingService(model, self.settings, metrics)
        service.start()
        self.services[model.name] = service
        self.default = model.name
        if self.phase == "loading":
            self.phase = "serving"

    def resolve(self, name: str | None) -> EmbeddingService:
        """The service of a model, the default's for None. Raises NotReady or ModelNotFound."""
        if self.phase == "loading":
            raise NotReady("the worker is loading its model")
        if self.phase == "closed":
            raise NotReady("the worker is shutting down")
        service = self.services.get(name or self.default or "")
        if service is None:
            raise ModelNotFound(f"no such model, this worker serves {', '.join(self.services)}", "model")
        return service

    @property
    def is_ready(self) -> bool:
        """Whether new requests are welcome."""
        return self.phase == "serving" and self.is_healthy

    @property
    def is_healthy(self) -> bool:
        """Whether every engine's thread is alive and answers in time."""
        return all(service.is_healthy() for service in self.services.values())

    @property
    def is_leaving(self) -> bool:
        """Whether connections should be closed after their answer."""
        return self.phase in ("draining", "closed")

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
        for service in self.services.values():
            service.close()

    def _load_model(self, source: ModelSource) -> LoadedModel:
        def count_fallback(manifest: Manifest, runtime: str) -> None:
            self.metrics.count_fallback(source.name or manifest.model_name, manifest.version, runtime)

        model = load_model(source, count_fallback)
        _log.info(
            "loaded model=%s version=%s engine=%r tokens_per_second=%.0f overhead_tokens=%.1f",
            model.name,
            model.manifest.version,
            model.engine.runtime,
            model.cost.tokens_per_second,
            model.cost.overhead_tokens,
        )
        return model
