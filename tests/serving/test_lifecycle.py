"""Overload, faults, health and drain of a real server, in a thread."""

import json
import math
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from serving.admission import Backlog
from serving.errors import ConfigInvalid, Overloaded
from serving.models import LoadedModel
from serving.server import WorkerServer, base_url, bind
from serving.worker import Worker
from tests.bundles import WORDS
from tests.serving.conftest import keep_open, make_settings, serve, wait_until, with_engine
from tests.serving.engines import FaultyEngine, HeldEngine, WrappedEngine, nan_on, raise_on

CAT = 12
WAIT = 10


def embed(url: str, *texts: str) -> httpx.Response:
    return httpx.post(f"{url}/api/v1/embed", json={"texts": list(texts)}, timeout=20)


def wait_for_queue(server: WorkerServer, num_texts: int) -> None:
    """Return when so many texts wait: requests are on their way through the socket."""
    wait_until(lambda: len(server.worker.resolve(None)._queue) >= num_texts)


def metric(url: str, line: str) -> bool:
    return line in httpx.get(f"{url}/metrics").text


def labels(model: LoadedModel) -> str:
    return f'model="tiny",model_version="{model.manifest.version}"'


def test_overload_is_refused_with_retry_after(bundle: Path, model: LoadedModel) -> None:
    engine = HeldEngine(model.engine)
    settings = make_settings(bundle, batching={"max_queue_size": 2})
    with serve(settings, with_engine(model, engine)) as (url, server), ThreadPoolExecutor(4) as clients:
        running = clients.submit(embed, url, "red")
        assert engine.entered.wait(WAIT)
        # Requests of one text and of several have a limit each: neither kind fills the queue for the other.
        queued = [clients.submit(embed, url, *texts) for texts in (["blue", "cat", "dog"], ["green"], ["hello"])]
        wait_for_queue(server, 5)
        for texts in (["red"], ["red"] * 2048):
            refused = embed(url, *texts)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
        assert metric(url, f'akidb_embed_errors_total{{error="overloaded",{labels(model)}}} 2.0')
        assert metric(url, 'akidb_queue_depth{model="tiny"')
        engine.gate.set()
        assert {answer.result().status_code for answer in (running, *queued)} == {200}
        assert embed(url, "red").status_code == 200


def test_flood_is_turned_away_before_its_requests_are_parsed(bundle: Path, model: LoadedModel) -> None:
    with serve(make_settings(bundle), keep_open(model)) as (url, server):
        service = server.worker.resolve(None)
        with pytest.raises(Overloaded):
            service._admission.check(Backlog(9, 99, is_full=False, due_tokens=99, seconds=60), now=math.inf)
        refused = httpx.post(f"{url}/api/v1/embed", content=b"not JSON")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "60")
        version = model.manifest.version
        line = f'akidb_embed_requests_total{{model="tiny",model_version="{version}",status="429"}} 1.0'
        assert metric(url, line)
        service._admission.standing.drop()
        assert httpx.post(f"{url}/api/v1/embed", content=b"not JSON").status_code == 400


@pytest.mark.parametrize(("fault", "word"), [(raise_on(CAT), "raised"), (nan_on(CAT), "non-finite")])
def test_poison_text_fails_its_own_request_only(bundle: Path, model: LoadedModel, fault: object, word: str) -> None:
    engine = HeldEngine(FaultyEngine(model.engine, fault))  # type: ignore[arg-type]
    with serve(make_settings(bundle), with_engine(model, engine)) as (url, server), ThreadPoolExecutor(9) as clients:
        first = clients.submit(embed, url, "red")
        assert engine.entered.wait(WAIT)
        answers = [
            clients.submit(embed, url, f"dog {word}", "cat" if place == 3 else f"red {word}")
            for place, word in enumerate(WORDS[:8])
        ]
        wait_for_queue(server, 16)
        engine.gate.set()
        statuses = [answer.result().status_code for answer in answers]
        assert first.result().status_code == 200
        assert statuses == [500 if place == 3 else 200 for place in range(8)]
        error = answers[3].result().json()["error"]
        assert error["message"].startswith("text 1: ")
        assert word in error["message"]
        assert error["code"] == "engine_failed"
        assert httpx.get(f"{url}/healthz").status_code == 200
        assert metric(url, f'akidb_embed_errors_total{{error="engine_failed",{labels(model)}}} 1.0')


def test_faults_of_the_engine_say_nothing_of_the_text(
    bundle: Path, model: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    marker = "xyzzymarker"
    said = []
    with caplog.at_level("DEBUG"):
        for fault in (raise_on(CAT, f"cannot embed {marker}"), nan_on(CAT)):
            with serve(make_settings(bundle), with_engine(model, FaultyEngine(model.engine, fault))) as (url, _):
                answer = embed(url, f"{marker} cat")
                assert answer.status_code == 500
                said += [answer.text, httpx.get(f"{url}/metrics").text]
        with serve(
            make_settings(bundle, request_timeout_seconds=0.1), with_engine(model, held := HeldEngine(model.engine))
        ) as (url, _):
            answer = embed(url, marker)
            assert answer.status_code == 504
            said += [answer.text, httpx.get(f"{url}/metrics").text]
            held.gate.set()
    assert marker not in caplog.text + "".join(said)
    assert "engine failed" in caplog.text


def test_stuck_engine_turns_health_bad_and_requests_time_out(bundle: Path, model: LoadedModel) -> None:
    engine = HeldEngine(model.engine)
    settings = make_settings(bundle, request_timeout_seconds=0.2)
    with serve(settings, with_engine(model, engine)) as (url, _):
        late = embed(url, "red")
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "deadline_exceeded"
        # The deadline counts from arrival, the engine's run began a moment later.
        wait_until(lambda: httpx.get(f"{url}/healthz").status_code != 200)
        assert httpx.get(f"{url}/healthz").json() == {"status": "engine stuck or dead"}
        assert httpx.get(f"{url}/readyz").status_code == 503
        assert embed(url, "red").status_code == 503
        engine.gate.set()


def test_engine_that_hangs_is_replaced_and_the_worker_answers_again(bundle: Path, model: LoadedModel) -> None:
    engine = HeldEngine(model.engine)
    prepared = with_engine(model, engine, reopen=lambda: WrappedEngine(model.engine))
    with serve(make_settings(bundle, request_timeout_seconds=0.2), prepared) as (url, _):
        assert embed(url, "red").status_code == 504
        wait_until(lambda: embed(url, "red").status_code == 200)
        assert httpx.get(f"{url}/healthz").status_code == 200
        assert metric(url, 'akidb_engine_events_total{event="abandoned"')
        assert metric(url, 'akidb_engine_events_total{event="rebuilt"')
        engine.gate.set()


def test_client_that_hangs_up_costs_no_engine_run(bundle: Path, model: LoadedModel) -> None:
    engine = HeldEngine(model.engine)
    with serve(make_settings(bundle), with_engine(model, engine)) as (url, _), ThreadPoolExecutor(1) as clients:
        running = clients.submit(embed, url, "red")
        assert engine.entered.wait(WAIT)
        body = json.dumps({"texts": ["cat"] * 5}).encode()
        with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as connection:
            head = b"POST /api/v1/embed HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body)
            connection.sendall(head + body)
        with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as connection:
            connection.sendall(head + body[:10])  # and one that hangs up in the middle of its body
        version = model.manifest.version
        for label in (f'model="tiny",model_version="{version}"', 'model="none",model_version="none"'):
            wait_until(partial(metric, url, f'akidb_embed_requests_total{{{label},status="499"}} 1.0'))
        engine.gate.set()
        assert running.result().status_code == 200
        assert embed(url, "dog").status_code == 200
    assert sum(size for size, _ in engine.shapes) == 2


def test_drain_answers_what_was_accepted_and_refuses_the_rest(bundle: Path, model: LoadedModel) -> None:
    engine = HeldEngine(model.engine)
    settings = make_settings(bundle, drain_grace_seconds=2)  # several requests fit, also on a busy machine
    with serve(settings, with_engine(model, engine)) as (url, server), ThreadPoolExecutor(3) as clients:
        accepted = clients.submit(embed, url, "red")
        assert engine.entered.wait(WAIT)
        with httpx.Client() as kept:
            assert kept.get(f"{url}/readyz").status_code == 200
            server.handle_exit(15, None)
            unready = httpx.get(f"{url}/readyz")
            assert (unready.status_code, unready.json()) == (503, {"status": "draining"})
            assert httpx.get(f"{url}/healthz").status_code == 200
            assert unready.headers.get("connection") == "close"
            late = clients.submit(embed, url, "dog")
            wait_for_queue(server, 1)
            server.worker.refuse()
            refused = embed(url, "dog")
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "not_ready"
            assert refused.headers["connection"] == "close"
        engine.gate.set()
        assert (accepted.result().status_code, late.result().status_code) == (200, 200)


def test_drain_that_runs_out_of_time_still_answers_with_an_error(bundle: Path, model: LoadedModel) -> None:
    engine = HeldEngine(model.engine)
    settings = make_settings(bundle, drain_seconds=1)
    with serve(settings, with_engine(model, engine)) as (url, server), ThreadPoolExecutor(1) as clients:
        accepted = clients.submit(embed, url, "red")
        assert engine.entered.wait(WAIT)
        server.handle_exit(15, None)
        answer = accepted.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
        engine.gate.set()


def test_worker_is_unready_while_it_loads(bundle: Path) -> None:
    worker = Worker(make_settings(bundle))
    assert (worker.phase, worker.is_ready, worker.is_healthy) == ("loading", False, True)


def test_worker_loads_what_is_configured(bundle: Path) -> None:
    import threading

    settings = make_settings(bundle)
    listener, ready = bind(settings), threading.Event()
    server = WorkerServer(Worker(settings), ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    assert ready.wait(WAIT)
    assert embed(base_url(listener), "red").status_code == 200
    server.should_exit = True
    thread.join(WAIT)
    assert server.failure is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": {"available": [{"path": "/nowhere"}]}}, "manifest.json"),
        (
            {"batching": {"max_batch_tokens": 16}, "models": {"default": "other"}},
            "names model other, but the models served are tiny",
        ),
    ],
)
def test_server_ends_when_the_model_cannot_be_served(bundle: Path, changes: dict[str, object], message: str) -> None:
    models = {"available": [{"path": bundle}]} | dict(changes.get("models", {}))  # type: ignore[call-overload]
    settings = make_settings(bundle, **(changes | {"models": models}))
    server = WorkerServer(Worker(settings))
    server.run(sockets=[bind(settings)])
    assert message in str(server.failure)


def test_token_budget_below_the_model_s_length_is_refused(bundle: Path, model: LoadedModel) -> None:
    from dataclasses import replace

    longer = replace(model, manifest=model.manifest.model_copy(update={"max_seq_length": 17}))
    worker = Worker(make_settings(bundle, batching={"max_batch_tokens": 16}))
    with pytest.raises(ConfigInvalid, match="max_batch_tokens = 16 is less than the 17 tokens"):
        worker.add(keep_open(longer))


@pytest.mark.parametrize(
    ("host", "message"), [("no.such.host.invalid", "choose another --host"), ("192.0.2.1", "choose another --host")]
)
def test_address_that_is_not_ours_is_refused(bundle: Path, host: str, message: str) -> None:
    with pytest.raises(ConfigInvalid, match=f"cannot listen on {host}:0: .*{message}"):
        bind(make_settings(bundle, host=host))


def test_address_in_version_6_is_bracketed(bundle: Path) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with bind(make_settings(bundle, host="::1")) as listener:
        assert base_url(listener).startswith("http://[::1]:")
