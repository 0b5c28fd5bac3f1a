"""HTTPS by setting; a certificate that cannot be used stops the worker and names the file."""

import datetime
import ipaddress
import socket
import ssl
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from serving.errors import ConfigInvalid
from serving.models import load_model
from serving.server import load_tls
from serving.settings import ModelSource, TlsSettings
from tests.serving.conftest import make_settings, serve


def write_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "worker")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / f"{name}.crt", folder / f"{name}.key"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    pkcs8 = serialization.PrivateFormat.PKCS8
    paths[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, pkcs8, plain))
    return paths


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
