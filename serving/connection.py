"""One client's connection: HTTP/1.1 within limits of size and time, every refusal an error object.

No timer per request: the server calls `enforce` on every connection twice a second.
"""

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from serving.api.responses import CLOSE, render_error, render_rest
from serving.errors import (
    HeadersTooLarge,
    InvalidRequest,
    RequestTooSlow,
    ServingError,
    TooManyConnections,
)
from serving.settings import LimitsSettings

# Chunk sizes and extensions may take this many times the bytes of the body they frame.
_FRAMING_RATIO = 8
# A closed TLS connection waits this long for the client's farewell; the loop alone would wait half a minute.
_FAREWELL_SECONDS = 1.0


class _Stage(Enum):
    OURS = auto()  # the worker's turn
    IDLE = auto()
    HEADERS = auto()
    BODY = auto()


# Status and rest of the answer to a request with this method, URL and headers (lower-case names) that is refused
# whatever its body says; None: it is not.
TurnAway = Callable[[str, str, Sequence[tuple[bytes, bytes]]], tuple[int, bytes] | None]

_OURS, _IDLE, _HEADERS, _BODY = _Stage  # a member looked up on its class costs as much as all comparisons together


class Connection(HttpToolsProtocol):
    """uvicorn's protocol, bounded; all limits together cost a request a few microseconds."""

    def __init__(self, *, limits: LimitsSettings, turn_away: TurnAway, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._limits, self._turn_away = limits, turn_away
        self._turned_away: tuple[int, bytes] | None = None  # the answer once the rest of the request is here
        self._is_last = False
        self._stage = _OURS
        self._deadline = 0.0  # of the stage, on the loop's clock
        self._head_bytes = 0  # of the head while it is incomplete
        self._body_bytes = self._framing_bytes = 0
        self._writing_since: float | None = None
        self._closing_since: float | None = None
        self._running: RequestResponseCycle | None = None

    def connection_made(self, transport: Any) -> None:
        """Take the connection, or refuse it when there are too many."""
        is_full = len(self.connections) >= self._limits.max_connections
        super().connection_made(transport)
        self._enter(_HEADERS, self._limits.header_timeout_seconds)
        if is_full:
            self._refuse(TooManyConnections(f"{self._limits.max_connections} connections are open, the limit"))

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, or was sent away."""
        self._give_up()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        """Feed the parser; what it cannot parse, or what is over a limit, is refused."""
        if self._stage is _IDLE:
            self._enter(_HEADERS, self._limits.header_timeout_seconds)  # even when it is but an empty line
        stage, body_bytes = self._stage, self._body_bytes
        try:
            self.parser.feed_data(data)
            if stage is self._stage is _HEADERS:
                self._head_bytes += len(data)
                self._check_head(self._head_bytes, 0)
            elif stage is self._stage is _BODY:
                self._framing_bytes += len(data) - (self._body_bytes - body_bytes)
                self._check_framing()
        except httptools.HttpParserUpgrade:
            pass  # to whatever else the client would like to speak: it is answered in HTTP
        except ServingError as error:
            self._refuse(error)
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(cause if isinstance(cause, ServingError) else InvalidRequest("the request is not HTTP/1.1"))

    def on_message_begin(self) -> None:
        """A request begins: its headers must be complete in time."""
        super().on_message_begin()
        self._head_bytes = self._body_bytes = self._framing_bytes = 0
        if self._stage is not _HEADERS:
            self._enter(_HEADERS, self._limits.header_timeout_seconds)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; trailers, which come after the body, are dropped."""
        if self._stage is _HEADERS:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start to answer unless there is too much of the head."""
        self._check_head(len(self.url) + sum(len(name) + len(value) for name, value in self.headers), len(self.headers))
        self._enter(_BODY, self._limits.body_timeout_seconds)
        if self._is_first() and self.parser.should_keep_alive():
            # Half of what a refusal costs is the task, the scope and the messages of a request that is let in.
            method, url = self.parser.get_method().decode("ascii"), self.url.decode("latin-1")
            self._turned_away = self._turn_away(method, url, self.headers)
        if self._turned_away is None:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Hand a part of the body to the request."""
        self._body_bytes += len(body)
        if self._turned_away is None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is here: from now on it is the worker that takes time."""
        self._stage = _OURS
        answer, self._turned_away = self._turned_away, None
        if answer is not None:
            self._write(*answer)
            self.on_response_complete()
            if self._is_last:
                self.transport.close()
        elif self.cycle.response_complete:  # without the body
            self._enter(_IDLE, self._limits.keep_alive_seconds)
        else:
            super().on_message_complete()

    def shutdown(self) -> None:
        """Close the connection, after the answer to a request that is under way."""
        if self._turned_away is None:
            super().shutdown()
        else:
            self._is_last = True

    def on_response_complete(self) -> None:
        """The answer is written, though perhaps not taken yet. Idle clients are the patrol's: no timer for each."""
        self._writing_since = None
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._stage is _OURS:
            self._enter(_IDLE, self._limits.keep_alive_seconds)

    def enforce(self, now: float) -> None:
        """Close the connection of a client that is too slow to send its request or to take its answer."""
        if self.transport.get_write_buffer_size() == 0:
            self._writing_since = None
            if self.transport.is_closing():
                self._enforce_close(now)
        elif self._writing_since is None:
            self._writing_since = now
        elif now - self._writing_since > self._limits.answer_timeout_seconds:
            self.transport.abort()
            return
        if self._stage is _OURS or self.transport.is_closing():
            return
        if self.flow.read_paused:  # it is we who do not read
            self._enter(_BODY, self._limits.body_timeout_seconds)
        elif now > self._deadline:
            self._expire()

    def _enforce_close(self, now: float) -> None:
        if self._closing_since is None:
            self._closing_since = now
        elif now - self._closing_since > _FAREWELL_SECONDS:
            self.transport.abort()

    def _expire(self) -> None:
        if self._stage is _IDLE:
            self.transport.close()
            return
        part, limit = "body", self._limits.body_timeout_seconds
        if self._stage is _HEADERS:
            part, limit = "headers", self._limits.header_timeout_seconds
        self._refuse(RequestTooSlow(f"the request's {part} did not arrive within {limit:g} s"))

    def _enter(self, stage: _Stage, timeout_seconds: float) -> None:
        self._stage = stage
        self._deadline = self.loop.time() + timeout_seconds

    def _check_head(self, size: int, count: int) -> None:
        limits = self._limits
        if count > limits.max_headers:
            raise HeadersTooLarge(f"the request has {count} headers, limit {limits.max_headers}")
        if size > limits.max_header_bytes:
            raise HeadersTooLarge(
                f"request line and headers have {size} bytes or more, limit {limits.max_header_bytes}"
            )

    def _check_framing(self) -> None:
        limit = self._limits.max_header_bytes + _FRAMING_RATIO * self._body_bytes
        if self._framing_bytes > limit:
            raise HeadersTooLarge(f"chunk sizes and trailers have {self._framing_bytes} bytes, limit {limit}")

    def _refuse(self, error: ServingError) -> None:
        """Answer with the error object and close the connection.

        Without an answer where one to an earlier request is under way: the client would take this one for it.
        """
        if self.transport.is_closing():
            return
        if self._turned_away is not None:
            can_answer = True
        elif self._stage is _BODY:
            can_answer = not self.pipeline and not self.cycle.response_started
        else:
            can_answer = self._is_first()
        if can_answer:
            status, headers, body = render_error(error, [CLOSE])
            self._write(status, render_rest(headers, body))
        self._give_up()
        self.transport.close()

    def _is_first(self) -> bool:
        """Whether every request before the one that comes in is answered."""
        return self.cycle is None or self.cycle.response_complete

    def _write(self, status: int, rest: bytes) -> None:
        fields = (b"%b: %b\r\n" % field for field in self.server_state.default_headers)
        self.transport.write(b"".join([STATUS_LINE[status], *fields, rest]))

    def _give_up(self) -> None:
        """Tell the request that is being answered that nobody waits; uvicorn tells only the newest of a pipeline."""
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
