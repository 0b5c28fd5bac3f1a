"""Which service answers a request: models by name, their versions, and whether there is anything to answer yet."""

from collections.abc import Iterable
from typing import Generic, Literal, Protocol

from serving.errors import ModelNotFound, NotReady
from serving.settings import Settings
from serving.traffic import read_routing
from serving.versions import AnyService, ModelVersions

Phase = Literal["loading", "serving", "draining", "closed"]


class Refusals(Protocol):
    """Counts requests that fail before it is known who would answer them."""

    def count_refusal(self, status: int, error: str) -> None:
        """One did; `error` is the error's code."""
        ...


class Served(Generic[AnyService]):
    """What is served: by the worker's own services, or by those of a front process, which ask the worker's."""

    metrics: Refusals

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.models: dict[str, ModelVersions[AnyService]] = {}
        self.default: str | None = None
        self.phase: Phase = "loading"
        self._key_header = settings.traffic.key_header.encode()

    def resolve(self, name: str | None, headers: Iterable[tuple[bytes, bytes]] = ()) -> AnyService:
        """The service that answers a request for a model, the default's for None.

        `headers` (lower-case names) may ask for a version or name a key to stick to. Raises NotReady or ModelNotFound.
        """
        if self.phase == "closed":
            raise NotReady("the worker is shutting down")
        return self.find(name or self.default or "").choose(*read_routing(headers, self._key_header))

    def find(self, name: str) -> ModelVersions[AnyService]:
        """The versions of a model. Raises ModelNotFound, or NotReady while the model may yet be loaded."""
        model = self.models.get(name)
        if model is not None:
            return model
        if self.phase == "loading":
            raise NotReady("the worker is loading its models")
        raise ModelNotFound(f"no such model, this worker serves {', '.join(self.models)}", "model")

    @property
    def services(self) -> list[AnyService]:
        """Everything that is given requests."""
        return [service for model in self.models.values() for service in model.services.values()]

    @property
    def sole_service(self) -> AnyService | None:
        """The service that answers whatever is asked; None where there are several, or none any more."""
        services = self.services
        return services[0] if len(services) == 1 and self.phase != "closed" else None

    @property
    def is_leaving(self) -> bool:
        """Whether connections should be closed after their answer."""
        return self.phase in ("draining", "closed")
