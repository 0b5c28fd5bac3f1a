"""A model ready to serve: its bundle checked byte by byte, its engine loaded, warmed up and measured."""

import logging
import os
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from registry.manifest import Manifest, RegistryError, digest_of, hold_bundle, verify_bundle
from serving.autotune import Choice
from serving.containment import OpenEngine
from serving.engines import Embeddings, Engine, memory_of
from serving.errors import BundleRejected
from serving.latency_model import LatencyModel, Run
from serving.opening import BY_DEFAULT, Opened, Opener
from serving.settings import CustomKernelsSettings, ModelSource
from serving.shapes import ShapeGrid
from serving.tokenizer import Ids, TextTokenizer, pad_batch

GOLDEN_NAME = "golden.npz"
_WARM_UP_BATCH = 8
_WARM_UP_RUNS = 3
# An engine that compiles shapes meets those of these sizes before it counts as loaded, within this time.
_MEET_SIZES = (1, 2, 4)
_MEET_SECONDS = 0.08

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Golden:
    """Reference texts as ids, and the teacher's embeddings of them, float32 [N, D]."""

    rows: list[Ids]
    embeddings: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class EngineCost:
    """What engine runs of the warm-up took; `overhead_tokens` could be computed in the time a run takes to start."""

    runs: tuple[Run, ...]

    @property
    def overhead_tokens(self) -> float:
        """A run's fixed cost, in tokens."""
        return LatencyModel(self.runs).overhead_tokens

    @property
    def tokens_per_second(self) -> float:
        """Speed of the largest run."""
        largest = max(self.runs, key=lambda run: run.padded_tokens)
        return largest.padded_tokens / largest.seconds


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class LoadedModel:
    """Everything needed to answer requests for one bundle."""

    name: str
    digest: str
    manifest: Manifest
    tokenizer: TextTokenizer
    engine: Engine
    golden: Golden
    cost: EngineCost
    choice: Choice
    reopen: OpenEngine | None  # opens the same engine anew
    open_spare: OpenEngine | None  # opens another engine of the bundle

    @property
    def runtime(self) -> str:
        """The engine's runtime and its version."""
        return self.engine.runtime

    @property
    def memory_bytes(self) -> int | None:
        """GPU memory that its engine took when it was opened; None where the engine does not say."""
        return memory_of(self.engine)

    @property
    def has_custom_kernels(self) -> bool:
        """Whether its engine computes on kernels of our own."""
        return self.choice.large.runtime == "cuda"

    @property
    def num_computing(self) -> int:
        """Batches that the engine computes at a time, of the `choice.large.num_instances` that it takes."""
        num_runs = self.choice.large.num_instances
        return max(1, num_runs - 1) if getattr(self.engine, "takes_next", False) else num_runs

    @property
    def grid(self) -> ShapeGrid:
        """The shapes its engine is asked for."""
        return ShapeGrid(self.manifest.max_seq_length, self.engine.compiles_shapes, self.engine.is_packed)


def load_model(
    source: ModelSource,
    on_fallback: Callable[[Manifest, str], None] = lambda *_: None,
    public_key: Path | None = None,
    layout: Choice | None = None,
    kernels: CustomKernelsSettings = BY_DEFAULT,
    devices: Sequence[int] = (),
) -> LoadedModel:
    """Check, load and warm up a bundle.

    `on_fallback(manifest, runtime)` hears of every engine that did not load when `source.engine` is `auto`. With
    `public_key` the bundle must be signed by a key of that file. With `layout` nothing is measured. While the model is
    there its folder is held: an engine that has to be replaced is opened from it anew.
    Raises BundleRejected for a damaged or contradictory bundle, EngineUnavailable when no engine loads.
    """
    try:
        held = hold_bundle(source.path)
    except RegistryError as error:
        raise BundleRejected(str(error)) from None
    try:
        model = _load(source, on_fallback, public_key, layout, kernels, devices)
    except BaseException:
        os.close(held)
        raise
    weakref.finalize(model, os.close, held)
    return model


def _load(
    source: ModelSource,
    on_fallback: Callable[[Manifest, str], None],
    public_key: Path | None,
    layout: Choice | None,
    kernels: CustomKernelsSettings,
    devices: Sequence[int],
) -> LoadedModel:
    try:
        manifest, digest = verify_bundle(source.path, public_keys=public_key), digest_of(source.path)
    except RegistryError as error:
        raise BundleRejected(str(error)) from None
    tokenizer = TextTokenizer.from_folder(source.path, manifest.max_seq_length)
    golden = _read_golden(source.path / GOLDEN_NAME, manifest)
    _check_tokenizer(tokenizer, golden)
    opened = Opener(source, manifest, on_fallback, kernels, devices).open_best(digest, golden.rows, layout)
    try:
        cost = warm_up(opened.engine, golden.rows, manifest)
        if opened.engine.compiles_shapes:
            _meet_shapes(opened, golden.rows, ShapeGrid(manifest.max_seq_length, is_coarse=True))
    except BaseException:
        opened.engine.close()
        raise
    return LoadedModel(
        source.name or manifest.model_name,
        digest,
        manifest,
        tokenizer,
        opened.engine,
        golden,
        cost,
        opened.choice,
        opened.reopen,
        opened.open_spare,
    )


def warm_up(engine: Engine, rows: Sequence[Ids], manifest: Manifest) -> EngineCost:
    """Run a single text, a batch and the longest input, and measure the first two.

    Raises BundleRejected when the output is not finite or not [B, manifest.dimension].
    """
    longest = np.resize(max(rows, key=len), manifest.max_seq_length)
    _run_checked(engine, [longest], manifest)
    single, batch = [rows[0]], [rows[0]] * _WARM_UP_BATCH
    return EngineCost(
        tuple(
            Run(len(texts) * len(rows[0]), min(_run_checked(engine, texts, manifest) for _ in range(_WARM_UP_RUNS)))
            for texts in (single, batch)
        )
    )


def _meet_shapes(opened: Opened, rows: Sequence[Ids], grid: ShapeGrid) -> None:
    """Run the shapes that traffic like the reference texts will ask for first, as many as the time allows."""
    lengths = sorted({grid.round_length(len(row)) for row in rows})
    batches = [pad_batch([rows[0][:1]] * size, length) for size in _MEET_SIZES for length in lengths]
    deadline = time.perf_counter() + _MEET_SECONDS

    def meet(_: int) -> None:
        for batch in batches:
            if time.perf_counter() > deadline:
                return
            opened.engine.embed(*batch)

    num_instances = opened.choice.large.num_instances
    with ThreadPoolExecutor(num_instances) as pool:
        list(pool.map(meet, range(num_instances)))


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
