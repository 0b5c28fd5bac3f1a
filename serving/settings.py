"""What can be set: the sections of `config.toml`, their keys, types, defaults and help. `serving.config` fills them."""

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

from registry.manifest import SafeName


def _split_secrets(value: object) -> object:
    """A variable holds its keys on one line."""
    if not isinstance(value, str):
        return value
    secrets = value.replace(",", " ").split()
    if not secrets:
        raise ValueError("it is set and holds no key: unset it to go without")
    return secrets


def _check_secrets(secrets: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
    """What cannot be sent in a header can never match, so it is a mistake."""
    for number, secret in enumerate(secrets, start=1):
        check_secret(secret.get_secret_value(), f"key {number}")
    return secrets


def _check_devices(devices: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(devices)) < len(devices):
        raise ValueError(f"{list(devices)} has a GPU twice")
    return devices


def check_secret(secret: str, place: str) -> str:
    """Return `secret`. Raises ValueError, which names the `place` alone, for one that no client can send."""
    if not secret.isascii() or not secret.isprintable() or not secret or " " in secret:
        raise ValueError(f"{place} is empty or has characters other than printable ASCII without spaces")
    return secret


Weight = Annotated[float, Field(ge=0, le=1e9)]
EngineName = Literal["auto", "cuda", "tensorrt", "onnxruntime-cuda", "avx512", "onnxruntime", "openvino"]
NumThreads = Annotated[int, Field(ge=0, le=1024)]
NumInstances = Annotated[int, Field(ge=0, le=64)]
Secrets = Annotated[tuple[SecretStr, ...], BeforeValidator(_split_secrets), AfterValidator(_check_secrets)]

Devices = Annotated[tuple[Annotated[int, Field(ge=0, le=63)], ...], AfterValidator(_check_devices)]


class Sizes(NamedTuple):
    """What one engine run and the queue before it may hold."""

    batch_size: int
    batch_tokens: int
    queue_size: int
    queue_tokens: int


# Where nothing is set. Before a GPU so many texts are as short a wait, and short runs would leave it idle.
_USUAL = Sizes(batch_size=64, batch_tokens=8192, queue_size=4096, queue_tokens=65_536)
_ON_CUDA = Sizes(batch_size=256, batch_tokens=32_768, queue_size=32_768, queue_tokens=524_288)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BatchingSettings(_Section):
    """`[embedding.batching]`: what one engine run may hold, and when the queue is full."""

    max_batch_size: int | None = Field(
        default=None, ge=1, le=4096, description="texts in one engine run; by default 64, on the cuda engine 256"
    )
    max_batch_tokens: int | None = Field(
        default=None,
        ge=16,
        description="tokens in one engine run, padding included; by default 8192, on the cuda engine 32768",
    )
    max_queue_tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens waiting at which a request gets 429; single texts and requests of many are counted apart; "
        "by default 65536, on the cuda engine 524288",
    )
    max_queue_size: int | None = Field(
        default=None,
        ge=1,
        description="texts waiting at which a request gets 429, counted in the same way; by default 4096, on the cuda "
        "engine 32768",
    )
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

    def sizes(self, has_custom_kernels: bool) -> Sizes:
        """What is set, and for the rest what suits the engine: the cuda engine's kernels of our own or another."""
        usual = _ON_CUDA if has_custom_kernels else _USUAL
        return Sizes(
            self.max_batch_size or usual.batch_size,
            self.max_batch_tokens or usual.batch_tokens,
            self.max_queue_size or usual.queue_size,
            self.max_queue_tokens or usual.queue_tokens,
        )


class LimitsSettings(_Section):
    """`[embedding.limits]`: what a client may send, how slowly, and how many clients there may be."""

    max_connections: int = Field(
        default=1024, ge=1, description="open connections of a process; one more gets 503 and is closed"
    )
    max_header_bytes: int = Field(
        default=16_384, ge=1024, le=1_048_576, description="request line and headers; more get 431"
    )
    max_headers: int = Field(default=64, ge=8, description="header lines of a request; more get 431")
    max_body_bytes: int = Field(default=6 * 1024 * 1024, ge=1024, description="larger request bodies get 413")
    max_text_chars: int = Field(default=1_000_000, ge=1, description="characters of one text; a longer one gets 400")
    header_timeout_seconds: float = Field(default=10, gt=0, description="time a request's headers have to arrive")
    body_timeout_seconds: float = Field(default=30, gt=0, description="time a request's body has to arrive")
    answer_timeout_seconds: float = Field(default=60, gt=0, description="time a client has to take its answer")
    keep_alive_seconds: int = Field(
        default=75, ge=1, description="an idle connection is closed after this; longer than clients keep theirs"
    )


class TlsSettings(_Section):
    """`[embedding.tls]`: HTTPS; off without a certificate."""

    certificate: Path | None = Field(default=None, description="PEM file of the certificate and its chain; none: HTTP")
    key: Path | None = Field(default=None, description="PEM file of its private key, without a passphrase")


class RequestLogSettings(_Section):
    """`[embedding.request_log]`: a sample of the traffic, for drift and calibration; off without a folder."""

    folder: Path | None = Field(default=None, description="folder of this worker's request log; none: no log")
    sample_ratio: float = Field(default=0.01, gt=0, le=1, description="part of the texts that is logged")
    text: Literal["none", "hash", "full"] = Field(
        default="none", description="what is kept of a text beside its length: nothing, a keyed hash, or all of it"
    )
    embedding: bool = Field(default=True, description="whether the embedding is kept")
    max_file_bytes: int = Field(default=64 * 1024 * 1024, ge=4096, description="a file is closed at this size")
    max_total_bytes: int = Field(
        default=1024 * 1024 * 1024, ge=4096, description="the oldest files go when all of them exceed this"
    )


class TracingSettings(_Section):
    """`[embedding.tracing]`: spans for an OpenTelemetry collector; off without an endpoint."""

    endpoint: str | None = Field(
        default=None, description="OTLP/HTTP address such as http://127.0.0.1:4318/v1/traces; none: no spans"
    )
    sample_ratio: float = Field(
        default=1.0, ge=0, le=1, description="part of the requests without a traceparent of their own that is traced"
    )


class CustomKernelsSettings(_Section):
    """`[embedding.custom_kernels]`: the cuda engine, which computes on kernels of our own."""

    use: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="auto: where a bundle has it and the GPU can run it; always: or the worker does not start; never",
    )
    max_tokens: int = Field(
        default=131_072,
        ge=512,
        description="tokens of one run of the cuda engine; its memory is taken at the start",
    )


class MultiGpuSettings(_Section):
    """`[embedding.multi_gpu]`: the cuda engine on several GPUs at once, a copy of the model on each."""

    devices: Devices = Field(
        default=(),
        description="GPUs by CUDA's numbers, a JSON list: each computes batches of its own; empty: the first alone",
    )


class ModelSource(_Section):
    """`[[embedding.models.available]]`: a bundle to serve and the engine to run it on."""

    path: Path = Field(
        description="folder of the bundle, or a file that names it: a channel of a registry, or its path"
    )
    name: SafeName | None = Field(default=None, description="name clients use; the manifest's when absent")
    engine: EngineName = Field(
        default="auto",
        description="auto: the first that loads on a GPU, then avx512, else the fastest as measured on this CPU",
    )
    num_threads: NumThreads = Field(
        default=0, description="threads of one engine run; 0: the cores, shared among the runs"
    )
    num_instances: NumInstances = Field(
        default=0, description="engine runs at a time; 0: measured, or one where num_threads is given"
    )


class ModelsSettings(_Section):
    """`[embedding.models]`: what is served."""

    default: SafeName | None = Field(default=None, description="model of a request that names none")
    available: tuple[ModelSource, ...] = Field(default=(), description="bundles to serve, a JSON list when a variable")
    root: Path | None = Field(default=None, description="folder below which the admin API may name further bundles")
    public_key: Path | None = Field(
        default=None,
        description="PEM file of Ed25519 keys: one must have signed a bundle; none: it need not be signed",
    )
    watch_seconds: float = Field(
        default=0, ge=0, le=86_400, description="how often to look for a new bundle in `available`; 0: never"
    )


class TrafficSettings(_Section):
    """`[embedding.traffic]`: how requests are shared out between the versions of a model."""

    key_header: str = Field(
        default="x-traffic-key",
        pattern=r"^[a-z0-9-]{1,64}$",
        description="requests with the same value of this header get the same version",
    )
    weights: dict[SafeName, dict[SafeName, Weight]] = Field(
        default={}, description="weight of each version, by model; versions not named get 0; JSON when a variable"
    )


class SecuritySettings(_Section):
    """`[embedding.security]`: who may ask. Without API keys everybody may, without admin tokens nobody administers."""

    api_keys: Secrets = Field(default=(), description="API keys, separated by commas; never a flag")
    api_keys_file: Path | None = Field(
        default=None, description="file of API keys, one a line, re-read when it changes"
    )
    admin_tokens: Secrets = Field(default=(), description="tokens of the admin API, separated by commas; never a flag")
    admin_tokens_file: Path | None = Field(
        default=None, description="file of admin tokens, one a line, re-read when it changes"
    )
    open_paths: tuple[str, ...] = Field(
        default=("/healthz", "/readyz", "/metrics", "/", "/docs", "/openapi.json"),
        description="paths that answer without an API key, a JSON list; the two pages hold no data, they ask for a key",
    )


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
    cache_bytes: int = Field(default=0, ge=0, description="memory for vectors of texts seen before, per model; 0: none")
    http_processes: int = Field(
        default=0,
        ge=0,
        le=256,
        description="processes for HTTP and tokenising beside the one that runs the engine; 0: it does that itself",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severe line to log"
    )
    batching: BatchingSettings = BatchingSettings()
    limits: LimitsSettings = LimitsSettings()
    tls: TlsSettings = TlsSettings()
    request_log: RequestLogSettings = RequestLogSettings()
    tracing: TracingSettings = TracingSettings()
    models: ModelsSettings = ModelsSettings()
    custom_kernels: CustomKernelsSettings = CustomKernelsSettings()
    multi_gpu: MultiGpuSettings = MultiGpuSettings()
    traffic: TrafficSettings = TrafficSettings()
    security: SecuritySettings = SecuritySettings()


def dump_settings(settings: Settings) -> bytes:
    """Settings as JSON, of which `Settings.model_validate_json` makes the same; secrets are in the clear."""
    return orjson.dumps(settings.model_dump(), default=_show)


def _show(value: object) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)
