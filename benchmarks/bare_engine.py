"""The engine with nothing around it: what a worker's HTTP, batching and tokenising are measured against.

`python -m benchmarks.bare_engine BUNDLE RUNTIME BATCH_SIZE SECONDS` reads texts from stdin, a JSON list, and prints one
JSON document: `texts_per_s`, and `p50_ms`, `p95_ms` and `p99_ms` of an engine run.
"""

import json
import sys
import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np

from registry.manifest import read_manifest
from serving.engines import open_engine
from serving.tokenizer import TextTokenizer, pad_batch

_WINDOW = 32


def measure_engine(
    bundle: Path, runtime: str, batch_size: int, seconds: float, texts: Sequence[str]
) -> dict[str, float]:
    """Run the bundle's `runtime` engine on batches of `texts`, tokenised and padded beforehand, for `seconds`.

    Every shape is met once before it is timed. Batches are packed by length as well as a queue
    of `_WINDOW` texts allows.
    """
    manifest = read_manifest(bundle)
    entry = next(entry for entry in manifest.engines if entry.runtime == runtime)
    rows = TextTokenizer.from_folder(bundle, manifest.max_seq_length).encode(texts)
    packed = [row for start in range(0, len(rows), _WINDOW) for row in sorted(rows[start : start + _WINDOW], key=len)]
    batches = [pad_batch(packed[start : start + batch_size]) for start in range(0, len(packed), batch_size)]
    engine = open_engine(bundle, entry)
    for batch in batches:
        engine.embed(*batch)
    latencies: list[float] = []
    num_texts, started = 0, time.perf_counter()
    for batch in cycle(batches):
        called = time.perf_counter()
        engine.embed(*batch)
        latencies.append(time.perf_counter() - called)
        num_texts += len(batch[0])
        if (elapsed := time.perf_counter() - started) >= seconds:
            break
    engine.close()
    percentiles = {f"p{p}_ms": float(np.percentile(latencies, p)) * 1e3 for p in (50, 95, 99)}
    return {"texts_per_s": num_texts / elapsed, **percentiles}


if __name__ == "__main__":
    folder, engine_runtime, size, duration = sys.argv[1:]
    report = measure_engine(Path(folder), engine_runtime, int(size), float(duration), json.load(sys.stdin))
    print(json.dumps(report))
