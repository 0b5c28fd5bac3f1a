"""`make demo`: optimise the real all-MiniLM-L6-v2, publish a bundle, serve it, check a vector over HTTP, stop."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from flows.environment import make_state_folder, prepare_environment
from registry.client import pull
from registry.errors import RegistryError
from registry.store import open_store
from serving.errors import EngineUnavailable, ServingError
from tasks.corpora.docs_corpus import harvest_documents
from tasks.errors import TaskError
from tasks.state import state_dir

_NAME = "all-MiniLM-L6-v2"
_SENTENCE = "The quick brown fox jumps over the lazy dog."
_READY_SECONDS = 30.0
_SAMPLE_SECONDS = 0.25


class PeakMemory:
    """Largest resident memory of this process and its children together, sampled four times a second."""

    def __init__(self) -> None:
        """Starts sampling at once."""
        self.peak_bytes = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """Stop sampling; the peak in 10^6 bytes."""
        self._stopped.set()
        self._thread.join()
        return self.peak_bytes / 1e6

    def _sample(self) -> None:
        me = psutil.Process()
        while not self._stopped.wait(_SAMPLE_SECONDS):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak_bytes = max(self.peak_bytes, total)


def main() -> int:
    """Run the demo; the last stdout line is one JSON document. Returns the exit status."""
    try:
        result = run_demo()
    except (TaskError, RegistryError, ServingError, OSError, httpx.HTTPError) as error:
        result = _fail(str(error))
    except KeyboardInterrupt:
        result = _fail("interrupted: finished steps are kept, and the next run goes on from them")
    print(json.dumps(result, allow_nan=False))
    return 0 if result["ok"] else 1


def _fail(reason: str) -> dict[str, Any]:
    print(f"error: {reason}", file=sys.stderr)
    return {"ok": False, "error": reason}


def run_demo() -> dict[str, Any]:
    """Optimise, publish, serve, compare one vector with the teacher's; the document that `main` prints."""
    started = time.perf_counter()
    prepare_environment()
    make_state_folder()
    memory = PeakMemory()
    if not (state_dir() / "artifacts").exists():
        # A first run reads for ten seconds what later ones find made; it waits as long for Prefect's server.
        threading.Thread(target=harvest_documents, daemon=True).start()
    from flows.config import OptimizeConfig  # noqa: PLC0415  Prefect reads the environment at import
    from flows.run import describe_outcome, print_outcome, run_optimize  # noqa: PLC0415

    outcome = run_optimize(OptimizeConfig(name=_NAME))
    optimized = time.perf_counter()
    print_outcome(outcome, as_json=False)
    if outcome.published is None:
        return {"ok": False, **describe_outcome(outcome), "error": "no candidate passes the gate: nothing to serve"}
    bundle = state_dir() / "demo" / outcome.published.digest
    pull(open_store(), _NAME, outcome.published.digest, bundle)
    with serve(bundle) as (url, cold_start):
        vector = httpx.post(f"{url}/api/v1/embed", json={"text": _SENTENCE}, trust_env=False).raise_for_status().json()
    cosine = _cosine_vs_teacher(outcome.study.teacher.folder, vector["embedding"])
    print(
        f"Served {vector['model']} {vector['model_version']}: "
        f"ready in {cold_start:.2f} s, cosine to the teacher {cosine:.4f}"
    )
    return {
        "ok": cosine >= outcome.study.limits.cosine_mean_pass,
        **describe_outcome(outcome),
        "worker": {"cold_start_s": cold_start, "cosine_vs_teacher": cosine},
        "peak_memory_mb": memory.stop(),
        "seconds": {"optimize": optimized - started, "total": time.perf_counter() - started},
    }


@contextmanager
def serve(bundle: Path) -> Iterator[tuple[str, float]]:
    """Serve `bundle` on a free port: yields the URL and the seconds from process start to ready."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "serving", "--bundle", str(bundle), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as worker:
        watchdog = threading.Timer(_READY_SECONDS, worker.kill)
        watchdog.start()
        try:
            assert worker.stdout is not None
            ready = worker.stdout.readline()
            seconds = time.perf_counter() - started
            watchdog.cancel()
            fields = dict(field.split("=", 1) for field in ready.split() if "=" in field)
            if "url" not in fields:
                raise EngineUnavailable(f"the worker ended with status {worker.wait()} before it was ready")
            yield fields["url"], seconds
        finally:
            watchdog.cancel()
            worker.terminate()
            try:
                worker.wait(_READY_SECONDS)
            except subprocess.TimeoutExpired:
                worker.kill()


def _cosine_vs_teacher(folder: Path, vector: list[float]) -> float:
    from tasks.models.teacher import open_teacher  # noqa: PLC0415  torch comes last: the worker's start is timed before

    expected = open_teacher(folder)([_SENTENCE], lambda steps: None)[0]
    own = np.array(vector)
    return float(own @ expected / (np.linalg.norm(own) * np.linalg.norm(expected)))


if __name__ == "__main__":
    sys.exit(main())
