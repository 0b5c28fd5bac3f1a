"""Bodies of the admin API, which its handlers and the OpenAPI document share."""

from pydantic import BaseModel, ConfigDict, Field

from registry.manifest import SafeName
from serving.settings import EngineName, Weight


class AdminRequest(BaseModel):
    """What all bodies have in common: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BundleRequest(AdminRequest):
    """Body of load and swap."""

    bundle: str = Field(
        min_length=1,
        max_length=1024,
        description="a configured bundle's name, or the last part of its path; or a folder below embedding.models.root",
    )
    name: SafeName | None = Field(default=None, description="name clients use; the manifest's when absent")
    engine: EngineName | None = Field(default=None, description="auto when absent")
    num_threads: int | None = Field(default=None, ge=0, le=1024, description="of the engine; 0: one per core")


class UnloadRequest(AdminRequest):
    """Body of unload."""

    model: SafeName = Field(description="name of a served model")
    version: SafeName | None = Field(default=None, description="version to unload; the whole model when absent")


class TrafficRequest(AdminRequest):
    """Body of `PUT /api/v1/admin/traffic`."""

    model: SafeName = Field(description="name of a served model")
    weights: dict[SafeName, Weight] = Field(
        description="weight by version, relative to each other; versions not named get 0"
    )
