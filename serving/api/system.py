"""Everything but the hot path: models, validation, health, metrics and the documentation page."""

from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

import orjson
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from serving.api.openapi import build_openapi
from serving.api.tei import INFO_PATH, describe_info
from serving.service import EmbeddingService
from serving.versions import ModelVersions
from serving.worker import Worker

# How far below the manifest's figure the live engine's mean cosine may be: other CPUs round differently.
_COSINE_TOLERANCE = 0.005

_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}

Handler = Callable[[Request], Awaitable[Response]]


def system_routes(worker: Worker) -> list[Route]:
    """Routes of the small endpoints, all GET."""
    endpoints = SystemEndpoints(worker)
    handlers: dict[str, Handler] = {
        "/healthz": endpoints.healthz,
        "/readyz": endpoints.readyz,
        "/metrics": endpoints.metrics,
        "/api/v1/models": endpoints.native_models,
        "/api/v1/validate": endpoints.validate,
        "/v1/models": endpoints.openai_models,
        "/v1/models/{model}": endpoints.openai_model,
        INFO_PATH: endpoints.tei_info,
        "/openapi.json": endpoints.openapi,
        "/docs": endpoints.docs,
        "/": endpoints.status,
    }
    return [Route(path, handler, methods=["GET"]) for path, handler in handlers.items()]


class SystemEndpoints:
    """Handlers of the small endpoints."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def healthz(self, _: Request) -> Response:
        """200 while every engine's thread is alive and answers in time."""
        healthy = self._worker.is_healthy
        return _json({"status": "ok" if healthy else "engine stuck or dead"}, 200 if healthy else 503)

    async def readyz(self, request: Request) -> Response:
        """200 while new requests are welcome, for the `model` asked for or for all; 503 while loading or draining."""
        model = request.query_params.get("model")
        ready = self._worker.is_ready if model is None else self._worker.is_model_ready(model)
        return _json({"status": "ready" if ready else self._worker.phase}, 200 if ready else 503)

    async def metrics(self, _: Request) -> Response:
        """The Prometheus exposition."""
        return Response(self._worker.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def native_models(self, _: Request) -> Response:
        """What is served, in full."""
        return _json({"models": describe_models(self._worker)})

    async def validate(self, request: Request) -> Response:
        """Run the reference texts through the live engine and compare with the teacher."""
        service = self._worker.resolve(request.query_params.get("model"), request.scope["headers"])
        cosines = await service.validate()
        manifest = service.model.manifest
        threshold = manifest.validation.cosine_similarity_vs_fp32.mean - _COSINE_TOLERANCE
        mean = float(cosines.mean())
        return _json(
            {
                "model": service.model.name,
                "model_version": manifest.version,
                "cosine_similarity": {"mean": mean, "min": float(cosines.min())},
                "count": len(cosines),
                "threshold": threshold,
                "passed": mean >= threshold,
            }
        )

    async def openai_models(self, _: Request) -> Response:
        """The OpenAI list of models."""
        return _json({"object": "list", "data": [_openai_model(model) for model in self._worker.models.values()]})

    async def openai_model(self, request: Request) -> Response:
        """One model of the OpenAI list."""
        return _json(_openai_model(self._worker.find(request.path_params["model"])))

    async def tei_info(self, _: Request) -> Response:
        """What text-embeddings-inference says of itself."""
        return _json(describe_info(self._worker.resolve(None).model, self._worker.settings))

    async def openapi(self, _: Request) -> Response:
        """The OpenAPI document."""
        return _json(build_openapi(self._worker.default or "model"))

    async def docs(self, _: Request) -> Response:
        """The page that shows the OpenAPI document and sends requests."""
        return _page("docs.html")

    async def status(self, _: Request) -> Response:
        """The page that shows what is served and how it is doing."""
        return _page("status.html")


def describe_models(worker: Worker) -> list[dict[str, Any]]:
    """`GET /api/v1/models`: an entry for each version of each model, those that still drain at the end."""
    served = [
        describe_version(service, versions.weights[version], "serving", name == worker.default, worker.is_ready)
        for name, versions in worker.models.items()
        for version, service in versions.services.items()
    ]
    return served + [describe_version(service, 0.0, "draining", False, False) for service in worker.draining]


def describe_version(
    service: EmbeddingService, weight: float, state: str, is_default: bool, is_ready: bool
) -> dict[str, Any]:
    """One version of a model. A `weight` is relative to the model's others; a draining version is never ready."""
    model, manifest = service.model, service.model.manifest
    return {
        "name": model.name,
        "model_id": manifest.model_id,
        "version": manifest.version,
        "variant": manifest.variant,
        "digest": model.digest,
        "dimension": manifest.dimension,
        "max_seq_length": manifest.max_seq_length,
        "pooling": manifest.pooling,
        "normalize": manifest.normalize,
        "precision": manifest.precision,
        "prompts": sorted(manifest.prompts),
        "compatibility": manifest.compatibility,
        "cosine_similarity_vs_fp32": manifest.validation.cosine_similarity_vs_fp32.mean,
        "engine": model.engine.runtime,
        "engine_setup": str(model.choice),
        "engine_memory_bytes": model.memory_bytes,
        "weight": weight,
        "state": state,
        "default": is_default,
        "ready": is_ready,
    }


def _openai_model(versions: ModelVersions[EmbeddingService]) -> dict[str, Any]:
    created = int(versions.main.model.manifest.created_at.timestamp())
    listed = [
        {"version": version, "weight": versions.weights[version], "state": "serving"} for version in versions.services
    ]
    return {"id": versions.name, "object": "model", "created": created, "owned_by": "thorforge", "versions": listed}


def _page(name: str) -> Response:
    """A page that loads nothing from elsewhere, which the browser enforces."""
    return HTMLResponse(files("serving.api").joinpath(name).read_text(encoding="utf-8"), headers=_PAGE_HEADERS)


def _json(document: object, status: int = 200) -> Response:
    return Response(orjson.dumps(document), status, media_type="application/json")
