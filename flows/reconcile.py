"""reconcile: where MLflow's aliases differ from the registry's channels, and making them agree with the registry."""

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from flows.config import Settings, open_registry
from tasks.production.promotion import mirror_aliases, wanted_aliases
from tasks.tracking import ModelAliases


class Drift(BaseModel):
    """One alias that does not say what the registry says; None: not set."""

    model_config = ConfigDict(frozen=True)

    model: str
    alias: str
    registry: str | None
    mlflow: str | None


def find_drift(settings: Settings, models: Iterable[str]) -> list[Drift]:
    """Every alias of `models` that differs from its channel. Raises TrackingFailed."""
    store, drift = open_registry(settings), []
    for model in models:
        found = ModelAliases(settings.optimize.tracking_uri, model).read()
        wanted = wanted_aliases(store, model)
        drift += [
            Drift(model=model, alias=alias, registry=digest, mlflow=found.get(alias))
            for alias, digest in wanted.items()
            if found.get(alias) != digest
        ]
    return drift


def repair(settings: Settings, drift: Iterable[Drift]) -> None:
    """Write the aliases of every model that drifted anew. Raises TrackingFailed."""
    store = open_registry(settings)
    for model in sorted({found.model for found in drift}):
        mirror_aliases.fn(settings.optimize.tracking_uri, store, model)
