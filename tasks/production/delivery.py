"""Deliver: have a running worker serve a bundle, and prove by its own answers that it does, and how well."""

import base64
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from registry.cache import fetched
from registry.errors import RegistryError
from registry.events import Proved, Refused
from registry.ledger import append
from registry.manifest import SafeName, verify_bundle
from registry.store import Store
from serving.tokenizer import TextTokenizer
from tasks.errors import VerificationFailed
from tasks.state import state_dir

_POLL_SECONDS = 0.2
_REQUEST_SECONDS = 30.0
# Fewer golden texts than this share that can be written as text again, and nothing was proved.
_MIN_LIVE_SHARE = 0.25


class WorkerConfig(BaseModel):
    """A running worker that a promotion is delivered to and verified on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field(
        pattern=r"^https?://[^/@?#]+(/[^?#]*)?$", description="where the worker answers; recorded, so no secret in it"
    )
    name: SafeName | None = Field(default=None, description="the model's name there; by default the registry's")
    root: Path | None = Field(
        default=None,
        description="the worker's embedding.models.root as seen from here: bundles are pulled there and swapped in by "
        "the admin API; None: the worker follows its channel itself (embedding.models.watch_seconds)",
    )
    admin_token_file: Path | None = Field(default=None, description="file whose first line is an admin token")
    api_key_file: Path | None = Field(default=None, description="file whose first line is an API key")
    timeout_seconds: float = Field(default=60, gt=0, description="how long it may take to serve a new bundle")


class Proof(BaseModel):
    """What a worker answered when it was asked for the golden set; cosines are to the teacher's embeddings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    model_version: str
    digest: str
    golden_mean: float
    golden_min: float
    live_mean: float
    live_min: float
    live_texts: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.url} serves {self.model_version}: golden set {self.golden_mean:.4f} (min {self.golden_min:.4f}), "
            f"{self.live_texts} texts through /api/v1/embed {self.live_mean:.4f} (min {self.live_min:.4f})"
        )


def prove(worker: WorkerConfig, store: Store, model: str, digest: str, asked_by: str) -> Proof:
    """`deliver`, and the proof or what was wrong as an entry of the ledger. Raises what `deliver` raises."""
    try:
        proof = deliver(worker, store, model, digest)
    except (VerificationFailed, RegistryError) as error:
        name, reason = type(error).__name__, str(error)
        append(store, model, Refused(action="verify", bundle=digest, error=name, reason=reason, asked_by=asked_by))
        raise
    numbers = proof.model_dump(include={"model_version", "golden_mean", "golden_min", "live_mean", "live_min"})
    append(
        store,
        model,
        Proved(bundle=digest, worker=worker.url, live_texts=proof.live_texts, asked_by=asked_by, **numbers),
    )
    return proof


def deliver(worker: WorkerConfig, store: Store, model: str, digest: str) -> Proof:
    """Have `worker` serve the bundle `digest`, and prove that it does.

    A worker with a `root` is told through its admin API; another one follows its channel and is waited for. Raises
    VerificationFailed, which says what the worker answered instead, and what `fetched` raises.
    """
    started = time.monotonic()
    with (
        fetched(store, model, digest, worker.root or cache_folder()) as bundle,
        WorkerClient(worker, worker.name or model) as client,
    ):
        if worker.root is not None:
            client.swap(f"{model}/{digest}")
        version = client.wait_until_served(digest, started + worker.timeout_seconds)
        golden = client.validate(version)
        live = client.compare_live(bundle, version, golden["threshold"])
    return Proof(
        url=worker.url,
        model_version=version,
        digest=digest,
        golden_mean=golden["cosine_similarity"]["mean"],
        golden_min=golden["cosine_similarity"]["min"],
        live_mean=float(live.mean()),
        live_min=float(live.min()),
        live_texts=len(live),
        seconds=time.monotonic() - started,
    )


def cache_folder() -> Path:
    """Where pulled bundles lie that no worker has a folder for."""
    return state_dir() / "bundles"


class WorkerClient:
    """One worker, asked about one model; every answer that is not the expected one raises VerificationFailed."""

    def __init__(self, worker: WorkerConfig, name: str) -> None:
        self._worker, self._name = worker, name
        self._http = httpx.Client(base_url=worker.url.rstrip("/"), timeout=_REQUEST_SECONDS, trust_env=False)
        if worker.api_key_file is not None:
            self._http.headers["authorization"] = f"Bearer {_first_line(worker.api_key_file)}"

    def __enter__(self) -> "WorkerClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def swap(self, bundle: str) -> None:
        """Put a bundle below the worker's root in the place of what it serves."""
        headers = {}
        if self._worker.admin_token_file is not None:
            headers["authorization"] = f"Bearer {_first_line(self._worker.admin_token_file)}"
        body = {"bundle": bundle, "name": self._name}
        timeout = max(_REQUEST_SECONDS, self._worker.timeout_seconds)  # it loads and warms up before it answers
        self._ask("POST", "/api/v1/admin/models/swap", json=body, headers=headers, timeout=timeout)

    def read_served(self) -> dict[str, str]:
        """What answers requests that name no version: digest → version."""
        models = self._ask("GET", "/api/v1/models")["models"]
        return {m["digest"]: m["version"] for m in models if m["name"] == self._name and m["weight"] > 0}

    def wait_until_served(self, digest: str, deadline: float) -> str:
        """The version under which every request that names none gets `digest`."""
        while True:
            served = self.read_served()
            if list(served) == [digest]:
                return str(served[digest])
            if time.monotonic() > deadline:
                now = ", ".join(served.values()) or "nothing"
                raise VerificationFailed(
                    f"{self._worker.url} serves {now} of {self._name}, not {digest}, "
                    f"after {self._worker.timeout_seconds:g} s (promote.workers.timeout_seconds)"
                )
            time.sleep(_POLL_SECONDS)

    def validate(self, version: str) -> dict[str, Any]:
        """The worker's own judgement of its golden set; one below its threshold is a failure."""
        answer = self._ask("GET", "/api/v1/validate", params={"model": self._name})
        if answer["model_version"] != version or not answer["passed"]:
            raise VerificationFailed(
                f"{self._worker.url} validates {answer['model_version']} at cosine "
                f"{answer['cosine_similarity']['mean']:.4f}, asked for {version} and at least {answer['threshold']:.4f}"
            )
        return answer

    def compare_live(self, bundle: Path, version: str, threshold: float) -> NDArray[np.float64]:
        """Cosines of the golden texts, sent as any client would, to the teacher's embeddings in `bundle`."""
        texts, expected = read_golden_texts(bundle)
        body = {"model": self._name, "texts": texts, "encoding_format": "base64"}
        answer = self._ask("POST", "/api/v1/embed", json=body)
        live = np.stack([np.frombuffer(base64.b64decode(row), dtype="<f4") for row in answer["embeddings"]])
        if answer["model_version"] != version or live.shape != expected.shape:
            raise VerificationFailed(
                f"{self._worker.url} embedded with {answer['model_version']} to {live.shape}, "
                f"asked for {version} and {expected.shape}"
            )
        cosines = _cosines(live, expected)
        if not cosines.mean() >= threshold:  # NaN is no pass
            raise VerificationFailed(
                f"{self._worker.url} embeds {len(texts)} golden texts at cosine {cosines.mean():.4f} to the teacher, "
                f"at least {threshold:.4f} is asked"
            )
        return cosines

    def _ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            reply = self._http.request(method, path, **options)
            document: dict[str, Any] = reply.json()
        except (httpx.HTTPError, ValueError) as error:
            raise VerificationFailed(f"{self._worker.url}{path}: {type(error).__name__}: {error}") from None
        if reply.is_error:
            said = document.get("error", {}).get("message", reply.reason_phrase)
            raise VerificationFailed(f"{self._worker.url}{path} answered {reply.status_code}: {said}")
        return document


def read_golden_texts(bundle: Path) -> tuple[list[str], NDArray[np.float32]]:
    """The golden texts, written from their token ids, and the teacher's embeddings of them.

    Those whose text would be tokenised otherwise (unknown words) are left out. Raises VerificationFailed where
    too few are left to prove anything, RegistryError for a damaged bundle.
    """
    manifest = verify_bundle(bundle)
    tokenizer = TextTokenizer.from_folder(bundle, manifest.max_seq_length)
    with np.load(bundle / "golden.npz", allow_pickle=False) as golden:
        ids, lengths, embeddings = golden["input_ids"], golden["lengths"], golden["embeddings"]
    rows = [row[:length].astype(np.int64) for row, length in zip(ids, lengths, strict=True)]
    texts = tokenizer.decode(rows)
    again = tokenizer.encode(texts)
    same = [index for index, row in enumerate(rows) if np.array_equal(row, again[index])]
    if len(same) < max(1, _MIN_LIVE_SHARE * len(rows)):
        raise VerificationFailed(
            f"{len(same)} of {len(rows)} golden texts of {bundle} can be written as text again, "
            f"at least {_MIN_LIVE_SHARE:.0%} are needed"
        )
    return [texts[index] for index in same], embeddings[same].astype(np.float32)


def _cosines(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    a, b = left.astype(np.float64), right.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines: NDArray[np.float64] = (a * b).sum(axis=1) / np.maximum(lengths, np.finfo(float).tiny)
    return cosines


def _first_line(path: Path) -> str:
    """The first line of a secret's file that is no comment, as the worker reads its own. Raises VerificationFailed."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise VerificationFailed(f"{path} cannot be read: {error.strerror}") from None
    for line in lines:
        if line.strip() and not line.startswith("#"):
            return line.strip()
    raise VerificationFailed(f"{path} holds no key")
