"""W3C trace context in and out, and spans of embedding requests for an OpenTelemetry collector.

The SDK (extra `otel`) is imported only when an endpoint is configured. Spans say how long and how much, never what:
no text, no header but the trace context.
"""

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serving.errors import ConfigInvalid
from serving.settings import TracingSettings
from serving.texts import Embedded, EmbedRequest, TextModel

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

TRACEPARENT = b"traceparent"
_FORMAT = re.compile(rb"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_NANOSECONDS = 1_000_000_000
# A collector that does not take spans within this loses them; so long may the end of the process take, too.
_EXPORT_SECONDS = 3


@dataclass(frozen=True, slots=True)
class TraceParent:
    """The caller's span: ids as integers, and the flags, whose lowest bit says that it is sampled."""

    trace_id: int
    span_id: int
    flags: int


def find_traceparent(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The value of the request's only `traceparent` header; None when there is none or several."""
    values = [value for name, value in headers if name == TRACEPARENT]
    return values[0] if len(values) == 1 else None


def parse_traceparent(value: bytes) -> TraceParent | None:
    """What https://www.w3.org/TR/trace-context/ makes of it; None when it is not valid."""
    match = _FORMAT.fullmatch(value)
    if match is None or (value.startswith(b"00") and len(value) != 55):
        return None
    trace_id, span_id, flags = (int(part, 16) for part in match.groups())
    return TraceParent(trace_id, span_id, flags) if trace_id and span_id else None


class Tracer:
    """Makes one span per request with children for tokenising, queue and engine."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry import trace  # noqa: PLC0415  loads only when tracing is on
        from opentelemetry.context import Context  # noqa: PLC0415

        self._api, self._root = trace, Context()
        self._provider = provider
        self._tracer = provider.get_tracer("thorforge.serving")

    def begin(self, parent: TraceParent | None, route: str) -> "RequestTrace":
        """Start the span of a request, below its caller's if that is known."""
        api = self._api
        context: Any = self._root
        if parent is not None:
            caller = api.SpanContext(parent.trace_id, parent.span_id, True, api.TraceFlags(parent.flags & 1))
            context = api.set_span_in_context(api.NonRecordingSpan(caller), context)
        span = self._tracer.start_span(
            f"POST {route}",
            context,
            api.SpanKind.SERVER,
            {"http.request.method": "POST", "http.route": route},
            start_time=time.time_ns(),
        )
        return RequestTrace(self, span)

    def add_phases(self, span: Any, embedded: Embedded, ended_at: int) -> None:
        """The children of a request's span, one after the other up to `ended_at` (ns)."""
        context = self._api.set_span_in_context(span)
        phases = {
            "engine": embedded.engine_seconds,
            "queue": embedded.queue_seconds,
            "tokenize": embedded.tokenize_seconds,
        }
        for name, seconds in phases.items():
            started_at = ended_at - int(seconds * _NANOSECONDS)
            self._tracer.start_span(name, context, start_time=started_at).end(ended_at)
            ended_at = started_at

    def close(self) -> None:
        """Send what is left, within a few seconds."""
        self._provider.shutdown()


class RequestTrace:
    """The span of one request."""

    def __init__(self, tracer: Tracer, span: Any) -> None:
        self._tracer, self._span = tracer, span

    @property
    def traceparent(self) -> bytes:
        """What the answer carries: the trace, and the worker's own span."""
        context = self._span.get_span_context()
        return b"00-%032x-%016x-%02x" % (context.trace_id, context.span_id, context.trace_flags)

    def add_answer(self, request: EmbedRequest, model: TextModel, embedded: Embedded) -> None:
        """Say what was embedded, by numbers only; called as soon as the vectors are there."""
        if not self._span.is_recording():
            return
        self._span.set_attributes(
            {
                "thorforge.model": model.name,
                "thorforge.model_version": model.manifest.version,
                "thorforge.texts": len(request.texts),
                "thorforge.tokens": embedded.num_tokens,
            }
        )
        self._tracer.add_phases(self._span, embedded, time.time_ns())

    def end(self, status: int, error: str | None = None) -> None:
        """End the span; `error` is the error's code."""
        self._span.set_attribute("http.response.status_code", status)
        if error is not None:
            self._span.set_attribute("error.type", error)
        self._span.end()


def open_tracer(settings: TracingSettings) -> Tracer | None:
    """The tracer; None when no endpoint is set.

    Raises ConfigInvalid when the endpoint is no address or the extra is not installed. The exporter's own variables,
    such as OTEL_EXPORTER_OTLP_HEADERS, hold.
    """
    if settings.endpoint is None:
        return None
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", settings.endpoint):
        raise ConfigInvalid(f"embedding.tracing.endpoint = {settings.endpoint!r}: not an http:// or https:// address")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased  # noqa: PLC0415
    except ImportError:
        raise ConfigInvalid("embedding.tracing.endpoint is set: pip install '.[otel]' in the checkout") from None
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(settings.sample_ratio)),
        resource=Resource.create({"service.name": "thorforge-worker"}),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(
        BatchSpanProcessor(OTLPSpanExporter(endpoint=settings.endpoint, timeout=_EXPORT_SECONDS))
    )
    return Tracer(provider)
