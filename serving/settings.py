"""What can be set: the sections of `config.toml`, their keys, types, defaults and help. `serving.config` fills them."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from registry.manifest import SafeName


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BatchingSettings(_Section):
    """`[embedding.batching]`: what one engine run may hold, and when the queue is full."""

    max_batch_size: int = Field(default=64, ge=1, le=4096, description="texts in one engine run")
    max_batch_tokens: int = Field(default=8192, ge=16, description="tokens in one engine run, padding included")
    max_queue_tokens: int = Field(
        default=65_536, ge=1, description="a request that finds this many tokens waiting gets 429"
    )
    max_queue_size: int = Field(default=4096, ge=1, description="a request that finds this many texts waiting gets 429")
    max_wait_time_ms: float = Field(
        default=0.0, ge=0, le=10, description="how long an idle engine waits for more; 0: no timer"
    )
    adaptive: bool = Field(
        default=True, description="keep engine runs short against the latency objective, as learned while serving"
    )
    latency_objective_ms: float = Field(
        default=500.0,
        gt=0,
        description="95 of 100 accepted requests of one text are answered within this: others get 429 at once",
    )
    max_texts_per_request: int = Field(default=2048, ge=1, description="texts one request may hold")


class ModelSource(_Section):
    """`[[embedding.models.available]]`: a bundle to serve and the engine to run it on."""

    path: Path = Field(description="folder of the bundle")
    name: SafeName | None = Field(default=None, description="name clients use; the manifest's when absent")
    engine: Literal["auto", "onnxruntime", "openvino"] = Field(
        default="auto", description="auto: the fastest that loads, as measured on this node"
    )
    num_threads: int = Field(
        default=0, ge=0, le=1024, description="threads of one engine run; 0: the cores, shared among the runs"
    )
    num_instances: int = Field(
        default=0, ge=0, le=64, description="engine runs at a time; 0: measured, or one where num_threads is given"
    )


class ModelsSettings(_Section):
    """`[embedding.models]`: what is served."""

    default: SafeName | None = Field(default=None, description="model of a request that names none")
    available: tuple[ModelSource, ...] = Field(default=(), description="bundles to serve, a JSON list when a variable")


class Settings(_Section):
    """`[embedding]`: the whole table."""

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65_535, description="port to listen on; 0: a free one, printed at start")
    drain_seconds: float = Field(
        default=30, gt=0, description="after SIGTERM, the time accepted requests have to finish"
    )
    drain_grace_seconds: float = Field(
        default=1, ge=0, description="part of it in which new requests are still answered"
    )
    request_timeout_seconds: float = Field(default=30, gt=0, description="a request older than this gets 504")
    max_body_bytes: int = Field(default=16 * 1024 * 1024, ge=1024, description="larger request bodies get 413")
    cache_bytes: int = Field(default=0, ge=0, description="memory for vectors of texts seen before, per model; 0: none")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severe line to log"
    )
    batching: BatchingSettings = BatchingSettings()
    models: ModelsSettings = ModelsSettings()
