"""The dialect of text-embeddings-inference: a bare list of vectors, its own error object and status codes."""

from importlib.metadata import version
from typing import Any

from serving.api.responses import render_vectors
from serving.errors import (
    STATUS,
    DeadlineExceeded,
    EngineFailed,
    InputTooLong,
    InternalError,
    InvalidRequest,
    Overloaded,
    ServingError,
)
from serving.models import LoadedModel
from serving.settings import Settings
from serving.texts import Embedded, EmbedRequest, TextModel

EMBED_PATH, INFO_PATH = "/embed", "/info"
ERROR_TYPES = ("Unhealthy", "Backend", "Overloaded", "Validation")

_UNPROCESSABLE, _FAILED_DEPENDENCY = 422, 424


def tei_error(error: ServingError) -> tuple[int, dict[str, Any]]:
    """Its statuses: 422 for what the client can mend, 424 for the engine, 429 and 503; the table's for the rest."""
    status: int = STATUS[type(error)]
    kind = "Validation" if status < 500 else "Unhealthy"
    if isinstance(error, InvalidRequest | InputTooLong):
        status = _UNPROCESSABLE
    elif isinstance(error, Overloaded):
        kind = "Overloaded"
    elif isinstance(error, EngineFailed | DeadlineExceeded | InternalError):
        status, kind = _FAILED_DEPENDENCY, "Backend"
    return status, {"error": str(error), "error_type": kind}


async def render_tei(request: EmbedRequest, model: TextModel, embedded: Embedded, started: float) -> list[bytes]:
    """The answer of `POST /embed`: a list of vectors, even for one text."""
    return [b"[", *await render_vectors(embedded.vectors, "float"), b"]"]


def describe_info(model: LoadedModel, settings: Settings) -> dict[str, Any]:
    """The answer of `GET /info`, with the fields text-embeddings-inference has."""
    manifest, sizes = model.manifest, settings.batching.sizes(model.has_custom_kernels)
    return {
        "model_id": manifest.model_id,
        "model_sha": model.digest,
        "model_dtype": manifest.precision,
        "model_type": {"embedding": {"pooling": manifest.pooling}},
        "max_concurrent_requests": sizes.queue_size,
        "max_input_length": manifest.max_seq_length,
        "max_batch_tokens": sizes.batch_tokens,
        "max_batch_requests": sizes.batch_size,
        "max_client_batch_size": settings.batching.max_texts_per_request,
        "auto_truncate": True,
        "tokenization_workers": 1,
        "version": version("thorforge"),
        "sha": None,
        "docker_label": None,
    }
