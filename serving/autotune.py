"""Which engine of a bundle, on how many threads, with how many runs at a time: measured on this node, then remembered.

Every setup runs the reference texts alone and in batches, all its instances at work and, as under load, a thread that
wants half a core beside them. The choice is written beside the bundle, so that the next start on this node skips the
measurement; where nothing may be written it is made each time.
"""

import json
import logging
import os
import platform
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from registry.manifest import EngineEntry, hash_file
from serving.engines import GPU_RUNTIMES, Engine
from serving.tokenizer import Ids, pad_batch

_BATCH_SIZE = 8
# Each setup runs single texts, then batches, for this long at least, and so many times.
_SINGLE_SECONDS, _BATCH_SECONDS = 0.06, 0.08
_MIN_RUNS = 3
# A lone text finds cores that have been idle for about this long.
_PAUSE_SECONDS = 0.001
_MAX_INSTANCES = 4
# Runs that leave cores idle have to have this much more throughput: noise alone must not halve what a node can do.
_IDLE_CORES_GAIN = 1.1
# A second engine for lone small batches has to be this much faster there to be worth its memory.
_SWITCH_GAIN = 1.1
# What the event loop takes of a core under load. Threads of a run wait for one another, and so for a core that it has:
# what is 6 % faster on its own, two threads on two cores, serves 31 % less than two runs of one.
_LOOP_BUSY_SECONDS, _LOOP_IDLE_SECONDS = 0.0005, 0.0005
# The compiled half of the avx512 engine.
KERNELS = "serving.kernels._avx512"
_SHOWN_DIGITS = 12

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Setup:
    """A way to run a bundle: `num_instances` runs at a time, each on `num_threads`."""

    runtime: str
    num_threads: int
    num_instances: int

    @property
    def num_cores(self) -> int:
        """Cores that it keeps busy."""
        return self.num_threads * self.num_instances

    def __str__(self) -> str:
        return f"{self.runtime}:{self.num_instances}x{self.num_threads}"


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of a single text on its own, and seconds per text of batches, every instance and the loop at work."""

    setup: Setup
    single_seconds: float
    batched_seconds: float
    compiles_shapes: bool

    @property
    def score(self) -> float:
        """Latency and throughput count alike; less is better."""
        return self.single_seconds * self.batched_seconds

    def __str__(self) -> str:
        return f"{self.setup}={self.single_seconds * 1000:.2f}ms,{1 / self.batched_seconds:.0f}/s"


@dataclass(frozen=True, slots=True)
class Choice:
    """The setup of most batches, and that of a small batch that finds every core idle."""

    large: Setup
    small: Setup

    def __str__(self) -> str:
        return str(self.large) if self.small == self.large else f"{self.large}, lone {self.small}"

    def keep_layout(self, runtimes: Collection[str]) -> "Choice":
        """The same numbers of threads and runs for a bundle that has `runtimes`, the preferred one first."""
        if {self.large.runtime, self.small.runtime} <= set(runtimes):
            return self
        num_instances = 1 if self.large.runtime in GPU_RUNTIMES else self.large.num_instances
        setup = replace(self.large, runtime=next(iter(runtimes)), num_instances=num_instances)
        return Choice(setup, setup)


def list_setups(entries: Sequence[EngineEntry], num_threads: int, num_instances: int, num_cores: int) -> list[Setup]:
    """Setups that come into question, the plainest first; 0 leaves a number open.

    Threads wait for one another, spinning, so one run on all cores waits for the event loop and keeps it from a core:
    a single run leaves a core to the loop. Of two cores it may have both, where handing it a text and back says so:
    depending on the machine's state 2.2 to 2.7 ms for a lone request with two threads, and 1.9 or 3.4 with one.
    """
    if num_instances or num_threads:
        runs = [(num_threads or max(1, num_cores // num_instances), num_instances or 1)]
    else:
        lone = (1, 2) if num_cores == 2 else (max(1, num_cores - 1),)
        runs = [*((n, 1) for n in lone), *((num_cores // n, n) for n in (2, _MAX_INSTANCES) if n <= num_cores)]
    return [
        Setup(entry.runtime, *run)
        for entry in entries
        for run in (runs if entry.runtime not in GPU_RUNTIMES else [(num_threads or num_cores, 1)])
    ]


def choose(measured: Sequence[Measured]) -> Choice:
    """The best setup; or the one with the highest throughput and another for lone texts, where that is clearly faster.

    An engine that compiles shapes is no such other: it would have to meet all of them a second time.
    """
    busiest = max(m.setup.num_cores for m in measured)

    def handicap(m: Measured) -> float:
        return 1 if m.setup.num_cores == busiest else _IDLE_CORES_GAIN

    best = min(measured, key=lambda m: m.score * handicap(m))
    large = min(measured, key=lambda m: m.batched_seconds * handicap(m))
    small = min((m for m in measured if m is large or not m.compiles_shapes), key=lambda m: m.single_seconds)
    if small.single_seconds * _SWITCH_GAIN <= large.single_seconds:
        return Choice(large.setup, small.setup)
    return Choice(best.setup, best.setup)


def measure(engine: Engine, setup: Setup, rows: Sequence[Ids]) -> Measured:
    """Hand over the text of median length alone, with pauses, and batches from the shorter and the longer half.

    All once uncounted.
    """
    ordered = sorted(rows, key=len)
    single = pad_batch([ordered[len(ordered) // 2]])
    batches = [pad_batch(ordered[start : start + _BATCH_SIZE]) for start in (len(rows) // 4, 3 * len(rows) // 4)]
    with ThreadPoolExecutor(setup.num_instances) as pool:
        pool.submit(engine.embed, *single).result()
        single_seconds = _time_single(engine, single, pool)
        list(pool.map(lambda _: _repeat(engine, batches, num_runs=2), range(setup.num_instances)))
        with _busy_loop():
            rates = list(pool.map(lambda _: _rate(engine, batches), range(setup.num_instances)))
    return Measured(setup, single_seconds, 1 / sum(rates), engine.compiles_shapes)


def _time_single(engine: Engine, single: tuple[Ids, Ids], pool: ThreadPoolExecutor) -> float:
    """Median seconds until a text handed to an idle thread is back, as a lone request's is."""
    times: list[float] = []
    end = time.perf_counter() + _SINGLE_SECONDS
    while len(times) < _MIN_RUNS or time.perf_counter() < end:
        time.sleep(_PAUSE_SECONDS)
        started = time.perf_counter()
        pool.submit(engine.embed, *single).result()
        times.append(time.perf_counter() - started)
    return median(times)


@contextmanager
def _busy_loop() -> Iterator[None]:
    """A thread that works as the event loop does under load: in short turns, with the interpreter's lock."""
    is_over = threading.Event()

    def work() -> None:
        while not is_over.is_set():
            end = time.perf_counter() + _LOOP_BUSY_SECONDS
            while time.perf_counter() < end:
                pass
            time.sleep(_LOOP_IDLE_SECONDS)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _rate(engine: Engine, batches: Sequence[tuple[Ids, Ids]]) -> float:
    """Texts a second of one run after the other; by its own clock, for those beside it end at other times."""
    started = time.perf_counter()
    texts = _repeat(engine, batches, _MIN_RUNS, _BATCH_SECONDS)
    return texts / (time.perf_counter() - started)


def _repeat(engine: Engine, batches: Sequence[tuple[Ids, Ids]], num_runs: int, seconds: float = 0.0) -> int:
    """Go round `batches`, `num_runs` times at least and for the time; returns the texts of all runs."""
    texts, runs, end = 0, 0, time.perf_counter() + seconds
    while runs < num_runs or time.perf_counter() < end:
        input_ids, mask = batches[runs % len(batches)]
        engine.embed(input_ids, mask)
        texts += len(input_ids)
        runs += 1
    return texts


def record_path(bundle: Path) -> Path:
    """Where the choice for the bundle in this folder is remembered: beside it, as `<name>.engine.json`."""
    folder = bundle.resolve()
    return folder.with_name(f"{folder.name}.engine.json")


def node_key(digest: str, setups: Sequence[Setup]) -> str:
    """Names everything the choice depends on: bundle, processor, libraries and the setups that came into question.

    Kernels of our own are named by their bytes too: a checkout has one version and many states of them.
    """
    libraries = [f"{name}={_version(name)}" for name in ("thorforge", "onnxruntime", "openvino")]
    libraries.append(f"kernels={_hash_module(KERNELS)}")
    return " ".join((digest, _processor(), f"cores={os.cpu_count()}", *libraries, *map(str, setups)))


def read_choice(path: Path, key: str) -> Choice | None:
    """The choice remembered for `key`; None when there is none, or the file is damaged."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["key"] != key:
            return None
        return Choice(Setup(**document["large"]), Setup(**document["small"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_choice(path: Path, key: str, choice: Choice, measured: Sequence[Measured]) -> None:
    """Remember a choice and what it rests on; a folder that cannot be written is no error."""
    document = {"key": key, **asdict(choice), "measured": [asdict(m) for m in measured]}
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        _log.info("the choice of engine is not remembered reason=%s", error.strerror)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _hash_module(name: str) -> str:
    """The first digits of the digest of a module's file, without importing it."""
    spec = find_spec(name)
    return "none" if spec is None or spec.origin is None else hash_file(Path(spec.origin)).sha256[:_SHOWN_DIGITS]


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
