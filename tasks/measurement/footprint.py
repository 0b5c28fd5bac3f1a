"""What one engine costs a fresh process: `python -m tasks.measurement.footprint` imports what the worker imports."""

import json
import sys
import time
from pathlib import Path

import numpy as np

from registry.manifest import EngineEntry
from serving.engines import open_engine
from serving.settings import BatchingSettings
from serving.telemetry import disable_telemetry
from serving.tokenizer import TextTokenizer

_BATCH = 32


def measure_footprint(folder: Path, entry: EngineEntry, max_length: int) -> dict[str, float]:
    """Load tokenizer and engine and embed one batch at the maximum length, as large as a worker makes one of its own.

    Returns `peak_memory_mb` of this process so far (10^6 bytes) and `load_seconds`.
    """
    started = time.perf_counter()
    TextTokenizer.from_folder(folder, max_length)
    engine = open_engine(folder, entry)
    loaded = time.perf_counter() - started
    ids = np.ones((count_rows(max_length), max_length), dtype=np.int64)
    engine.embed(ids, np.ones_like(ids))
    return {"peak_memory_mb": _peak_bytes() / 1e6, "load_seconds": loaded}


def count_rows(max_length: int) -> int:
    """Texts of the batch: fewer of a model that takes thousands of tokens, whose attention would fill any memory."""
    return max(1, min(_BATCH, BatchingSettings().sizes(has_custom_kernels=False).batch_tokens // max_length))


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    disable_telemetry()
    folder, entry, max_length = sys.argv[1:]
    report = measure_footprint(Path(folder), EngineEntry.model_validate_json(entry), int(max_length))
    sys.stdout.write(json.dumps(report) + "\n")
