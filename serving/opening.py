"""From a bundle's list of engines to the one that runs: what was asked for by name, or the measured best."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

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
from serving.engines import Embeddings, Engine, num_cores, open_engine
from serving.errors import BundleRejected, EngineUnavailable, ServingError
from serving.settings import ModelSource
from serving.tokenizer import Ids

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
    """One engine for a small batch that runs alone, on all cores, and another for everything else."""

    def __init__(self, small: Engine, large: Engine) -> None:
        self._small, self._large = small, large
        self._num_running = 0
        self._lock = threading.Lock()
        self.runtime = " + ".join(dict.fromkeys((small.runtime, large.runtime)))
        self.compiles_shapes = small.compiles_shapes or large.compiles_shapes

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

    def __init__(self, source: ModelSource, manifest: Manifest, on_fallback: OnFallback) -> None:
        """Raises EngineUnavailable when the bundle has no engine of the name that was asked for."""
        self._source, self._manifest, self._on_fallback = source, manifest, on_fallback
        self._entries: dict[str, EngineEntry] = {
            e.runtime: e for e in reversed(manifest.engines) if source.engine in ("auto", e.runtime)
        }
        if not self._entries:
            has = ", ".join(entry.runtime for entry in manifest.engines)
            raise EngineUnavailable(f"the bundle has no {source.engine} engine, it has {has}")

    def open_best(self, digest: str, rows: Sequence[Ids], layout: Choice | None = None) -> Opened:
        """The engine remembered as best, else that of `layout`, else the one measured as best on `rows`.

        Raises EngineUnavailable when none loads.
        """
        entries: list[EngineEntry] = [e for e in self._manifest.engines if self._entries.get(e.runtime) is e]
        setups = list_setups(entries, self._source.num_threads, self._source.num_instances, num_cores())
        path, key = record_path(self._source.path), node_key(digest, setups)
        choice = Choice(setups[0], setups[0]) if len(setups) == 1 else read_choice(path, key)
        if choice is None and layout is not None:
            choice = layout.keep_layout(list(self._entries))
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
        if choice != Choice(setup, setup):
            engine.close()
            engine = self.open_choice(choice)
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
            None if spare is None else partial(self._open, replace(choice.large, runtime=spare.runtime)),
        )

    def _open(self, setup: Setup, cache: Path | None = None) -> Engine:
        entry = self._entries[setup.runtime]
        engine = open_engine(self._source.path, entry, setup.num_threads, setup.num_instances, cache)
        if getattr(engine, "rebuild_reason", None):  # the engine has logged it
            self._on_fallback(self._manifest, f"{setup.runtime} plan")
        return engine

    def open_choice(self, choice: Choice) -> Engine:
        """The engine, or the pair of engines, of a choice. Raises EngineUnavailable."""
        large = self._open(choice.large)
        return large if choice.small == choice.large else SwitchedEngine(self._open(choice.small), large)

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
                self._report_fallback(setup.runtime, error)
                continue
            if best is None or measured[-1].score < best[0]:
                best, dropped = (measured[-1].score, engine, setup), best
            else:
                dropped = (0.0, engine, setup)
            if dropped is not None:
                dropped[1].close()
        if best is None:
            reasons = f"no engine of the bundle loads: {'; '.join(map(str, failed.values()))}"
            rejected = any(isinstance(error, BundleRejected) for error in failed.values())
            raise BundleRejected(reasons) if rejected else EngineUnavailable(reasons)
        return measured, best[1], best[2]

    def _report_fallback(self, runtime: str, error: ServingError) -> None:
        self._on_fallback(self._manifest, runtime)
        name = self._manifest.model_name
        _log.warning("engine fallback model=%s engine=%s reason=%s", name, runtime, error)


def _measure_checked(engine: Engine, setup: Setup, rows: Sequence[Ids]) -> Measured:
    try:
        return measure(engine, setup, rows)
    except Exception as error:  # vendors' errors share no base class
        engine.close()
        raise BundleRejected(f"{engine.runtime} fails on the reference texts: {type(error).__name__}") from None
