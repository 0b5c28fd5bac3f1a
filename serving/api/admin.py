"""The admin API: load, swap and unload versions of models and share requests out between them, while serving.

Only who holds an admin token gets here (`serving.access`); a bundle is named, never addressed by a path of its choice.
"""

from typing import TypeVar

import orjson
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from registry.manifest import describe_validation
from serving.access import ADMIN_PREFIX
from serving.api.admin_requests import AdminRequest, BundleRequest, TrafficRequest, UnloadRequest
from serving.api.embeddings import read_body
from serving.api.system import describe_models
from serving.errors import InvalidRequest
from serving.settings import ModelSource
from serving.sources import find_bundle
from serving.worker import Change, Worker

MAX_BODY_BYTES = 65_536


Body = TypeVar("Body", bound=AdminRequest)


def admin_routes(worker: Worker) -> list[Route]:
    """Routes below `/api/v1/admin/`."""
    endpoints = AdminEndpoints(worker)
    posts = {"load": endpoints.load, "swap": endpoints.swap, "unload": endpoints.unload}
    return [
        Route(f"{ADMIN_PREFIX}models", endpoints.models, methods=["GET"]),
        *(Route(f"{ADMIN_PREFIX}models/{verb}", handler, methods=["POST"]) for verb, handler in posts.items()),
        Route(f"{ADMIN_PREFIX}traffic", endpoints.traffic, methods=["PUT"]),
    ]


class AdminEndpoints:
    """Handlers of the admin API."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def models(self, _: Request) -> Response:
        """Every version served or draining, and what further bundles may be named."""
        bundles = [configured_name(source) for source in self._worker.settings.models.available]
        return _json({"models": describe_models(self._worker), "bundles": bundles})

    async def load(self, request: Request) -> Response:
        """Serve one more version, or one more model."""
        source = self._find_source(await _read(request, BundleRequest))
        return _describe(await self._worker.add_version(source))

    async def swap(self, request: Request) -> Response:
        """Put a version in the place of all others of its model."""
        source = self._find_source(await _read(request, BundleRequest))
        return _describe(await self._worker.swap(source))

    async def unload(self, request: Request) -> Response:
        """Serve a version or a model no longer."""
        asked = await _read(request, UnloadRequest)
        retired = await self._worker.unload(asked.model, asked.version)
        return _json({"model": asked.model, "retired": retired})

    async def traffic(self, request: Request) -> Response:
        """Set the weights of a model's versions."""
        asked = await _read(request, TrafficRequest)
        weights = self._worker.set_weights(asked.model, asked.weights)
        await self._worker.audience.announce()
        return _json({"model": asked.model, "weights": dict(weights)})

    def _find_source(self, asked: BundleRequest) -> ModelSource:
        """The bundle a request names, with what it says about it. Raises InvalidRequest."""
        models = self._worker.settings.models
        configured = (source for source in models.available if configured_name(source) == asked.bundle)
        source = next(configured, None) or ModelSource(path=find_bundle(models.root, asked.bundle))
        return source.model_copy(update=asked.model_dump(exclude={"bundle"}, exclude_none=True))


def configured_name(source: ModelSource) -> str:
    """How the admin API names a configured bundle."""
    return source.name or source.path.resolve().name


async def _read(request: Request, kind: type[Body]) -> Body:
    data = await read_body(request.scope, request.receive, MAX_BODY_BYTES)
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise InvalidRequest(f"the body is not a {kind.__name__}: {describe_validation(error)}") from None


def _describe(change: Change) -> Response:
    return _json(
        {
            "model": change.model,
            "model_version": change.version,
            "digest": change.digest,
            "loaded": change.is_new,
            "retired": list(change.retired),
        }
    )


def _json(document: object) -> Response:
    return Response(orjson.dumps(document), media_type="application/json")
