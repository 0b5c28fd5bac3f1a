"""The engine with nothing around it: what a worker's HTTP, batching and tokenising are measured against.

`python -m benchmarks.bare_engine BUNDLE RUNTIME INSTANCES BATCH_SIZE SECONDS` reads texts from stdin, a JSON list, and
prints one JSON document: `texts_per_s`, and `p50_ms`, `p95_ms` and `p99_ms` of an engine run.
"""

import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path

import numpy as np

from registry.manifest import read_manifest
from serving.engines import Engine, num_cores, open_engine
from serving.tokenizer import Ids, TextTokenizer, pad_batch

_WINDOW = 32

Batch = tuple[Ids, Ids]


def measure_engine(
    bundle: Path, runtime: str, num_instances: int, batch_size: int, seconds: float, texts: Sequence[str]
) -> dict[str, float]:
    """Run `num_instances` of the bundle's `runtime` engine, which share the cores, on batches of `texts` for `seconds`.

    Texts are tokenised and padded beforehand, every shape is met once before it is timed, and batches are packed by
    length as well as a queue of `_WINDOW` texts allows.
    """
    manifest = read_manifest(bundle)
    entry = next(entry for entry in manifest.engines if entry.runtime == runtime)
    rows = TextTokenizer.from_folder(bundle, manifest.max_seq_length).encode(texts)
    packed = [row for start in range(0, len(rows), _WINDOW) for row in sorted(rows[start : start + _WINDOW], key=len)]
    batches = [pad_batch(packed[start : start + batch_size]) for start in range(0, len(packed), batch_size)]
    engines = [open_engine(bundle, entry, max(1, num_cores() // num_instances)) for _ in range(num_instances)]
    with ThreadPoolExecutor(num_instances) as pool:
        list(pool.map(_run_once, engines, [batches] * num_instances))
        started = time.perf_counter()
        ends = [started + seconds] * num_instances
        runs = list(
            pool.map(_run_until, engines, [batches[index::num_instances] for index in range(num_instances)], ends)
        )
        elapsed = time.perf_counter() - started
    for engine in engines:
        engine.close()
    latencies = np.concatenate([own for own, _ in runs])
    percentiles = {f"p{p}_ms": float(np.percentile(latencies, p)) * 1e3 for p in (50, 95, 99)}
    return {"texts_per_s": sum(num_texts for _, num_texts in runs) / elapsed, **percentiles}


def _run_once(engine: Engine, batches: Sequence[Batch]) -> None:
    for batch in batches:
        engine.embed(*batch)


def _run_until(engine: Engine, batches: Sequence[Batch], end: float) -> tuple[list[float], int]:
    """Seconds of each run until `end`, and the texts in them."""
    latencies: list[float] = []
    num_texts = 0
    for batch in cycle(batches):
        called = time.perf_counter()
        engine.embed(*batch)
        done = time.perf_counter()
        latencies.append(done - called)
        num_texts += len(batch[0])
        if done >= end:
            break
    return latencies, num_texts


if __name__ == "__main__":
    folder, engine_runtime, instances, size, duration = sys.argv[1:]
    sample = json.load(sys.stdin)
    report = measure_engine(Path(folder), engine_runtime, int(instances), int(size), float(duration), sample)
    print(json.dumps(report))
