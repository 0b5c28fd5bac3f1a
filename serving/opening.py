"""From a bundle's list of engines to the one that runs: what was asked for by name, or the best that loads.

The best is the first of GPU_CHAIN that the bundle has and that loads; where none does, the CPU's kernels of our own;
else the fastest on the CPU. An engine that does not load while another does is logged and counted.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

from registry.manifest import EngineEntry, Manifest
from serving.autotune import (
    Choice,
    Measured,
    Setup,
    choose,
    list_setups,
    measure,
    node_key,
    read_choice,
    record_path,
    write_choice,
)
from serving.engines import (
    RUNS_OF_CUDA,
    Embeddings,
    Engine,
    close_engine,
    has_nvidia_driver,
    memory_of,
    num_cores,
    open_engine,
)
from serving.engines.packing import Limits
from serving.errors import BundleRejected, EngineUnavailable, ServingError
from serving.settings import CustomKernelsSettings, ModelSource
from serving.tokenizer import Ids

BY_DEFAULT = CustomKernelsSettings()
GPU_CHAIN = ("cuda", "tensorrt", "onnxruntime-cuda")
# What a bundle has beside these is for processors without them: it is not measured against them.
_OWN_ON_CPU = ("avx512",)
_ONNX_ON_GPU = ("fp32", "fp16", "bf16")  # precisions that its CUDA provider computes on the GPU

# Up to this many tokens, padding included, a batch counts as small.
_SMALL_TOKENS = 64

OnFallback = Callable[[Manifest, str], None]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """An engine, how it was set up, and how to open it anew or another one of the bundle."""

    engine: Engine
    choice: Choice
    reopen: Callable[[], Engine]
    open_spare: Callable[[], Engine] | None


class SwitchedEngine:
    """One engine for a small batch that runs alone, on more threads, and another for everything else."""

    def __init__(self, small: Engine, large: Engine) -> None:
        self._small, self._large = small, large
        self._num_running = 0
        self._lock = threading.Lock()
        self.runtime = " + ".join(dict.fromkeys((small.runtime, large.runtime)))
        self.compiles_shapes = small.compiles_shapes or large.compiles_shapes
        self.is_packed = small.is_packed and large.is_packed
        self.memory_bytes = memory_of(small, large)

    def embed(self, input_ids: Ids, attention_mask: Ids) -> Embeddings:
        """See `Engine.embed`."""
        with self._lock:
            is_alone = self._num_running == 0
            self._num_running += 1
        try:
            engine = self._small if is_alone and input_ids.size <= _SMALL_TOKENS else self._large
            return engine.embed(input_ids, attention_mask)
        finally:
            with self._lock:
                self._num_running -= 1

    def close(self) -> None:
        """See `Engine.close`."""
        self._small.close()
        self._large.close()


class Opener:
    """Opens the engines of one bundle. `on_fallback(manifest, runtime)` hears of each that does not load."""

    def __init__(
        self,
        source: ModelSource,
        manifest: Manifest,
        on_fallback: OnFallback,
        kernels: CustomKernelsSettings = BY_DEFAULT,
        devices: Sequence[int] = (),
    ) -> None:
        """`devices`: GPUs for the cuda engine.

        Raises EngineUnavailable when the bundle has no engine of the name that was asked for.
        """
        self._source, self._manifest, self._on_fallback = source, manifest, on_fallback
        self._max_tokens, self._devices = kernels.max_tokens, tuple(devices)
        wanted = _choose_name(source, kernels)
        entries = _list_entries(manifest)
        self._entries = {
            name: entry
            for name, entry in entries.items()
            if wanted == name or (wanted == "auto" and (name != "cuda" or kernels.use != "never"))
        }
        if not self._entries:
            raise EngineUnavailable(f"the bundle has no {wanted} engine, it has {', '.join(entries)}")
        if devices and "cuda" not in self._entries:
            _log.warning("embedding.multi_gpu is for the cuda engine alone model=%s", manifest.model_name)

    def open_best(self, digest: str, rows: Sequence[Ids], layout: Choice | None = None) -> Opened:
        """The first of the GPU's engines, else the best on the CPU: remembered, of `layout`, or measured on `rows`.

        Raises EngineUnavailable or BundleRejected when none loads.
        """
        failed: list[ServingError] = []
        first = [name for name in (*GPU_CHAIN, *_OWN_ON_CPU) if name in self._entries]
        others = [name for name in self._entries if name not in first]
        groups = [*([name] for name in first), *([others] if others else [])]
        for number, names in enumerate(groups, start=1):
            try:
                if names[0] in GPU_CHAIN:
                    return self._open_on_gpu(names[0], rows)
                return self._open_best_on_cpu(names, digest, rows, layout)
            except (EngineUnavailable, BundleRejected) as error:
                failed.append(error)
                if number < len(groups):
                    self._report_fallback(names[0], error)
        raise _combine(failed)

    def _open_on_gpu(self, name: str, rows: Sequence[Ids]) -> Opened:
        one = RUNS_OF_CUDA if name == "cuda" else 1
        num_runs = len(self._devices) if name == "cuda" and len(self._devices) > 1 else one
        setup = Setup(name, self._source.num_threads or num_cores(), num_runs)
        engine = self._open(setup)
        _log.info("engine chosen setup=%s measured=%s", setup, _measure_checked(engine, setup, rows))
        return self._opened(Choice(setup, setup), engine)

    def _open_best_on_cpu(
        self, names: Sequence[str], digest: str, rows: Sequence[Ids], layout: Choice | None
    ) -> Opened:
        entries = [self._entries[name] for name in names]
        setups = list_setups(entries, self._source.num_threads, self._source.num_instances, num_cores())
        path, key = record_path(self._source.path), node_key(digest, setups)
        choice = Choice(setups[0], setups[0]) if len(setups) == 1 else read_choice(path, key)
        if choice is None and layout is not None:
            choice = layout.keep_layout([entry.runtime for entry in entries])
        if choice is not None and {choice.large, choice.small} <= set(setups):
            try:
                return self._opened(choice, self.open_choice(choice))
            except EngineUnavailable as error:
                if len(setups) == 1:
                    raise
                _log.warning("the engine chosen before does not load reason=%s", error)
        with TemporaryDirectory() as cache:  # not kept: what lies beside a bundle has no digest
            measured, engine, setup = self._measure(setups, rows, Path(cache))
        choice = choose(measured)
        engine = self.open_choice(choice, {setup: engine})
        _log.info("engine chosen setup=%r measured=%s", str(choice), " ".join(map(str, measured)))
        write_choice(path, key, choice, measured)
        return self._opened(choice, engine)

    def _opened(self, choice: Choice, engine: Engine) -> Opened:
        spare = next(
            (e for name, e in self._entries.items() if name not in (choice.large.runtime, choice.small.runtime)), None
        )
        return Opened(
            engine,
            choice,
            partial(self.open_choice, choice),
            None
            if spare is None
            else partial(self._open, replace(choice.large, runtime=spare.runtime, num_instances=1)),
        )

    def _open(self, setup: Setup, cache: Path | None = None) -> Engine:
        """Raises EngineUnavailable, and BundleRejected where the manifest promises longer texts than the model takes.

        Engines of our own say how long those are; others fail on the longest text, at warm-up.
        """
        engine = self._load(setup, cache)
        limits: Limits | None = getattr(engine, "limits", None)
        if limits is not None and limits.positions < self._manifest.max_seq_length:
            close_engine(engine)
            raise BundleRejected(
                f"{self._source.path}: max_seq_length of the manifest is {self._manifest.max_seq_length}, "
                f"the model of its {setup.runtime} engine has {limits.positions} positions: build the bundle anew"
            )
        return engine

    def _load(self, setup: Setup, cache: Path | None) -> Engine:
        """Raises EngineUnavailable, whatever the vendor's library raises."""
        entry = self._entries[setup.runtime]
        try:
            return open_engine(
                self._source.path,
                entry,
                setup.num_threads,
                setup.num_instances,
                cache,
                max_tokens=self._max_tokens,
                on_gpu=setup.runtime in GPU_CHAIN,
                on_rebuild=lambda: self._on_fallback(self._manifest, f"{setup.runtime} plan"),
                devices=self._devices,
            )
        except ServingError:
            raise
        except Exception as error:  # vendors' errors share no base class
            reason = f"{setup.runtime} does not load: {type(error).__name__}: {error}"
        raise EngineUnavailable(reason)  # here: the error above would keep what the engine has of the GPU's memory

    def open_choice(self, choice: Choice, opened: Mapping[Setup, Engine] = MappingProxyType({})) -> Engine:
        """The engine, or the pair of engines, of a choice. Raises what `_open` raises.

        Engines of `opened` are taken where they fit and closed where they do not.
        """
        for setup in opened.keys() - {choice.large, choice.small}:
            opened[setup].close()
        large = opened.get(choice.large) or self._open(choice.large)
        if choice.small == choice.large:
            return large
        return SwitchedEngine(opened.get(choice.small) or self._open(choice.small), large)

    def _measure(
        self, setups: Sequence[Setup], rows: Sequence[Ids], cache: Path
    ) -> tuple[list[Measured], Engine, Setup]:
        """Every setup whose engine loads and runs, at most two open at a time; also the best one, still open.

        Raises EngineUnavailable or BundleRejected when there is none.
        """
        measured: list[Measured] = []
        best: tuple[float, Engine, Setup] | None = None
        failed: dict[str, ServingError] = {}
        for setup in setups:
            if setup.runtime in failed:
                continue
            try:
                engine = self._open(setup, cache)
                measured.append(_measure_checked(engine, setup, rows))
            except (EngineUnavailable, BundleRejected) as error:
                failed[setup.runtime] = error
                continue
            score = measured[-1].score
            if best is None or score < best[0]:
                best, dropped = (score, engine, setup), best
            else:
                dropped = (0.0, engine, setup)
            if dropped is not None:
                dropped[1].close()
        if best is None:
            raise _combine(list(failed.values()))
        for name, reason in failed.items():
            self._report_fallback(name, reason)
        return measured, best[1], best[2]

    def _report_fallback(self, runtime: str, error: ServingError) -> None:
        self._on_fallback(self._manifest, runtime)
        name = self._manifest.model_name
        _log.warning("engine fallback model=%s engine=%s reason=%s", name, runtime, error)


def _choose_name(source: ModelSource, kernels: CustomKernelsSettings) -> str:
    """The engine's name, or auto. Raises EngineUnavailable where two settings contradict each other."""
    contradiction = {"always": source.engine not in ("auto", "cuda"), "never": source.engine == "cuda"}
    if contradiction.get(kernels.use):
        raise EngineUnavailable(
            f"embedding.custom_kernels.use = {kernels.use} and engine = {source.engine} contradict each other"
        )
    return "cuda" if kernels.use == "always" else source.engine


def _list_entries(manifest: Manifest) -> dict[str, EngineEntry]:
    """What the bundle can run on here by name: GPU engines in the order of the chain, then the others in its own."""
    entries: dict[str, EngineEntry] = {}
    for entry in manifest.engines:
        entries.setdefault(entry.runtime, entry)
    is_first = manifest.engines[0].runtime == "onnxruntime"  # whose precision the manifest tells
    if is_first and manifest.precision in _ONNX_ON_GPU and has_nvidia_driver():
        entries["onnxruntime-cuda"] = entries["onnxruntime"]
    first = {name: entries.pop(name) for name in GPU_CHAIN if name in entries}
    return first | entries


def _combine(failed: Sequence[ServingError]) -> ServingError:
    """One error of all: the bundle's fault if it is that in one case."""
    if len(failed) == 1:
        return failed[0]
    reasons = f"no engine of the bundle loads: {'; '.join(map(str, failed))}"
    rejected = any(isinstance(error, BundleRejected) for error in failed)
    return BundleRejected(reasons) if rejected else EngineUnavailable(reasons)


def _measure_checked(engine: Engine, setup: Setup, rows: Sequence[Ids]) -> Measured:
    try:
        return measure(engine, setup, rows)
    except Exception as error:  # vendors' errors share no base class
        close_engine(engine)
        raise BundleRejected(f"{engine.runtime} fails on the reference texts: {type(error).__name__}") from None
