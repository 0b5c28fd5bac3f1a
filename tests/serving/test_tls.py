"""HTTPS by setting; a certificate that cannot be used stops the worker and names the file."""

import socket
import ssl
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from serving.errors import ConfigInvalid
from serving.models import load_model
from serving.server import load_tls
from serving.settings import ModelSource, TlsSettings
from tests.certificates import write_pair
from tests.serving.conftest import make_settings, serve


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("tls"), "worker")


def test_https_is_spoken_and_plain_http_is_not(bundle: Path, pair: tuple[Path, Path]) -> None:
    settings = make_settings(bundle, tls={"certificate": pair[0], "key": pair[1]})
    with serve(settings, load_model(ModelSource(path=bundle))) as (url, _):
        assert url.startswith("https://")
        trust = ssl.create_default_context(cafile=pair[0])
        answer = httpx.post(f"{url}/api/v1/embed", json={"texts": ["red"] * 2000}, verify=trust)
        assert len(answer.json()["embeddings"]) == 2000
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/healthz")  # not signed by anybody
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"{url.replace('https', 'http')}/healthz")


def test_handshake_has_to_end_in_time(bundle: Path, pair: tuple[Path, Path]) -> None:
    limits = {"header_timeout_seconds": 0.2}
    settings = make_settings(bundle, tls={"certificate": pair[0], "key": pair[1]}, limits=limits)
    with serve(settings, load_model(ModelSource(path=bundle))) as (url, _):
        host, port = urlsplit(url).netloc.split(":")
        with socket.create_connection((host, int(port)), timeout=30) as half_open, suppress(ConnectionResetError):
            assert half_open.recv(1) == b""  # without a limit of ours the loop's own, a minute, holds


def test_no_certificate_means_http() -> None:
    assert load_tls(TlsSettings()) is None


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
            load_tls(TlsSettings.model_validate(values))
        assert message in str(refused.value)
