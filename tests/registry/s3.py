"""A real S3 endpoint over HTTP, and a proxy in front of it that breaks what it is told to break."""

import http.client
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
# Another server than moto's, s3://bucket?endpoint=https://…: the bucket is there, credentials are in AWS's variables.
ENDPOINT_VARIABLE = "THORFORGE_TEST_S3"
# Parts may be small, and a listing has several pages.
_SMALL = {
    "S3_UPLOAD_PART_MIN_SIZE": "1024",
    "MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(16 << 20),
    "MOTO_S3_DEFAULT_MAX_KEYS": "3",
}


@contextmanager
def s3_server() -> Iterator[str]:
    """The URL of an empty bucket."""
    if url := os.environ.get(ENDPOINT_VARIABLE):
        yield url
        return
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **CREDENTIALS, **_SMALL},
    )
    try:
        assert process.stderr is not None
        port = next(
            int(m[1]) for line in process.stderr if (m := re.search(r"Running on http://127\.0\.0\.1:(\d+)", line))
        )
        # Its log of requests would fill the pipe.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request(
            "PUT",
            "/registry",
            headers={"Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request"},
        )
        assert connection.getresponse().read() is not None
        connection.close()
        yield f"s3://registry?endpoint=http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


@dataclass(slots=True)
class Request:
    """What the proxy is about to pass on."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


Fault = Callable[["Exchange"], None]


class Exchange:
    """One request on its way; a fault may answer it, cut it, or pass it on and change the answer."""

    def __init__(self, handler: BaseHTTPRequestHandler, request: Request, upstream: str) -> None:
        self.request, self._handler, self._upstream = request, handler, upstream

    def forward(self) -> tuple[int, dict[str, str], bytes]:
        """Ask the server and return its answer."""
        parts = urlsplit(self._upstream)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
        try:
            headers = {k: v for k, v in self.request.headers.items() if k.lower() not in ("expect", "connection")}
            connection.request(self.request.method, self.request.path, self.request.body, headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def answer(self, status: int, headers: dict[str, str], body: bytes, num_sent: int | None = None) -> None:
        """Send an answer, or the first `num_sent` bytes of its body and then nothing any more."""
        self._handler.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self._handler.send_header(name, value)
        length = headers.get("Content-Length", len(body)) if self.request.method == "HEAD" else len(body)
        self._handler.send_header("Content-Length", str(length))
        self._handler.end_headers()
        if self.request.method != "HEAD":
            self._handler.wfile.write(body[:num_sent])
            self._handler.wfile.flush()
        if num_sent is not None:
            self.cut()

    def cut(self) -> None:
        """Close the connection."""
        self._handler.close_connection = True


@dataclass(slots=True)
class Proxy:
    """Breaks what matches: `faults` holds a pattern of `METHOD path`, how often it strikes, and what it does."""

    url: str
    seen: list[str] = field(default_factory=list)
    faults: list[tuple[str, int, Fault]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def strike(self, pattern: str, fault: Fault, times: int = 1) -> None:
        """Let the next `times` requests that match `pattern` fare as `fault` wants."""
        self.faults.append((pattern, times, fault))

    def take(self, line: str) -> Fault | None:
        """The fault that this request meets."""
        with self.lock:
            self.seen.append(line)
            for index, (pattern, times, fault) in enumerate(self.faults):
                if times and re.search(pattern, line):
                    self.faults[index] = (pattern, times - 1, fault)
                    return fault
        return None

    def count(self, pattern: str) -> int:
        """How many requests so far match."""
        return sum(re.search(pattern, line) is not None for line in self.seen)


@contextmanager
def faulty_proxy(upstream: str) -> Iterator[Proxy]:
    """A proxy in front of the endpoint `upstream`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            exchange = Exchange(self, Request(self.command, self.path, dict(self.headers), body), upstream)
            fault = proxy.take(f"{self.command} {self.path}")
            if fault is None:
                exchange.answer(*exchange.forward())
            else:
                fault(exchange)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_one  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that hung up is part of the test."""

    server = Server(("127.0.0.1", 0), Handler)
    proxy = Proxy(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def server_error(exchange: Exchange) -> None:
    """500 without asking the server."""
    exchange.answer(500, {}, b"<Error><Code>InternalError</Code><Message>try again</Message></Error>")


def cut_at_once(exchange: Exchange) -> None:
    """Hang up instead of answering; the server never hears of it."""
    exchange.cut()


def lose_answer(exchange: Exchange) -> None:
    """The server does it, and nobody says so."""
    exchange.forward()
    exchange.cut()


def cut_body(exchange: Exchange) -> None:
    """Half the body, then nothing."""
    status, headers, body = exchange.forward()
    exchange.answer(status, headers, body, num_sent=len(body) // 2)


def change_byte(exchange: Exchange) -> None:
    """One bit of the body is another."""
    status, headers, body = exchange.forward()
    exchange.answer(status, headers, body[:-1] + bytes([body[-1] ^ 1]))
