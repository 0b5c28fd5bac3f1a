"""The versions of one model that are served side by side, and which of them answers a request."""

from collections.abc import Mapping
from typing import Generic, TypeVar

from serving.errors import ConfigInvalid, ModelNotFound
from serving.texts import Service, TextModel
from serving.traffic import check_weights, pick_by_count, pick_by_key

AnyService = TypeVar("AnyService", bound=Service)


class ModelVersions(Generic[AnyService]):
    """Services of one model by version, in the order they were loaded. Lives on one event loop.

    Every change is one step of the loop: a request meets the versions and weights before it or those after it.
    """

    def __init__(self, name: str, first: AnyService) -> None:
        """`first` gets all requests until `set_weights` says otherwise."""
        self.name = name
        self._services = {first.model.manifest.version: first}
        self._weights: dict[str, float] = {}
        self._sole: AnyService | None = None
        self._num_spread = 0
        self.set_weights({first.model.manifest.version: 1})

    @property
    def services(self) -> Mapping[str, AnyService]:
        """By version."""
        return self._services

    @property
    def weights(self) -> Mapping[str, float]:
        """By version; their sum is not fixed, shares are relative to it."""
        return self._weights

    @property
    def main(self) -> AnyService:
        """The version with the largest weight, the one loaded first among equals."""
        return self._services[max(self._weights, key=self._weights.__getitem__)]

    @property
    def is_ready(self) -> bool:
        """Whether every version that gets requests answers them."""
        return all(service.is_healthy() for version, service in self._services.items() if self._weights[version] > 0)

    def find(self, version: str) -> AnyService:
        """The service of one version. Raises ModelNotFound, which names those served."""
        if version not in self._services:
            served = ", ".join(self._services)
            raise ModelNotFound(f"no such version of {self.name}, served are {served}", "x-model-version")
        return self._services[version]

    def choose(self, version: str | None, key: bytes | None) -> AnyService:
        """The service of `version` when that is asked for, else by weight, the same for the same `key`.

        Raises ModelNotFound for a version that is not served.
        """
        if version is not None:
            return self.find(version)
        if self._sole is not None:
            return self._sole
        if key is not None:
            return self._services[pick_by_key(self._weights, key)]
        self._num_spread += 1
        return self._services[pick_by_count(self._weights, self._num_spread)]

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Share requests out anew; versions not named get none. Raises InvalidRequest."""
        self._weights = check_weights(weights, self._services)
        chosen = [version for version, weight in self._weights.items() if weight > 0]
        self._sole = self._services[chosen[0]] if len(chosen) == 1 else None

    def check(self, model: TextModel) -> None:
        """Raise ConfigInvalid unless `model` may stand in for the versions served: its vectors have their length."""
        ours, new = self.main.model.manifest.dimension, model.manifest.dimension
        if new != ours:
            raise ConfigInvalid(
                f"the bundle has dimension {new}, {self.name} is served with {ours}: give it another name"
            )

    def add(self, service: AnyService) -> AnyService | None:
        """Serve one more version, without a share of the requests; returns what it replaces under its own version."""
        version = service.model.manifest.version
        replaced = self._services.get(version)
        self._services[version] = service
        self.set_weights(self._weights)
        return replaced

    def take_over(self, service: AnyService) -> list[AnyService]:
        """Send every request to `service` from now on; returns the other services, which get no more."""
        gone = [other for other in self._services.values() if other is not service]
        version = service.model.manifest.version
        self._services = {version: service}
        self.set_weights({version: 1})
        return gone

    def remove(self, version: str) -> AnyService:
        """Serve `version` no longer. Raises InvalidRequest when no other has a weight above 0."""
        weights = {other: weight for other, weight in self._weights.items() if other != version}
        check_weights(weights, weights)
        service = self._services.pop(version)
        self.set_weights(weights)
        return service
