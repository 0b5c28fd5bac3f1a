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
from serving.models import LoadedModel
from serving.worker import Worker

# How far below the manifest's figure the live engine's mean cosine may be: other CPUs round differently.
_COSINE_TOLERANCE = 0.005

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
        "/openapi.json": endpoints.openapi,
        "/docs": endpoints.docs,
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

    async def readyz(self, _: Request) -> Response:
        """200 while new requests are welcome; 503 while loading or draining."""
        ready = self._worker.is_ready
        return _json({"status": "ready" if ready else self._worker.phase}, 200 if ready else 503)

    async def metrics(self, _: Request) -> Response:
        """The Prometheus exposition."""
        return Response(self._worker.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def native_models(self, _: Request) -> Response:
        """What is served, in full."""
        models = [
            describe_model(service.model, is_default=name == self._worker.default, is_ready=self._worker.is_ready)
            for name, service in self._worker.services.items()
        ]
        return _json({"models": models})

    async def validate(self, request: Request) -> Response:
        """Run the reference texts through the live engine and compare with the teacher."""
        service = self._worker.resolve(request.query_params.get("model"))
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
        data = [_openai_model(service.model) for service in self._worker.services.values()]
        return _json({"object": "list", "data": data})

    async def openai_model(self, request: Request) -> Response:
        """One model of the OpenAI list."""
        return _json(_openai_model(self._worker.resolve(request.path_params["model"]).model))

    async def openapi(self, _: Request) -> Response:
        """The OpenAPI document."""
        return _json(build_openapi(self._worker.default or "model"))

    async def docs(self, _: Request) -> Response:
        """The page that shows the OpenAPI document and sends requests; it loads nothing from elsewhere."""
        return HTMLResponse(files("serving.api").joinpath("docs.html").read_text(encoding="utf-8"))


def describe_model(model: LoadedModel, is_default: bool, is_ready: bool) -> dict[str, Any]:
    """One entry of `GET /api/v1/models`."""
    manifest = model.manifest
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
        "engine_setup": str(model.setup),
        "default": is_default,
        "ready": is_ready,
    }


def _openai_model(model: LoadedModel) -> dict[str, Any]:
    created = int(model.manifest.created_at.timestamp())
    return {"id": model.name, "object": "model", "created": created, "owned_by": "thorforge"}


def _json(document: object, status: int = 200) -> Response:
    return Response(orjson.dumps(document), status, media_type="application/json")
