"""HTTPS by setting: certificates that are renewed, refused or unusable, and handshakes within limits."""

import asyncio
import os
import socket
import ssl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from serving.errors import ConfigInvalid
from serving.models import load_model
from serving.server import WorkerServer
from serving.settings import ModelSource, TlsSettings
from serving.tls import Certificate, TlsListener, open_certificate
from tests.certificates import write_pair
from tests.serving.conftest import make_settings, serve, wait_until, with_engine
from tests.serving.engines import HeldEngine


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("tls"), "worker")


class Ticks:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Rotated:
    """A certificate of which time passes and reloads are seen."""

    def __init__(self, pair: tuple[Path, Path]) -> None:
        self.ticks, self.outcomes = Ticks(), list[str]()
        opened = open_certificate(TlsSettings(certificate=pair[0], key=pair[1]), self.outcomes.append, self.ticks)
        assert opened is not None
        self.certificate: Certificate = opened

    def look(self, times: int = 1) -> None:
        for _ in range(times):
            self.ticks.now += 1
            self.certificate.refresh()


def project(folder: Path, generation: Path) -> None:
    """Point `..data` at a generation in one step, as the kubelet does with a renewed secret."""
    fresh = folder / "..data_tmp"
    fresh.symlink_to(generation)
    fresh.replace(folder / "..data")


def mount(folder: Path) -> tuple[Path, Path]:
    """A secret as it is mounted: `tls.crt` and `tls.key` are links through `..data`."""
    paths = folder / "tls.crt", folder / "tls.key"
    for path in paths:
        path.symlink_to(f"..data/{path.name}")
    return paths


def make_generation(folder: Path, days: int = 1) -> Path:
    folder.mkdir()
    write_pair(folder, "tls", days)
    return folder


def served_certificate(url: str) -> str:
    return ssl.get_server_certificate((str(urlsplit(url).hostname), urlsplit(url).port or 0), timeout=30)


def connect(url: str) -> socket.socket:
    return socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=30)


def num_handshakes(server: WorkerServer) -> int:
    return sum(listener.num_handshakes for listener in server.servers if isinstance(listener, TlsListener))


def test_https_is_spoken_and_plain_http_is_not(bundle: Path, pair: tuple[Path, Path]) -> None:
    settings = make_settings(bundle, tls={"certificate": pair[0], "key": pair[1]})
    with serve(settings, load_model(ModelSource(path=bundle))) as (url, _):
        assert url.startswith("https://")
        trust = ssl.create_default_context(cafile=pair[0])
        answer = httpx.post(f"{url}/api/v1/embed", json={"texts": ["red"] * 2000}, verify=trust)
        assert len(answer.json()["embeddings"]) == 2000
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/healthz")  # not signed by anybody
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            httpx.get(f"{url.replace('https', 'http')}/healthz")


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_request_sent_with_the_end_of_the_handshake_is_answered(
    bundle: Path, pair: tuple[Path, Path], loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WorkerServer, "run", run_on(loop))
    client = ssl.create_default_context(cafile=pair[0])
    settings = make_settings(bundle, tls={"certificate": pair[0], "key": pair[1]})
    with serve(settings, load_model(ModelSource(path=bundle))) as (url, _), connect(url) as plain:
        to_client, to_worker = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = client.wrap_bio(to_client, to_worker, server_hostname="127.0.0.1")
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                plain.sendall(to_worker.read())
                to_client.write(plain.recv(65536))
        tls.write(b"GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        plain.sendall(to_worker.read())  # the handshake's last message and the request are one packet
        answer = b""
        while b"\r\n\r\n" not in answer:
            try:
                answer += tls.read(65536)
            except ssl.SSLWantReadError:
                to_client.write(plain.recv(65536))
    assert answer.startswith(b"HTTP/1.1 200 ")


def run_on(loop: str) -> Callable[..., None]:
    import uvloop  # where the platform has it

    def run(server: WorkerServer, sockets: list[socket.socket]) -> None:
        factory = uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(server.serve(sockets=sockets))

    return run


def test_handshake_has_to_end_in_time(bundle: Path, pair: tuple[Path, Path]) -> None:
    limits = {"header_timeout_seconds": 0.2}
    settings = make_settings(bundle, tls={"certificate": pair[0], "key": pair[1]}, limits=limits)
    with serve(settings, load_model(ModelSource(path=bundle))) as (url, server):
        with connect(url) as half_open, suppress(ConnectionResetError):
            assert half_open.recv(1) == b""  # without a limit of ours the loop's own, a minute, holds
        wait_until(lambda: num_handshakes(server) == 0)


def test_handshake_counts_as_a_connection(bundle: Path, pair: tuple[Path, Path]) -> None:
    limits = {"header_timeout_seconds": 60, "max_connections": 3}
    settings = make_settings(bundle, tls={"certificate": pair[0], "key": pair[1]}, limits=limits)
    trust = ssl.create_default_context(cafile=pair[0])
    with serve(settings, load_model(ModelSource(path=bundle))) as (url, server):
        with ExitStack() as stack, httpx.Client(verify=trust) as client:
            assert client.get(f"{url}/healthz").status_code == 200
            for _ in range(2):
                stack.enter_context(connect(url))
            with connect(url) as extra, suppress(ConnectionResetError):
                assert extra.recv(1) == b""  # at once, though the two have said nothing yet
            assert client.get(f"{url}/healthz").status_code == 200
        wait_until(lambda: num_handshakes(server) == 0)
        assert httpx.get(f"{url}/healthz", verify=trust).status_code == 200


def test_drain_does_not_wait_for_a_handshake(bundle: Path, pair: tuple[Path, Path]) -> None:
    settings = make_settings(
        bundle, tls={"certificate": pair[0], "key": pair[1]}, limits={"header_timeout_seconds": 60}
    )
    with ExitStack() as stack:
        with serve(settings, load_model(ModelSource(path=bundle))) as (url, server):
            silent = stack.enter_context(connect(url))
            wait_until(lambda: num_handshakes(server) == 1)
        with suppress(ConnectionResetError):  # `serve` gives up where the drain lasts as long as the handshake may
            assert silent.recv(1) == b""


def test_drain_does_not_wait_for_the_farewell_of_an_idle_client(bundle: Path, pair: tuple[Path, Path]) -> None:
    settings = make_settings(bundle, tls={"certificate": pair[0], "key": pair[1]})
    trust = ssl.create_default_context(cafile=pair[0])
    with ExitStack() as stack, serve(settings, load_model(ModelSource(path=bundle))) as (url, _):
        plain = stack.enter_context(connect(url))
        idle = stack.enter_context(trust.wrap_socket(plain, server_hostname="127.0.0.1"))
        idle.sendall(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n")
        assert idle.recv(65536).startswith(b"HTTP/1.1 200 ")  # `serve` gives up before the loop would


def test_drain_answers_what_it_accepted_and_closes_the_door(bundle: Path, pair: tuple[Path, Path]) -> None:
    settings = make_settings(bundle, tls={"certificate": pair[0], "key": pair[1]})
    trust = ssl.create_default_context(cafile=pair[0])
    loaded = load_model(ModelSource(path=bundle))
    engine = HeldEngine(loaded.engine)
    with ThreadPoolExecutor(1) as pool, serve(settings, with_engine(loaded, engine)) as (url, server):
        asked = pool.submit(httpx.post, f"{url}/api/v1/embed", json={"text": "red"}, verify=trust)
        assert engine.entered.wait(20)
        server.should_exit = True
        wait_until(lambda: is_refused(url))
        engine.gate.set()
        assert asked.result(20).status_code == 200


def is_refused(url: str) -> bool:
    try:
        connect(url).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # it stood in the line when the door closed
        return False
    return False


def test_renewed_certificate_is_served_without_a_restart_and_open_connections_go_on(
    bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "secret"
    folder.mkdir()
    generations = [make_generation(tmp_path / name) for name in ("first", "second")]
    project(folder, generations[0])
    certificate, key = mount(folder)
    settings = make_settings(bundle, tls={"certificate": certificate, "key": key})
    old, new = ((generation / "tls.crt").read_text() for generation in generations)
    with serve(settings, load_model(ModelSource(path=bundle))) as (url, _):
        with httpx.Client(verify=ssl.create_default_context(cafile=generations[0] / "tls.crt")) as client:
            assert client.get(f"{url}/healthz").status_code == 200
            assert served_certificate(url) == old
            project(folder, generations[1])
            wait_until(lambda: served_certificate(url) == new)
            assert client.get(f"{url}/healthz").status_code == 200  # on the connection that it has
        trust = ssl.create_default_context(cafile=generations[1] / "tls.crt")
        metrics = httpx.get(f"{url}/metrics", verify=trust).text
    assert 'akidb_tls_reloads_total{outcome="loaded"} 1.0' in metrics


def test_new_pair_that_cannot_be_used_is_refused_once_and_the_old_one_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    certificate, key = write_pair(tmp_path, "worker")
    rotated = Rotated((certificate, key))
    first = rotated.certificate.context
    other, other_key = write_pair(tmp_path, "other")
    expired, expired_key = write_pair(tmp_path, "expired", days=-1)
    wrong = [
        (other.read_text(), key.read_text(), "are no pair"),
        ("hello", key.read_text(), "is no PEM file"),
        (expired.read_text(), expired_key.read_text(), "certificate has expired"),
        (None, key.read_text(), "cannot read"),
    ]
    for number, (text, key_text, reason) in enumerate(wrong, start=1):
        put(certificate, text)
        put(key, key_text)
        rotated.look(5)
        assert rotated.outcomes == ["refused"] * number
        assert rotated.certificate.context is first
        assert reason in caplog.records[-1].message
        assert "the old one stays" in caplog.records[-1].message
    put(certificate, other.read_text())
    put(key, other_key.read_text())
    rotated.look(2)
    assert rotated.outcomes[-1] == "loaded"
    assert rotated.certificate.context is not first


def put(path: Path, text: str | None) -> None:
    """By renaming; None: take it away."""
    if text is None:
        path.unlink()
    else:
        fresh = path.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(path)


def test_pair_is_not_read_while_only_one_of_its_files_is_new(tmp_path: Path) -> None:
    certificate, key = write_pair(tmp_path, "worker")
    other, other_key = write_pair(tmp_path, "other")
    rotated = Rotated((certificate, key))
    other.replace(certificate)
    rotated.look()
    other_key.replace(key)
    rotated.look(3)
    assert rotated.outcomes == ["loaded"]


def test_files_are_looked_at_no_more_often_than_every_second(tmp_path: Path) -> None:
    certificate, key = write_pair(tmp_path, "worker")
    rotated = Rotated((certificate, key))
    write_pair(tmp_path, "worker")
    rotated.ticks.now = 0.9
    for _ in range(10):
        rotated.certificate.refresh()
    assert rotated.outcomes == []
    rotated.look(2)
    assert rotated.outcomes == ["loaded"]
    os.utime(certificate, (1, 1))  # touched: read again, which costs nothing
    rotated.look(2)
    assert rotated.outcomes == ["loaded"] * 2


def open_silently(settings: TlsSettings) -> Certificate | None:
    return open_certificate(settings, lambda _: None, time.monotonic)


def test_no_certificate_means_http() -> None:
    assert open_silently(TlsSettings()) is None


def test_files_that_cannot_be_used_are_named(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    certificate, key = pair
    other = write_pair(tmp_path, "other")[1]
    text, binary, locked = tmp_path / "text", tmp_path / "binary", tmp_path / "locked"
    text.write_text("hello")
    binary.write_bytes(b"\xff\x00")
    locked.write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
    cases = [
        ({"certificate": certificate}, "embedding.tls.certificate needs embedding.tls.key"),
        ({"key": key}, "embedding.tls.key needs embedding.tls.certificate"),
        ({"certificate": tmp_path / "none", "key": key}, f"embedding.tls.certificate: cannot read {tmp_path}/none: No"),
        ({"certificate": text, "key": key}, f"embedding.tls.certificate: {text} is no PEM file"),
        ({"certificate": certificate, "key": binary}, f"embedding.tls.key: {binary} is no PEM file"),
        ({"certificate": certificate, "key": locked}, f"embedding.tls.key: {locked} has a passphrase"),
        ({"certificate": certificate, "key": other}, f"{certificate} and {other} are no pair"),
    ]
    for values, message in cases:
        with pytest.raises(ConfigInvalid) as refused:
            open_silently(TlsSettings.model_validate(values))
        assert message in str(refused.value)
