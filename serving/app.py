"""The ASGI application: routes, and the edge where every exception becomes an error object."""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.access import Access
from serving.api.admin import admin_routes
from serving.api.embeddings import DIALECTS, EmbeddingsEndpoint, Observers
from serving.api.responses import CLOSE, error_code, openai_error, send_error, to_serving_error
from serving.api.system import system_routes
from serving.api.tei import EMBED_PATH, INFO_PATH, tei_error
from serving.errors import STATUS, ClientGone
from serving.served import Served
from serving.worker import Worker


def create_app(worker: Worker, observers: Observers | None = None) -> "Application":
    """The application over `worker`, which the caller loads (`worker.load()` or `worker.add(model)`) and closes.

    Raises ConfigInvalid for key files that cannot be used.
    """
    hot = _endpoints(worker, observers or Observers())
    routes = [Route(path, endpoint, methods=["POST"]) for path, endpoint in hot.items()]
    router = Router([*routes, *system_routes(worker), *admin_routes(worker)], redirect_slashes=False)
    return Application(worker, hot, router)


def create_front_app(worker: Served[Any], observers: Observers, forward: ASGIApp) -> "Application":
    """The application of a front process: embeds through `worker`, hands every other request to `forward`.

    Raises ConfigInvalid as `create_app` does.
    """
    return Application(worker, _endpoints(worker, observers), forward)


def _endpoints(worker: Served[Any], observers: Observers) -> dict[str, EmbeddingsEndpoint]:
    """The hot paths."""
    return {dialect.path: EmbeddingsEndpoint(worker, dialect, observers) for dialect in DIALECTS}


class Application:
    """Dispatches the hot paths itself, which saves the 10 µs a router takes, and leaves the rest to another."""

    def __init__(self, worker: Served[Any], hot: Mapping[str, EmbeddingsEndpoint], rest: ASGIApp) -> None:
        self._worker, self._hot, self._rest = worker, hot, rest
        self._access = Access(worker.settings.security)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            raise NotImplementedError(f"the worker speaks HTTP, not {scope['type']}")
        endpoint = self._hot.get(scope["path"])
        refused = self._access.refusal(scope)
        style = tei_error if scope["path"] in (EMBED_PATH, INFO_PATH) else openai_error
        if endpoint is not None and scope["method"] == "POST" and refused is None:
            await endpoint(scope, receive, send)
            return
        if self._worker.is_leaving:
            send = _closing(send)
        if refused is not None:
            if endpoint is not None:
                self._worker.metrics.count_refusal(STATUS[type(refused)], error_code(type(refused)))
            await send_error(send, refused, style=style)
            return
        scope["app"] = self  # makes the router raise 404 and 405 instead of answering them itself
        try:
            await self._rest(scope, receive, send)
        except ClientGone:
            return
        except Exception as error:  # the edge of a request: whatever happened, the client gets an error object
            headers = [(name.lower().encode(), value.encode()) for name, value in _headers(error).items()]
            await send_error(send, to_serving_error(error), headers, style)

    def turn_away(self, method: str, path: str, headers: Sequence[tuple[bytes, bytes]]) -> tuple[int, bytes] | None:
        """Status and rest (headers and body, as sent) of the answer to a request refused whatever its body says.

        Most of a flood is told so by its connection, which asks before the body is here. None: call the application.
        """
        endpoint = self._hot.get(path)
        if endpoint is None or method != "POST" or self._worker.is_leaving:
            return None
        return endpoint.turn_away(headers, self._is_welcome)

    def _is_welcome(self, path: str, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        """Whether the request shows the key that its path wants."""
        return self._access.refusal({"path": path, "headers": headers}) is None


def _closing(send: Send) -> Send:
    """Close the connection after the answer, so that the client's next request finds another worker."""

    async def send_closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], CLOSE]
        await send(message)

    return send_closing


def _headers(error: Exception) -> dict[str, str]:
    """Headers the router wants on its error, such as the Allow of a 405."""
    return dict(getattr(error, "headers", None) or {})
