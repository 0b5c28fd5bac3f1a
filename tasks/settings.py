"""Settings of tasks that the configuration holds. Nothing but pydantic is loaded: a rollback reads them too."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

# What the candidate to publish is chosen by.
Criterion = Literal["throughput", "latency", "size", "cost"]
# How the range of a tensor is chosen from what it was on the calibration texts.
CalibrationMethod = Literal["minmax", "percentile", "entropy"]
Level = Annotated[int, Field(ge=0, le=5)]


class BuildConfig(BaseModel):
    """What a sweep over TensorRT recipes tries: every workspace with every builder level."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workspaces_mb: tuple[PositiveInt, ...] = Field(
        default=(512, 1024, 2048, 4096), min_length=1, description="workspaces to try, in MB"
    )
    builder_levels: tuple[Level, ...] = Field(default=(3,), min_length=1, description="builder levels to try, 0 to 5")
    tactic_sources: tuple[str, ...] | None = Field(
        default=None, description="tactic sources to allow; by default the library's own choice"
    )
    version_compatible: bool = Field(default=False, description="plans that later versions of TensorRT load")
    hardware_compatibility: Literal["NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"] = Field(
        default="NONE", description="GPUs a plan loads on: NONE, AMPERE_PLUS or SAME_COMPUTE_CAPABILITY"
    )


class QdqConfig(BaseModel):
    """How the linear layers of a model are quantised, inputs and weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    calibration: CalibrationMethod = "minmax"
    min_cosine: float | None = None
    """What the embeddings of calibration texts must reach; layers stay in float until they do. None: all are rounded"""
