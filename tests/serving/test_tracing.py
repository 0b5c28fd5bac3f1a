"""Trace context in and out; spans as a real collector gets them."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.errors import ConfigInvalid
from serving.models import load_model
from serving.settings import ModelSource, TracingSettings
from serving.tracing import TraceParent, find_traceparent, open_tracer, parse_traceparent
from tests.serving.conftest import make_settings, serve

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00"


def test_valid_traceparent_is_read() -> None:
    expected = TraceParent(int(TRACE, 16), int(SPAN, 16), 1)
    assert parse_traceparent(SAMPLED.encode()) == expected
    assert parse_traceparent(f"cc-{TRACE}-{SPAN}-01-later-versions-add".encode()) == expected


@pytest.mark.parametrize(
    "value",
    [
        "", "00", f"ff-{TRACE}-{SPAN}-01", f"00-{TRACE.upper()}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE}-{SPAN}-01-more", f"00-{TRACE}-{SPAN}-1", f"00-{TRACE}-{SPAN}-0g",
    ],
)  # fmt: skip
def test_invalid_traceparent_is_ignored(value: str) -> None:
    assert parse_traceparent(value.encode()) is None


def test_several_traceparents_are_none() -> None:
    headers = [(b"host", b"a"), (b"traceparent", b"1"), (b"traceparent", b"2")]
    assert find_traceparent(headers) is None
    assert find_traceparent(headers[:2]) == b"1"


def test_traceparent_is_echoed_when_valid(url: str) -> None:
    def ask(**headers: str) -> httpx.Headers:
        return httpx.post(f"{url}/api/v1/embed", json={"text": "red"}, headers=headers).headers

    assert ask(traceparent=SAMPLED)["traceparent"] == SAMPLED
    assert "traceparent" not in ask()
    assert "traceparent" not in ask(traceparent="user text")
    failed = httpx.post(f"{url}/embed", content=b"{", headers={"traceparent": SAMPLED})
    assert (failed.status_code, failed.headers["traceparent"]) == (422, SAMPLED)


@pytest.mark.parametrize("endpoint", ["localhost:4318", "ftp://a/b", "http://", "http://a b/"])
def test_endpoint_that_is_no_address_stops_the_worker(endpoint: str) -> None:
    with pytest.raises(ConfigInvalid, match=r"embedding\.tracing\.endpoint"):
        open_tracer(TracingSettings(endpoint=endpoint))


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigInvalid, match=r"pip install '\.\[otel\]'"):
        open_tracer(TracingSettings(endpoint="http://127.0.0.1:4318/v1/traces"))
    assert open_tracer(TracingSettings()) is None


class Collector(ThreadingHTTPServer):
    """Keeps the bodies that are posted to it."""

    bodies: list[bytes]


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        self.server.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def collect() -> Iterator[Collector]:
    with Collector(("127.0.0.1", 0), _Handler) as server:
        server.bodies = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def spans_of(
    bundle: Path, *requests: dict[str, Any], http_processes: int = 0, **tracing: Any
) -> tuple[list[Any], list[httpx.Response], bytes]:
    """Spans a collector got from a worker that answered `requests` to its native API."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is not installed")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    with collect() as collector:
        endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        settings = make_settings(bundle, http_processes=http_processes, tracing={"endpoint": endpoint, **tracing})
        with serve(settings, load_model(ModelSource(path=bundle))) as (url, _):
            answers = [httpx.post(f"{url}/api/v1/embed", **request) for request in requests]
    batches = [ExportTraceServiceRequest.FromString(body) for body in collector.bodies]
    scopes = [scope for batch in batches for resource in batch.resource_spans for scope in resource.scope_spans]
    return [span for scope in scopes for span in scope.spans], answers, b"".join(collector.bodies)


@pytest.mark.parametrize("http_processes", [0, 2])
def test_collector_gets_a_request_with_its_phases(bundle: Path, http_processes: int) -> None:
    request = {"json": {"texts": ["red cat", "dog"]}, "headers": {"traceparent": SAMPLED}}
    spans, (answer,), sent = spans_of(bundle, request, http_processes=http_processes)
    named = {span.name: span for span in spans}
    assert named.keys() == {"POST /api/v1/embed", "tokenize", "queue", "engine"}
    root = named.pop("POST /api/v1/embed")
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, SPAN)
    assert answer.headers["traceparent"] == f"00-{TRACE}-{root.span_id.hex()}-01"
    assert {span.parent_span_id for span in named.values()} == {root.span_id}
    phases = [named[name] for name in ("tokenize", "queue", "engine")]
    assert all(span.start_time_unix_nano <= span.end_time_unix_nano for span in [root, *phases])
    assert phases[0].end_time_unix_nano == phases[1].start_time_unix_nano
    assert phases[1].end_time_unix_nano == phases[2].start_time_unix_nano
    values = {item.key: item.value for item in root.attributes}
    assert values["http.response.status_code"].int_value == 200
    assert (values["thorforge.texts"].int_value, values["thorforge.tokens"].int_value) == (2, 7)
    assert values["thorforge.model"].string_value == "tiny"
    assert b"thorforge-worker" in sent
    assert b"red" not in sent


def test_failed_requests_say_why_and_carry_no_text(bundle: Path) -> None:
    spans, _, sent = spans_of(bundle, {"json": {"text": "xyzzy", "prompt": "xyzzy"}}, {"content": b"xyzzy"})
    assert [span.name for span in spans] == ["POST /api/v1/embed"] * 2
    codes = [{item.key: item.value for item in span.attributes} for span in spans]
    assert [code["http.response.status_code"].int_value for code in codes] == [400, 400]
    assert [code["error.type"].string_value for code in codes] == ["invalid_request"] * 2
    assert b"xyzzy" not in sent


def test_caller_and_ratio_decide_what_is_sampled(bundle: Path) -> None:
    body = {"json": {"text": "red"}}
    spans, answers, _ = spans_of(
        bundle, body, body | {"headers": {"traceparent": UNSAMPLED}}, body | {"headers": {"traceparent": SAMPLED}},
        sample_ratio=0.0,
    )  # fmt: skip
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    assert len(spans) == 4
    assert [int(answer.headers["traceparent"][-2:], 16) & 1 for answer in answers] == [0, 0, 1]


def test_collector_that_is_away_does_not_fail_a_request(bundle: Path) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is not installed")
    with collect() as collector:
        endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    settings = make_settings(bundle, tracing={"endpoint": endpoint})
    with serve(settings, load_model(ModelSource(path=bundle))) as (url, _):
        assert httpx.post(f"{url}/api/v1/embed", json={"text": "red"}).status_code == 200
