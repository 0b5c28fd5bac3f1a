"""Benchmark: latency at batch 1 and throughput at batch 32, on the corpus's real lengths, systems interleaved."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from prefect import task
from pydantic import BaseModel, ConfigDict

from registry.gate import Measurement
from registry.manifest import EngineEntry
from serving.engines import open_engine
from serving.shapes import ShapeGrid
from serving.tokenizer import Ids, TextTokenizer, pad_batch
from tasks.artifacts import CACHED, Artifact
from tasks.corpus import evaluation_sets
from tasks.errors import QuantizationFailed
from tasks.evaluate import choose_entry
from tasks.measurement.statistics import Values, statistic_interval
from tasks.models.teacher import Teacher, load_sentence_transformer
from tasks.progress import progress
from tasks.quantize import Candidate

TORCH = "fp32-torch"
CHAMPION = "champion"
BATCH_SIZE = 32
_ROUNDS = 2
_TEXTS_PER_TURN = 75
NUM_BATCHES = 5
_UNTIMED = 2  # calls at the start of a turn, the largest: the engine's memory grows there

Batch = tuple[Ids, Ids]
Run = Callable[[Ids, Ids], object]
# Opened for one turn; the batches are what the turn will time.
System = Callable[[list[Batch]], AbstractContextManager[Run]]


class Speed(BaseModel):
    """One system's speed. Latencies in ms of one text at a time; throughput in texts a second at batch 32."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    latencies_ms: tuple[float, ...]
    batch_seconds: tuple[float, ...]
    peak_memory_mb: float | None

    def latency_ms(self, percent: float) -> float:
        """A percentile of the latencies."""
        return float(np.percentile(self.latencies_ms, percent))

    @property
    def throughput_per_s(self) -> float:
        """Texts a second at batch 32: median of the rounds, each of which ran every batch once."""
        rounds = np.array(self.batch_seconds).reshape(-1, NUM_BATCHES).sum(axis=1)
        return float(NUM_BATCHES * BATCH_SIZE / np.median(rounds))


class SpeedReport(BaseModel):
    """All systems of one interleaved run on one node."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hardware: str
    mean_tokens: float
    speeds: dict[str, Speed]

    def speedup_vs_torch(self, name: str) -> float:
        """Throughput over torch fp32's, both of this run."""
        return self.speeds[name].throughput_per_s / self.speeds[TORCH].throughput_per_s

    def champion_ratios(self, name: str) -> dict[str, Measurement]:
        """Latency, its 95th percentile, throughput and memory over the champion's; empty without a champion."""
        champion = self.speeds.get(CHAMPION)
        if champion is None:
            return {}
        speed = self.speeds[name]
        return {
            "latency_ratio_vs_champion": _paired_ratio(speed.latencies_ms, champion.latencies_ms, np.median),
            "p95_ratio_vs_champion": _paired_ratio(speed.latencies_ms, champion.latencies_ms, _percentile_95),
            "throughput_ratio_vs_champion": _paired_ratio(champion.batch_seconds, speed.batch_seconds, np.sum),
        } | _memory_ratio(speed.peak_memory_mb, champion.peak_memory_mb)


@task(task_run_name="benchmark", cache_policy=CACHED, persist_result=True, result_serializer="json")
def benchmark(
    candidates: list[Candidate], teacher: Teacher, corpus: Artifact, hardware: str, champion: Path | None
) -> SpeedReport:
    """Time every candidate, torch fp32 and the champion bundle (if any) in turns, so that all meet the same weather.

    Shapes are rounded as the worker rounds them, and an engine that compiles each meets them all untimed first: a
    server meets a shape for the first time only once.
    """
    singles, groups, mean_tokens = sample_calls(teacher, corpus)
    systems = _systems(candidates, teacher, champion)
    inputs = {
        name: [_tokenize(folder, teacher.max_seq_length, calls) for calls in (singles, groups)]
        for name, folder in _tokenizers(candidates, teacher, champion).items()
    }
    latencies: dict[str, list[float]] = {name: [] for name in systems}
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    with progress("benchmark", _ROUNDS * len(systems)) as advance:
        for turn in range(_ROUNDS):
            for name in _rotate(list(systems), turn):
                part = inputs[name][0][turn * _TEXTS_PER_TURN : (turn + 1) * _TEXTS_PER_TURN]
                batches = inputs[name][1]
                with systems[name]([*part, *batches]) as run:
                    latencies[name].extend(1e3 * call for call in _time_calls(run, part))
                    seconds[name].extend(_time_calls(run, batches))
                advance(1)
    peaks = _peak_memories(candidates, champion, teacher.max_seq_length)
    speeds = {
        name: Speed(
            latencies_ms=tuple(latencies[name]),
            batch_seconds=tuple(seconds[name]),
            peak_memory_mb=peaks.get(name),  # torch has none
        )
        for name in systems
    }
    return SpeedReport(hardware=hardware, mean_tokens=mean_tokens, speeds=speeds)


def sample_calls(teacher: Teacher, corpus: Artifact) -> tuple[list[list[str]], list[list[str]], float]:
    """The texts of each call: single ones, and 32 of like length; and how many tokens one has on average.

    Drawn evenly from evaluation texts: sentences, queries and documents in their real proportion. Lengths are the
    teacher's, so that call i of every system meets the same texts.
    """
    sets, _ = evaluation_sets(corpus)
    texts = [text for name in ("sentences", "queries", "documents") for text in sets.get(name, ())]
    count = max(_ROUNDS * _TEXTS_PER_TURN, NUM_BATCHES * BATCH_SIZE)
    texts = [texts[index % len(texts)] for index in _spread(count, len(texts))]
    ids = TextTokenizer.from_folder(teacher.tokenizer.parent, teacher.max_seq_length).encode(texts)
    order = sorted(range(NUM_BATCHES * BATCH_SIZE), key=lambda place: len(ids[place]))
    groups = [
        [texts[place] for place in order[start : start + BATCH_SIZE]] for start in range(0, len(order), BATCH_SIZE)
    ]
    singles = [[text] for text in texts[: _ROUNDS * _TEXTS_PER_TURN]]
    return singles, groups, float(np.mean([len(row) for row in ids]))


def _tokenize(folder: Path, max_length: int, calls: list[list[str]]) -> list[Batch]:
    """The calls as a system's own tokenizer has them: a step may have trimmed it."""
    tokenizer = TextTokenizer.from_folder(folder, max_length)
    return [pad_batch(tokenizer.encode(call)) for call in calls]


def _spread(count: int, size: int) -> NDArray[np.intp]:
    """`count` places over `size` texts, in an order that has nothing to do with the corpus's own."""
    return np.random.default_rng(0).permutation(max(count, size))[:count]


def _tokenizers(candidates: list[Candidate], teacher: Teacher, champion: Path | None) -> dict[str, Path]:
    """The folder of each system's tokenizer, by the system's name."""
    folders = {TORCH: teacher.tokenizer.parent, **{c.variant.name: c.artifact.folder for c in candidates}}
    return folders | ({CHAMPION: champion} if champion is not None else {})


def _systems(candidates: list[Candidate], teacher: Teacher, champion: Path | None) -> dict[str, System]:
    """What takes turns, by name."""
    systems: dict[str, System] = {TORCH: _torch_system(teacher)}
    folders = [(c.variant.name, c.artifact.folder, c.engine) for c in candidates]
    for name, folder, entry in (*folders, *_champion_entry(champion)):
        systems[name] = partial(_open_for_turn, folder, entry, teacher.max_seq_length)
    return systems


@contextmanager
def _open_for_turn(folder: Path, entry: EngineEntry, max_length: int, batches: list[Batch]) -> Iterator[Run]:
    """Open the engine for one turn only: its memory and its spinning threads are gone when the next one runs."""
    engine = open_engine(folder, entry)
    grid = ShapeGrid(max_length, engine.compiles_shapes)

    def run(input_ids: Ids, attention_mask: Ids) -> object:
        length = input_ids.shape[1]
        more = ((0, 0), (0, grid.round_length(length) - length))
        return engine.embed(np.pad(input_ids, more), np.pad(attention_mask, more))

    try:
        for batch in batches if engine.compiles_shapes else batches[-_UNTIMED:]:
            run(*batch)
        yield run
    finally:
        engine.close()


def _champion_entry(champion: Path | None) -> Iterator[tuple[str, Path, EngineEntry]]:
    if champion is not None:
        yield CHAMPION, champion, choose_entry(champion)


def _torch_system(teacher: Teacher) -> System:
    """sentence-transformers in fp32, loaded once: its memory is small and loading takes seconds."""
    import torch  # noqa: PLC0415  seconds that a cached run need not pay

    model = load_sentence_transformer(teacher.folder)

    def run(input_ids: Ids, attention_mask: Ids) -> object:
        features = {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(attention_mask)}
        with torch.inference_mode():
            return model(features)["sentence_embedding"].numpy()

    def open_for_turn(batches: list[Batch]) -> AbstractContextManager[Run]:
        for batch in batches[-_UNTIMED:]:
            run(*batch)
        return nullcontext(run)

    return open_for_turn


def _time_calls(run: Run, batches: list[Batch]) -> list[float]:
    seconds = []
    for batch in batches:
        started = time.perf_counter()
        run(*batch)
        seconds.append(time.perf_counter() - started)
    return seconds


def _peak_memories(candidates: list[Candidate], champion: Path | None, max_length: int) -> dict[str, float]:
    """Peak memory in MB by system, two processes at a time: what else runs changes a process's time, not its memory."""
    measured = [(c.variant.name, c.artifact.folder, c.engine, c.max_seq_length) for c in candidates]
    measured += [(*each, max_length) for each in _champion_entry(champion)]
    names, *arguments = zip(*measured, strict=True)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(_peak_memory_mb, *arguments), strict=True))


def _peak_memory_mb(folder: Path, entry: EngineEntry, max_length: int) -> float:
    command = [
        sys.executable,
        "-m",
        "tasks.measurement.footprint",
        str(folder),
        entry.model_dump_json(),
        str(max_length),
    ]
    # The checkout, not the working folder, is where `tasks` lies.
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    if done.returncode:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise QuantizationFailed(
            f"the {entry.runtime} engine in {folder} cannot embed a batch of {max_length} tokens a text in a process "
            f"of its own, which ended with status {done.returncode} and said: {said}"
        )
    return float(json.loads(done.stdout.splitlines()[-1])["peak_memory_mb"])


def _rotate(names: list[str], turn: int) -> list[str]:
    """Another system goes first in each round."""
    start = turn % len(names)
    return names[start:] + names[:start]


def _memory_ratio(own: float | None, other: float | None) -> dict[str, Measurement]:
    """Peak memory over the champion's: one number of each, so an interval of one point."""
    if own is None or not other:
        return {}
    return {"memory_ratio_vs_champion": Measurement(own / other, own / other, own / other)}


def _percentile_95(values: Values, axis: int) -> Values:
    return np.asarray(np.percentile(values, 95, axis=axis), dtype=np.float64)


def _paired_ratio(own: tuple[float, ...], other: tuple[float, ...], summary: Callable[..., Values]) -> Measurement:
    """Ratio of medians or sums, resampling calls in pairs: call i of both systems met the same texts."""
    first, second = np.array(own), np.array(other)

    def statistic(rows: NDArray[np.intp]) -> Values:
        return np.asarray(summary(first[rows], axis=1) / summary(second[rows], axis=1), dtype=np.float64)

    return statistic_interval(statistic, len(first))
