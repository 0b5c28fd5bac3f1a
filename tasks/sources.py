"""Anything that embeds text (a model, a bundle, a running worker) behind one call, for side-by-side evaluation."""

import base64
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

from registry.manifest import MANIFEST_NAME, verify_bundle
from serving.engines import Embeddings
from serving.settings import check_secret
from tasks.errors import SourceUnreachable
from tasks.evaluate import Encode, choose_entry, open_encoder
from tasks.models.teacher import locate_teacher, open_teacher
from tasks.progress import Advance

_REQUEST_TEXTS = 128
_TIMEOUT_SECONDS = 300.0
API_KEY_VARIABLE = "THORFORGE_API_KEY"
_RETRIES = 5  # of a request the worker was too busy for, each after the time it asks for


@dataclass(frozen=True, slots=True)
class Source:
    """What is evaluated: its kind (`model`, `bundle` or `worker`), its name, and its encoding."""

    kind: str
    name: str
    encode: Encode
    close: Callable[[], None]


def open_source(source: str) -> Source:
    """Open a worker's URL, a bundle folder or a model URI.

    Raises SourceUnreachable, RegistryError (a damaged bundle) or TeacherRejected (a model we will not run).
    """
    if source.startswith(("http://", "https://")):
        return _open_worker(source.rstrip("/"))
    folder = Path(source)
    if (folder / MANIFEST_NAME).is_file():
        return _open_bundle(folder)
    model = locate_teacher(source)
    return Source("model", source, open_teacher(model), lambda: None)


def _open_bundle(folder: Path) -> Source:
    manifest = verify_bundle(folder)
    encode, engine = open_encoder(folder, choose_entry(folder), manifest.max_seq_length)
    return Source("bundle", f"{manifest.model_name} {manifest.version}", encode, engine.close)


def _open_worker(url: str) -> Source:
    client = _connect(url)
    try:
        reply = client.get("/api/v1/models")
        if reply.status_code == httpx.codes.UNAUTHORIZED:
            raise SourceUnreachable(
                f"{url} wants an API key (401), and that of {API_KEY_VARIABLE} is not one of its own"
            )
        models = reply.raise_for_status().json()["models"]
        model = next(entry for entry in models if entry["default"])
        title = f"{model['name']} {model['version']}"
    except (httpx.HTTPError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise SourceUnreachable(
            f"{url} does not answer as a thorforge worker: {type(error).__name__}: {error}"
        ) from None

    def encode(texts: Sequence[str], advance: Advance) -> Embeddings:
        parts = []
        for start in range(0, len(texts), _REQUEST_TEXTS):
            batch = list(texts[start : start + _REQUEST_TEXTS])
            parts.append(_embed_remote(client, model["name"], batch))
            advance(len(batch))
        return np.concatenate(parts)

    return Source("worker", title, encode, client.close)


def _connect(url: str) -> httpx.Client:
    """A client with the key of the environment, and its certificates: no proxy stands between us and a worker."""
    key = os.environ.get(API_KEY_VARIABLE)
    try:
        headers = {} if key is None else {"authorization": f"Bearer {check_secret(key, API_KEY_VARIABLE)}"}
    except ValueError as error:
        raise SourceUnreachable(str(error)) from None
    try:
        trust = httpx.create_ssl_context()
    except OSError as error:
        raise SourceUnreachable(f"SSL_CERT_FILE or SSL_CERT_DIR holds no certificates: {error}") from None
    return httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT_SECONDS, trust_env=False, verify=trust)


def _embed_remote(client: httpx.Client, model: str, texts: list[str]) -> Embeddings:
    body = {"model": model, "texts": texts, "encoding_format": "base64"}
    try:
        reply = client.post("/api/v1/embed", json=body)
        for _ in range(_RETRIES):
            if reply.status_code != httpx.codes.TOO_MANY_REQUESTS:
                break
            time.sleep(float(reply.headers["retry-after"]))
            reply = client.post("/api/v1/embed", json=body)
        rows = reply.raise_for_status().json()["embeddings"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise SourceUnreachable(f"{client.base_url} failed to embed: {type(error).__name__}: {error}") from None
    return np.stack([np.frombuffer(base64.b64decode(row), dtype="<f4") for row in rows])
