"""What is measured of a server: each function takes running servers and returns what the load saw."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

from benchmarks.clients import Target
from benchmarks.load import (
    LoadResult,
    constant_arrivals,
    join_results,
    poisson_arrivals,
    render_post,
    run_closed,
    run_load,
    run_open,
)
from benchmarks.servers import ADMIN_TOKEN, ROOT, Server, ServerFailed, pin
from benchmarks.texts import Texts
from registry.manifest import read_manifest, write_manifest
from serving.engines import GPU_RUNTIMES, num_cores

OVERLOAD_FACTOR = 3.0
SWAP_CLIENTS = 32
# Enough that a request is never late for want of one.
_OPEN_CONNECTIONS, _OVERLOAD_CONNECTIONS = 128, 900
_BATCH_TEXTS = 32
_NUM_BATCHES = 64
_PAUSE_SECONDS, _PROBE_SECONDS, _PROBE_RATE = 1.0, 2.0, 20.0
_REQUEST_SECONDS = 60.0
_MIN_COSINE = 0.99
_SOAK_PARTS = 10


@dataclass(frozen=True, slots=True)
class ClosedCase:
    """Clients that each wait for their answer, and what they send."""

    clients: int
    texts_per_request: int = 1
    is_mixed: bool = False


CLOSED_CASES = {
    "closed-1": ClosedCase(1),
    "closed-8": ClosedCase(8),
    "closed-32": ClosedCase(32),
    "closed-128": ClosedCase(128),
    "mixed-32": ClosedCase(32, is_mixed=True),
    "batch-32": ClosedCase(4, texts_per_request=_BATCH_TEXTS),
}
# For a worker on many cores: what 2 cannot carry says nothing about it.
FRONTS_CASES = {
    "closed-512": ClosedCase(512),
    "batches-32": ClosedCase(64, texts_per_request=_BATCH_TEXTS),
}


def render_requests(server: Server, texts: Texts, case: ClosedCase) -> list[bytes]:
    """The requests of a case, in the same order for every server."""
    pool = texts.mixed if case.is_mixed else texts.short
    if case.texts_per_request == 1:
        return [render_post(server.url, server.body(text)) for text in pool]
    size = case.texts_per_request
    starts = range(0, min(len(pool), size * _NUM_BATCHES) - size + 1, size)
    return [render_post(server.url, server.body(pool[start : start + size])) for start in starts]


def measure_closed(server: Server, texts: Texts, case: ClosedCase, seconds: float) -> LoadResult:
    """One turn: a fifth of the time untimed, then `seconds`."""
    target, requests = Target.of(server.url), render_requests(server, texts, case)
    run_load(run_closed(target, requests, clients=case.clients, seconds=seconds / 5))
    return run_load(run_closed(target, requests, clients=case.clients, seconds=seconds))


def measure_open(server: Server, texts: Texts, arrivals: Sequence[float]) -> LoadResult:
    """Single short texts at fixed arrival times, latency from the time each was due."""
    requests = render_requests(server, texts, ClosedCase(1))
    target = Target.of(server.url)
    return run_load(run_open(target, requests, arrivals, connections=_OPEN_CONNECTIONS), precise=True)


def make_arrivals(kind: str, rate: float, seconds: float, seed: int) -> list[float]:
    """Arrival times, `poisson` or `constant`; one at least."""
    times = poisson_arrivals(rate, seconds, seed) if kind == "poisson" else constant_arrivals(rate, seconds)
    return times or [0.0]


@dataclass(frozen=True, slots=True)
class Overload:
    """What a server did while more came than it can do, and from one second after that on."""

    during: LoadResult
    after: LoadResult


def measure_overload(server: Server, texts: Texts, rate: float, seconds: float) -> Overload:
    """`rate` requests a second for `seconds`, a second of silence, then a trickle."""
    resumed = seconds + _PAUSE_SECONDS
    probes = [resumed + due for due in constant_arrivals(_PROBE_RATE, _PROBE_SECONDS)]
    arrivals = [*poisson_arrivals(rate, seconds, seed=0), *probes]
    requests = render_requests(server, texts, ClosedCase(1))
    run = run_open(Target.of(server.url), requests, arrivals, connections=_OVERLOAD_CONNECTIONS)
    result = run_load(run)
    return Overload(result.between(0, seconds), result.between(resumed, resumed + _PROBE_SECONDS))


@dataclass(frozen=True, slots=True)
class Swaps:
    """The same load without and with swaps; `num_swaps` were finished before it ended."""

    quiet: LoadResult
    during: LoadResult
    num_swaps: int


def measure_swaps(server: Server, texts: Texts, bundles: Sequence[str], count: int, every_seconds: float) -> Swaps:
    """Swap between `bundles` (names below the worker's root) every few seconds under full load. Raises ServerFailed."""
    target, requests = Target.of(server.url), render_requests(server, texts, ClosedCase(SWAP_CLIENTS))
    seconds = count * every_seconds
    run_load(run_closed(target, requests, clients=SWAP_CLIENTS, seconds=seconds / 5))
    quiet = run_load(run_closed(target, requests, clients=SWAP_CLIENTS, seconds=seconds))

    async def swap_under_load() -> tuple[LoadResult, int]:
        load = asyncio.create_task(run_closed(target, requests, clients=SWAP_CLIENTS, seconds=seconds))
        num_swaps = 0
        for turn in range(count):
            await asyncio.gather(
                asyncio.to_thread(swap_model, server, bundles[(turn + 1) % len(bundles)]),
                asyncio.sleep(every_seconds * 0.9),  # so that the last one ends before the load does
            )
            num_swaps += not load.done()
        return await load, num_swaps

    during, num_swaps = run_load(swap_under_load())
    return Swaps(quiet, during, num_swaps)


def swap_model(server: Server, bundle: str) -> None:
    """Ask the worker to serve `bundle` (a name below its root) instead. Raises ServerFailed."""
    reply = httpx.post(
        f"{server.base_url}/api/v1/admin/models/swap",
        json={"bundle": bundle},
        headers={"authorization": f"Bearer {ADMIN_TOKEN}"},
        timeout=_REQUEST_SECONDS,
        trust_env=False,
    )
    if reply.status_code != 200:
        raise ServerFailed(f"swap to {bundle} was answered {reply.status_code}: {reply.text[:500]}")


def make_two_versions(bundle: Path, root: Path) -> list[str]:
    """Two bundles below `root` that differ in their version alone; returns their names."""
    manifest = read_manifest(bundle)
    names = ["first", "second"]
    for name in names:
        folder = shutil.copytree(bundle, root / name)
        write_manifest(folder, manifest.model_copy(update={"version": f"{manifest.version}-{name}"}))
    return names


@dataclass(frozen=True, slots=True)
class Soak:
    """A long run's load, and the server's memory after each tenth of it, 10^6 bytes."""

    load: LoadResult
    resident_mb: list[float]


def measure_soak(server: Server, texts: Texts, num_requests: int) -> Soak:
    """Send `num_requests` from 32 clients in ten parts; the first part only fills what every server fills once."""
    target, requests = Target.of(server.url), render_requests(server, texts, ClosedCase(SWAP_CLIENTS))
    parts: list[LoadResult] = []
    resident: list[float] = []
    for _ in range(_SOAK_PARTS):
        load = run_closed(target, requests, clients=SWAP_CLIENTS, num_requests=num_requests // _SOAK_PARTS)
        parts.append(run_load(load))
        resident.append(server.resident_mb() or 0.0)
    return Soak(join_results(parts), resident)


def measure_bare_engine(
    bundle: Path, batch_size: int, texts: Sequence[str], seconds: float, cores: frozenset[int] = frozenset()
) -> dict[str, float]:
    """The fastest way to run the bundle without a server: every engine of it, on all `cores` or one instance a core.

    Each in a process of its own; see `benchmarks.bare_engine`.
    """
    setups = [
        (entry.runtime, num_instances)
        for entry in read_manifest(bundle).engines
        for num_instances in sorted({1} if batch_size == 1 or entry.runtime in GPU_RUNTIMES else {1, _count(cores)})
    ]
    reports = [_measure_setup(bundle, *setup, batch_size, texts, seconds, cores) for setup in setups]
    return max(reports, key=lambda report: report["texts_per_s"])


def _count(cores: frozenset[int]) -> int:
    return len(cores) or num_cores()


def _measure_setup(
    bundle: Path,
    runtime: str,
    num_instances: int,
    batch_size: int,
    texts: Sequence[str],
    seconds: float,
    cores: frozenset[int],
) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.bare_engine", str(bundle), runtime]
    command += [str(num_instances), str(batch_size), str(seconds)]
    done = subprocess.run(
        command,
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        preexec_fn=pin(cores),
    )
    report: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return report


def read_batches(server: Server) -> tuple[float, float]:
    """Engine runs and texts in them so far, by the worker's own count."""
    page = httpx.get(f"{server.base_url}/metrics", trust_env=False).text
    runs, texts = (
        sum(float(value) for value in re.findall(rf"^akidb_batch_size_{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE))
        for name in ("count", "sum")
    )
    return runs, texts


def check_agreement(servers: Sequence[Server], texts: Sequence[str], expected: np.ndarray) -> dict[str, float]:
    """Mean cosine of each server's vectors with the teacher's, [N, D]. Raises ServerFailed below 0.99."""
    cosines: dict[str, float] = {}
    for server in servers:
        vectors = server.embed(list(texts))
        norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(expected, axis=1)
        cosines[server.name] = float(((vectors * expected).sum(axis=1) / norms).mean())
        if not cosines[server.name] >= _MIN_COSINE:
            raise ServerFailed(
                f"{server.name} agrees with the teacher to a mean cosine of {cosines[server.name]:.4f}, "
                f"at least {_MIN_COSINE} is asked for: its speed means nothing"
            )
    return cosines


def check_reference(server: Server) -> tuple[float, int]:
    """Mean cosine of the bundle's reference texts with the teacher's, and count. Raises ServerFailed below 0.99."""
    report = httpx.get(f"{server.base_url}/api/v1/validate", timeout=_REQUEST_SECONDS, trust_env=False).json()
    mean = float(report["cosine_similarity"]["mean"])
    if not mean >= _MIN_COSINE:
        raise ServerFailed(f"{server.name} agrees with its reference to {mean:.4f}, less than {_MIN_COSINE}")
    return mean, int(report["count"])
