"""A model ready to serve: its bundle checked byte by byte, its engine loaded, warmed up and measured."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from registry.manifest import EngineEntry, Manifest, RegistryError, digest_of, verify_bundle
from serving.engines import Embeddings, Engine, open_engine
from serving.errors import BundleRejected, EngineUnavailable
from serving.settings import ModelSource
from serving.tokenizer import Ids, TextTokenizer, pad_batch

GOLDEN_NAME = "golden.npz"
_WARM_UP_BATCH = 8
_WARM_UP_RUNS = 5
# What forming, padding and delivering a batch takes beside the engine, measured on one core.
_HANDLING_SECONDS = 150e-6

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Golden:
    """Reference texts as ids, and the teacher's embeddings of them, float32 [N, D]."""

    rows: list[Ids]
    embeddings: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class EngineCost:
    """What an engine run takes: an overhead, counted in tokens, and so many tokens a second."""

    overhead_tokens: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """Everything needed to answer requests for one bundle."""

    name: str
    digest: str
    manifest: Manifest
    tokenizer: TextTokenizer
    engine: Engine
    golden: Golden
    cost: EngineCost


def load_model(source: ModelSource, on_fallback: Callable[[Manifest, str], None] = lambda *_: None) -> LoadedModel:
    """Check, load and warm up a bundle.

    `on_fallback(manifest, runtime)` hears of every engine that did not load when `source.engine` is `auto`.
    Raises BundleRejected for a damaged or contradictory bundle, EngineUnavailable when no engine loads.
    """
    try:
        manifest = verify_bundle(source.path)
        digest = digest_of(source.path)
    except RegistryError as error:
        raise BundleRejected(str(error)) from None
    tokenizer = TextTokenizer.from_folder(source.path, manifest.max_seq_length)
    golden = _read_golden(source.path / GOLDEN_NAME, manifest)
    _check_tokenizer(tokenizer, golden)
    engine = _open_engine(source, manifest, on_fallback)
    try:
        cost = warm_up(engine, golden.rows, manifest)
    except BaseException:
        engine.close()
        raise
    return LoadedModel(source.name or manifest.model_name, digest, manifest, tokenizer, engine, golden, cost)


def warm_up(engine: Engine, rows: Sequence[Ids], manifest: Manifest) -> EngineCost:
    """Run a single text, a batch and the longest input, and measure the first two.

    Raises BundleRejected when the output is not finite or not [B, manifest.dimension].
    """
    longest = np.resize(max(rows, key=len), manifest.max_seq_length)
    _run_checked(engine, [longest], manifest)
    single, batch = [rows[0]], [rows[0]] * _WARM_UP_BATCH
    single_seconds = min(_run_checked(engine, single, manifest) for _ in range(_WARM_UP_RUNS))
    batch_seconds = min(_run_checked(engine, batch, manifest) for _ in range(_WARM_UP_RUNS))
    token_seconds = max(batch_seconds - single_seconds, 0.01 * batch_seconds) / (len(rows[0]) * (_WARM_UP_BATCH - 1))
    overhead_seconds = _HANDLING_SECONDS + max(0.0, single_seconds - len(rows[0]) * token_seconds)
    return EngineCost(overhead_seconds / token_seconds, len(rows[0]) * _WARM_UP_BATCH / batch_seconds)


def _run_checked(engine: Engine, rows: Sequence[Ids], manifest: Manifest) -> float:
    """Seconds of one engine run whose output agrees with the manifest."""
    input_ids, mask = pad_batch(rows)
    started = time.perf_counter()
    try:
        embeddings = engine.embed(input_ids, mask)
    except Exception as error:  # vendors' errors share no base class
        raise BundleRejected(f"{engine.runtime} fails on {input_ids.shape} ids: {type(error).__name__}") from error
    seconds = time.perf_counter() - started
    check_embeddings(embeddings, len(rows), manifest.dimension)
    return seconds


def check_embeddings(embeddings: Embeddings, count: int, dimension: int) -> None:
    """Raise BundleRejected unless `embeddings` is finite and [count, dimension]."""
    if embeddings.shape != (count, dimension):
        raise BundleRejected(f"the engine answers {embeddings.shape}, the manifest says {(count, dimension)}")
    if not np.isfinite(embeddings).all():
        raise BundleRejected("the engine answers reference texts with non-finite vectors")


def _read_golden(path: Path, manifest: Manifest) -> Golden:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            input_ids, lengths, embeddings = (arrays[name] for name in ("input_ids", "lengths", "embeddings"))
    except (OSError, KeyError, ValueError, BadZipFile) as error:
        raise BundleRejected(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    if embeddings.shape != (len(input_ids), manifest.dimension) or lengths.shape != (len(input_ids),):
        raise BundleRejected(
            f"{path} has {len(input_ids)} texts, {lengths.shape} lengths and embeddings of shape {embeddings.shape}; "
            f"the manifest says dimension {manifest.dimension}"
        )
    if not len(lengths) or lengths.min() < 1 or lengths.max() > min(input_ids.shape[1], manifest.max_seq_length):
        raise BundleRejected(f"{path} has texts outside 1 to {manifest.max_seq_length} tokens")
    rows = [ids[:length].astype(np.int64) for ids, length in zip(input_ids, lengths, strict=True)]
    return Golden(rows, embeddings.astype(np.float32))


def _check_tokenizer(tokenizer: TextTokenizer, golden: Golden) -> None:
    """The tokenizer that made the reference ids knows all of them and frames a text as they are framed."""
    highest = max(int(ids.max()) for ids in golden.rows)
    if highest >= tokenizer.vocabulary_size:
        raise BundleRejected(
            f"the tokenizer has {tokenizer.vocabulary_size} tokens, the reference texts use id {highest}: "
            "it is not this model's"
        )
    special = set(tokenizer.encode([""])[0].tolist())
    if any(not special <= set(ids.tolist()) for ids in golden.rows):
        raise BundleRejected(
            f"the tokenizer frames a text with ids {sorted(special)}, the reference texts lack them: "
            "it is not this model's"
        )


def _open_engine(source: ModelSource, manifest: Manifest, on_fallback: Callable[[Manifest, str], None]) -> Engine:
    entries = [entry for entry in manifest.engines if source.engine in ("auto", entry.runtime)]
    if not entries:
        has = ", ".join(entry.runtime for entry in manifest.engines)
        raise EngineUnavailable(f"the bundle has no {source.engine} engine, it has {has}")
    if source.engine != "auto":
        return open_engine(source.path, entries[0], source.num_threads)
    return _open_first(source, manifest, entries, on_fallback)


def _open_first(
    source: ModelSource,
    manifest: Manifest,
    entries: Sequence[EngineEntry],
    on_fallback: Callable[[Manifest, str], None],
) -> Engine:
    reasons: list[str] = []
    for entry in entries:
        try:
            return open_engine(source.path, entry, source.num_threads)
        except EngineUnavailable as error:
            reasons.append(str(error))
            on_fallback(manifest, entry.runtime)
            _log.warning("engine fallback model=%s engine=%s reason=%s", manifest.model_name, entry.runtime, error)
    raise EngineUnavailable(f"no engine of the bundle loads: {'; '.join(reasons)}")
