"""Every way the worker says no, and the one table that turns each into an HTTP status.

ServingError
├── RequestError            the client can mend it (4xx)
│   ├── InvalidRequest      400  malformed JSON, wrong type, unknown field
│   ├── InputTooLong        400  more tokens than the model takes, truncation refused
│   ├── InvalidApiKey       401  no key, or none the worker knows
│   ├── AdminDisabled       403  the worker has no admin token
│   ├── ModelNotFound       404  no such model or version
│   ├── RouteNotFound       404  no such path
│   ├── MethodNotAllowed    405  the path exists, the verb does not
│   ├── RequestTooSlow      408  the headers or the body did not arrive in time
│   ├── ChangeRefused       409  what is served does not allow the change asked for
│   ├── BodyTooLarge        413  more bytes than the limit
│   ├── RequestTooLarge     413  more tokens than the engine computes within the request timeout
│   ├── UnsupportedEncoding 415  a compressed body
│   ├── LoadFailed          422  the bundle named cannot be served; what was served still is
│   ├── HeadersTooLarge     431  a longer request line, more headers or longer ones than the limit
│   └── Overloaded          429  the queue is full: come back after `retry_after_seconds`
├── NotReady                503  still loading, or draining
├── TooManyConnections      503  the limit of open connections is reached
├── EngineFailed            500  the engine raised or returned a non-finite vector
├── DeadlineExceeded        504  the engine did not answer in time
├── InternalError           500  a defect of the worker itself
├── EngineUnavailable       500  the engine asked for cannot be loaded on this node (start-up)
├── BundleRejected          500  the bundle is not one this worker can serve (start-up)
└── ConfigInvalid           500  a setting is unknown or out of range (start-up)
"""

from http import HTTPStatus


class ServingError(Exception):
    """Base of all worker errors; the message names the value and the limit, never the user's text.

    `param` is the request field at fault, as the OpenAI error object reports it.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class RequestError(ServingError):
    """The request is at fault."""


class InvalidRequest(RequestError):
    """Malformed JSON, a wrong type, an unknown field or a value out of range."""


class InputTooLong(RequestError):
    """More tokens than the model takes, and the client asked not to truncate."""


class InvalidApiKey(RequestError):
    """The request carries no key, or none that the worker knows."""


class AdminDisabled(RequestError):
    """The worker has no admin token, so nobody may administer it."""


class ModelNotFound(RequestError):
    """The worker serves no model of that name, or no such version of it."""


class RouteNotFound(RequestError):
    """No such path."""


class MethodNotAllowed(RequestError):
    """The path exists, but not for this method."""


class RequestTooSlow(RequestError):
    """The headers or the body did not arrive in time."""


class ChangeRefused(RequestError):
    """What is served does not allow the change asked for."""


class LoadFailed(RequestError):
    """The bundle named cannot be served; what was served before still is."""


class BodyTooLarge(RequestError):
    """The body has more bytes than the limit."""


class RequestTooLarge(RequestError):
    """The texts have more tokens than the engine is predicted to compute within the request timeout."""


class UnsupportedEncoding(RequestError):
    """The body is compressed; the worker takes it as it is."""


class HeadersTooLarge(RequestError):
    """The request line and the headers are more, or longer, than the limits."""


class Overloaded(RequestError):
    """Admission refused the request; try again after `retry_after_seconds`."""

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class NotReady(ServingError):
    """The worker is still loading or is draining."""


class TooManyConnections(ServingError):
    """As many connections are open as the limit allows."""


class EngineFailed(ServingError):
    """The engine raised, or returned something that is not a finite vector."""


class DeadlineExceeded(ServingError):
    """The engine did not answer within the deadline."""


class InternalError(ServingError):
    """The worker itself is at fault; the log names the place."""


class EngineUnavailable(ServingError):
    """An engine asked for by name cannot be loaded on this node."""


class BundleRejected(ServingError):
    """The bundle is damaged, or needs what this worker does not have."""


class ConfigInvalid(ServingError):
    """A setting is unknown, of the wrong type or out of range."""


class ClientGone(Exception):
    """The client hung up: there is nobody to answer, so this is no ServingError and has no status."""


STATUS: dict[type[ServingError], HTTPStatus] = {
    InvalidRequest: HTTPStatus.BAD_REQUEST,
    InputTooLong: HTTPStatus.BAD_REQUEST,
    InvalidApiKey: HTTPStatus.UNAUTHORIZED,
    AdminDisabled: HTTPStatus.FORBIDDEN,
    ModelNotFound: HTTPStatus.NOT_FOUND,
    RouteNotFound: HTTPStatus.NOT_FOUND,
    MethodNotAllowed: HTTPStatus.METHOD_NOT_ALLOWED,
    RequestTooSlow: HTTPStatus.REQUEST_TIMEOUT,
    ChangeRefused: HTTPStatus.CONFLICT,
    LoadFailed: HTTPStatus.UNPROCESSABLE_ENTITY,
    BodyTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    RequestTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    UnsupportedEncoding: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    HeadersTooLarge: HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    Overloaded: HTTPStatus.TOO_MANY_REQUESTS,
    NotReady: HTTPStatus.SERVICE_UNAVAILABLE,
    TooManyConnections: HTTPStatus.SERVICE_UNAVAILABLE,
    EngineFailed: HTTPStatus.INTERNAL_SERVER_ERROR,
    DeadlineExceeded: HTTPStatus.GATEWAY_TIMEOUT,
    InternalError: HTTPStatus.INTERNAL_SERVER_ERROR,
    EngineUnavailable: HTTPStatus.INTERNAL_SERVER_ERROR,
    BundleRejected: HTTPStatus.INTERNAL_SERVER_ERROR,
    ConfigInvalid: HTTPStatus.INTERNAL_SERVER_ERROR,
}
