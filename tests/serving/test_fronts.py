"""A worker whose HTTP is spoken by two front processes, beside one that speaks it itself."""

import json
import shutil
import socket
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from serving.fronts import share_port
from serving.models import LoadedModel, load_model
from serving.server import WorkerServer, bind
from serving.settings import ModelSource, Settings, dump_settings
from tests.certificates import write_pair
from tests.serving.conftest import PreparedWorker, keep_open, make_settings, serve, wait_until, with_engine
from tests.serving.engines import HeldEngine

WAIT = 30
TOKEN = {"authorization": "Bearer token"}


@pytest.fixture(scope="module")
def fronts(bundle: Path) -> Iterator[str]:
    """The address of a worker with two fronts."""
    settings = make_settings(bundle, http_processes=2)
    with serve(settings, load_model(ModelSource(path=bundle))) as (address, _):
        yield address


def embed(url: str, *texts: str, **options: Any) -> httpx.Response:
    return httpx.post(f"{url}/api/v1/embed", json={"texts": list(texts)}, timeout=WAIT, **options)


def value(url: str, line: str) -> float:
    """The value of one line of the metrics, 0 where there is none."""
    lines = httpx.get(f"{url}/metrics", timeout=WAIT).text.splitlines()
    return sum(float(each.rpartition(" ")[2]) for each in lines if each.startswith(line))


def children(server: WorkerServer) -> list[psutil.Process]:
    """The front processes, without one that has ended and is about to be replaced."""
    assert server._fronts is not None
    found = []
    for link in list(server._fronts._links):
        with suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(link.process.pid))
    return found


NATIVE, OPENAI, TEI = "/api/v1/embed", "/v1/embeddings", "/embed"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (NATIVE, {"text": "red cat"}),
        (NATIVE, {"texts": ["red cat", "one two three"] * 40, "dimensions": 3, "prompt": "query"}),
        (NATIVE, {"texts": ["red"], "encoding_format": "base64"}),
        (OPENAI, {"input": "blue dog", "model": "tiny"}),
        (OPENAI, {"input": ["blue dog", "green"] * 9, "model": "tiny", "encoding_format": "base64"}),
        (TEI, {"inputs": "hello world"}),
        (TEI, {"inputs": ["hello " * 40, "world"], "truncation_direction": "Left"}),
        (NATIVE, {"text": "red", "dimensions": 99}),
        (NATIVE, {"text": "red", "prompt": "none"}),
        (NATIVE, {"text": "red", "use_custom_kernels": True}),
        (NATIVE, {"text": "red " * 40, "truncate": False}),
        (OPENAI, {"input": "red", "model": "other"}),
        (OPENAI, {"input": [], "model": "tiny"}),
        (TEI, {"inputs": "red", "unknown": 1}),
        (TEI, {"inputs": "r" * 7_000_000}),
        ("/nowhere", {}),
        ("/api/v1/admin/traffic", {}),
    ],
)
def test_answers_are_the_same_bytes_as_without_fronts(url: str, fronts: str, path: str, body: dict[str, Any]) -> None:
    answers = [httpx.post(address + path, json=body, timeout=WAIT) for address in (url, fronts)]
    plain, through = ([answer.status_code, answer.headers.get("x-model-version")] for answer in answers)
    assert plain == through
    contents = [answer.json() for answer in answers]
    for content in contents:
        if path == NATIVE:
            content.pop("latency_ms", None)
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    "path",
    [
        "/healthz", "/readyz", "/readyz?model=tiny", "/readyz?model=none", "/api/v1/models", "/api/v1/validate",
        "/info", "/v1/models", "/v1/models/%74iny", "/v1/models/none", "/v1/embeddings", "/docs", "/openapi.json", "/",
    ],
)  # fmt: skip
def test_everything_else_is_the_engine_process_s_answer(url: str, fronts: str, path: str) -> None:
    answers = [httpx.get(address + path, timeout=WAIT) for address in (url, fronts)]
    assert [answers[0].status_code, answers[0].content] == [answers[1].status_code, answers[1].content]
    ours, theirs = ({k: v for k, v in answer.headers.items() if k != "date"} for answer in answers)
    assert ours == theirs


def test_requests_are_counted_once_whoever_answered_them(bundle: Path, model: LoadedModel) -> None:
    with serve(make_settings(bundle, http_processes=2), keep_open(model)) as (url, _):
        for number in range(12):  # each on a connection of its own, so that both fronts get some
            assert embed(url, "red", f"cat {number}").status_code == 200
        assert httpx.post(url + NATIVE, content=b"no JSON").status_code == 400
        version = f'{{model="tiny",model_version="{model.manifest.version}"'
        wait_until(lambda: value(url, f"akidb_embed_latency_seconds_count{version}") == 12)
        assert value(url, f'akidb_embed_requests_total{version},status="200"') == 12
        wait_until(lambda: value(url, 'akidb_embed_requests_total{model="none",model_version="none",status="400"') == 1)
        assert value(url, 'akidb_embed_errors_total{error="invalid_request",model="none"') == 1
        assert value(url, "akidb_front_restarts_total") == 0


def test_keys_are_asked_for_at_the_fronts(bundle: Path, model: LoadedModel) -> None:
    settings = make_settings(bundle, http_processes=1, security={"api_keys": "key", "admin_tokens": "token"})
    assert Settings.model_validate_json(dump_settings(settings)) == settings
    with serve(settings, keep_open(model)) as (url, _):
        assert embed(url, "red").status_code == 401
        assert embed(url, "red").headers["www-authenticate"].startswith("Bearer")
        assert embed(url, "red", headers={"authorization": "Bearer key"}).status_code == 200
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/readyz").status_code == 200
        assert httpx.get(f"{url}/api/v1/admin/models", headers=TOKEN).status_code == 200
        assert value(url, 'akidb_embed_errors_total{error="invalid_api_key",model="none"') == 2


def test_overload_and_deadline_are_the_engine_process_s_to_say(bundle: Path, model: LoadedModel) -> None:
    engine = HeldEngine(model.engine)
    settings = make_settings(bundle, http_processes=2, batching={"max_queue_size": 1}, request_timeout_seconds=2)
    with serve(settings, with_engine(model, engine)) as (url, server), ThreadPoolExecutor(2) as clients:
        running = clients.submit(embed, url, "red")
        assert engine.entered.wait(WAIT)
        queued = clients.submit(embed, url, "blue")
        wait_until(lambda: len(server.worker.resolve(None)._queue) == 1)
        refused = embed(url, "green")
        assert (refused.status_code, int(refused.headers["retry-after"]) >= 1) == (429, True)
        assert "the queue is full" in refused.json()["error"]["message"]
        assert [future.result().status_code for future in (running, queued)] == [504, 504]
        engine.gate.set()


def test_client_that_hangs_up_at_a_front_costs_no_engine_run(bundle: Path, model: LoadedModel) -> None:
    engine = HeldEngine(model.engine)
    settings = make_settings(bundle, http_processes=1)
    with serve(settings, with_engine(model, engine)) as (url, server), ThreadPoolExecutor(1) as clients:
        running = clients.submit(embed, url, "red")
        assert engine.entered.wait(WAIT)
        body = json.dumps({"texts": ["cat", "dog"]}).encode()
        with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as connection:
            connection.sendall(
                b"POST %b HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % (NATIVE.encode(), len(body))
            )
            connection.sendall(body)
            wait_until(lambda: len(server.worker.resolve(None)._queue) == 2)
        label = f'model="tiny",model_version="{model.manifest.version}",status="499"'
        wait_until(lambda: value(url, f"akidb_embed_requests_total{{{label}") == 1)
        wait_until(lambda: server.worker.resolve(None).num_accepted == 1)
        engine.gate.set()
        assert running.result().status_code == 200
        assert embed(url, "dog").status_code == 200
    assert sum(size for size, _ in engine.shapes) == 2


def test_front_that_dies_is_replaced_and_the_others_go_on(bundle: Path, model: LoadedModel) -> None:
    with serve(make_settings(bundle, http_processes=2), keep_open(model)) as (url, server):
        first, second = children(server)
        with httpx.Client(timeout=WAIT) as client:
            owner = owner_of(client, url, (first, second))
            other = second if owner == first else first
            other.kill()
            for _ in range(5):
                assert client.post(url + NATIVE, json={"text": "red"}).status_code == 200
            wait_until(lambda: value(url, "akidb_front_restarts_total") == 1)
            wait_until(lambda: len(children(server)) == 2)
        for _ in range(8):  # some of them at the new one, perhaps while it still starts
            assert embed(url, "red").status_code == 200
        assert owner in children(server)


def owner_of(client: httpx.Client, url: str, processes: tuple[psutil.Process, ...]) -> psutil.Process:
    """Which process has the connection that `client` keeps."""
    answer = client.get(f"{url}/healthz")
    _, port = answer.extensions["network_stream"].get_extra_info("client_addr")
    held = [each for each in processes for link in each.net_connections() if link.raddr and link.raddr.port == port]
    assert len(held) == 1
    return held[0]


def test_every_share_of_a_port_gets_connections() -> None:
    shares = share_port(socket.create_server(("127.0.0.1", 0)), 2)
    address = shares[0].getsockname()
    clients = [socket.create_connection(address) for _ in range(64)]
    accepted = []
    for share in shares:
        assert share.getsockname() == address
        count = 0
        try:
            while True:
                share.accept()[0].close()
                count += 1
        except BlockingIOError:
            accepted.append(count)
    assert sum(accepted) == 64
    assert min(accepted) > 0
    for each in (*shares, *clients):
        each.close()


def test_version_and_key_choose_the_service_at_the_front(bundles: Path) -> None:
    models = {"available": [{"path": bundles / "v0"}], "root": bundles}
    settings = make_settings(
        bundles / "v0", http_processes=1, models=models, security={"admin_tokens": "token"}, cache_bytes=10_000
    )
    admin = partial(httpx.post, headers=TOKEN, timeout=WAIT)
    with serve(settings, load_model(ModelSource(path=bundles / "v0"))) as (url, _):
        first = embed(url, "red")
        added = admin(f"{url}/api/v1/admin/models/load", json={"bundle": "v1"}).json()["model_version"]
        asked = embed(url, "red", headers={"x-model-version": added})
        assert asked.headers["x-model-version"] == added
        assert asked.json()["embeddings"] != first.json()["embeddings"]
        weights = {added: 1, first.headers["x-model-version"]: 1}
        shared = {"model": "tiny", "weights": weights}
        assert httpx.put(f"{url}/api/v1/admin/traffic", json=shared, headers=TOKEN).status_code == 200
        assert {embed(url, "red").headers["x-model-version"] for _ in range(8)} == set(weights)
        keyed = {embed(url, "red", headers={"x-traffic-key": "k"}).headers["x-model-version"] for _ in range(4)}
        assert len(keyed) == 1
        assert admin(f"{url}/api/v1/admin/models/unload", json={"model": "tiny", "version": added}).status_code == 200
        assert embed(url, "red", headers={"x-model-version": added}).status_code == 404
        assert admin(f"{url}/api/v1/admin/models/load", json={"bundle": "damaged"}).status_code == 422
        too_large = admin(f"{url}/api/v1/admin/models/load", content=b" " * 70_000)
        assert too_large.status_code == 413


def test_request_log_is_written_once_for_all_fronts(bundle: Path, model: LoadedModel, tmp_path: Path) -> None:
    log = {"folder": tmp_path / "log", "sample_ratio": 1, "text": "full"}
    with serve(make_settings(bundle, http_processes=2, request_log=log), keep_open(model)) as (url, _):
        for number in range(4):
            assert embed(url, f"red {number}", "cat").status_code == 200
        wait_until(lambda: value(url, 'akidb_request_log_texts_total{outcome="written"') == 8)
    (file,) = (tmp_path / "log").iterdir()
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(record["text"] for record in records) == [*["cat"] * 4, *(f"red {number}" for number in range(4))]


def test_fronts_speak_https(bundle: Path, model: LoadedModel, tmp_path: Path) -> None:
    certificate, key = write_pair(tmp_path, "tls")
    trust = ssl.create_default_context(cafile=certificate)
    settings = make_settings(bundle, http_processes=2, tls={"certificate": certificate, "key": key})
    with serve(settings, keep_open(model)) as (url, _):
        assert url.startswith("https://")
        answers = [
            httpx.post(url + NATIVE, json={"text": "red"}, verify=trust, timeout=WAIT),
            httpx.get(f"{url}/readyz", verify=trust, timeout=WAIT),
        ]
        assert [answer.status_code for answer in answers] == [200, 200]


def test_front_that_does_not_take_a_change_over_is_ended(
    bundle: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.fronts._APPLY_SECONDS", 5)
    settings = make_settings(bundle, http_processes=2, security={"admin_tokens": "token"})
    with serve(settings, keep_open(model)) as (url, server), httpx.Client(timeout=WAIT) as client:
        first, second = children(server)
        stuck = second if owner_of(client, url, (first, second)) == first else first
        stuck.suspend()
        weights = {"model": "tiny", "weights": {model.manifest.version: 2}}
        assert client.put(f"{url}/api/v1/admin/traffic", json=weights, headers=TOKEN).status_code == 200
        wait_until(lambda: stuck not in children(server))
        wait_until(lambda: len(children(server)) == 2)
        for _ in range(8):
            assert embed(url, "red").status_code == 200


def test_worker_whose_fronts_do_not_start_ends_and_says_so(
    bundle: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.fronts._START_SECONDS", 1)
    monkeypatch.setattr("serving.fronts.sys.executable", shutil.which("false"))
    settings = make_settings(bundle, http_processes=2)
    server = WorkerServer(PreparedWorker(settings, keep_open(model)))
    server.run(sockets=[bind(settings)])
    assert str(server.failure) == "0 of 2 front processes serve: the log has why"
