"""An engine that is not trusted: one bad text fails alone, a dead engine is opened anew, no vector leaves unchecked."""

import logging
import threading
from collections.abc import Callable, Sequence

import numpy as np

from serving.engines import Embeddings, Engine, close_engine
from serving.errors import EngineFailed, ServingError
from serving.tokenizer import Ids, pad_batch

OpenEngine = Callable[[], Engine]
# Hears of `rebuilt`, `rebuild_failed`, `retried` (a text the spare engine answered), `abandoned` (a stuck engine) and
# `divided` (a batch run again in parts, because vectors of it were not finite).
OnEvent = Callable[[str], None]

_log = logging.getLogger(__name__)


class GuardedEngine:
    """An engine with the means to replace it. Several threads may run batches on it, if the engine itself allows."""

    def __init__(
        self,
        engine: Engine,
        dimension: int,
        probe: Ids,
        *,
        reopen: OpenEngine | None = None,
        open_spare: OpenEngine | None = None,
        on_event: OnEvent = lambda _: None,
    ) -> None:
        """`probe` are the ids of a text that every sound engine answers."""
        self._engine: Engine | None = engine
        self._dimension, self._probe = dimension, probe
        self._reopen, self._open_spare, self._on_event = reopen, open_spare, on_event
        self._spare: Engine | None = None
        self._lock = threading.Lock()  # one thread at a time opens or drops an engine
        self._using_spare = threading.Lock()  # which runs one text at a time
        self._has_failed = False

    @property
    def is_dead(self) -> bool:
        """Whether there is no engine to ask: `revive` has to open one."""
        return self._engine is None

    @property
    def is_broken(self) -> bool:
        """Whether there is no engine and the last attempt to open one failed."""
        return self._engine is None and self._has_failed

    @property
    def memory_limit_tokens(self) -> int | None:
        """Tokens of the largest batch worth giving to the engine, where it has learned one."""
        return getattr(self._engine, "memory_limit_tokens", None)  # only engines with a memory of their own have one

    def run(
        self, rows: Sequence[Ids], input_ids: Ids, attention_mask: Ids
    ) -> tuple[Embeddings, dict[int, EngineFailed]]:
        """Vectors [B, D] of padded `rows`, and the failures by row; a failed row's vector is undefined.

        When every row fails and the probe does too, the engine is opened anew and the batch run once more.
        """
        engine = self._engine
        vectors, failures = self._run(engine, rows, input_ids, attention_mask)
        if len(failures) == len(rows) and self._reopen is not None and not self._answers_probe(engine):
            self._drop(engine)
            self.revive()
            vectors, failures = self._run(self._engine, rows, input_ids, attention_mask)
        if failures:
            self._retry(rows, vectors, failures)
        return vectors, failures

    def revive(self) -> bool:
        """Open the engine anew if there is none; False when that fails, or when it does not answer the probe."""
        with self._lock:
            if self._engine is not None:
                return True
            if self._reopen is None:
                return False
            self._has_failed = True
            try:
                engine = self._reopen()
            except ServingError as error:
                _log.error("engine rebuild failed reason=%s", error)
            else:
                if self._answers_probe(engine):
                    self._engine, self._has_failed = engine, False
                    _log.warning("engine rebuilt engine=%s", engine.runtime)
                    self._on_event("rebuilt")
                    return True
                _log.error("engine rebuild failed reason=the reference text is not answered")
                close_engine(engine)
            self._on_event("rebuild_failed")
            return False

    def abandon(self) -> bool:
        """Leave an engine that hangs to its thread, for `revive` to open another; False when none can be opened."""
        if self._reopen is None:
            return False
        self._engine = None
        self._on_event("abandoned")
        return True

    def close(self) -> None:
        """Free what is open."""
        self._drop(self._engine)
        if self._spare is not None:
            close_engine(self._spare)
            self._spare = None

    def _run(
        self, engine: Engine | None, rows: Sequence[Ids], input_ids: Ids, attention_mask: Ids
    ) -> tuple[Embeddings, dict[int, EngineFailed]]:
        if engine is None:
            failed = EngineFailed("the engine died and could not be opened anew")
            return np.zeros((len(rows), self._dimension), dtype=np.float32), dict.fromkeys(range(len(rows)), failed)
        return run_isolated(engine, rows, input_ids, attention_mask, self._dimension, self._on_event)

    def _answers_probe(self, engine: Engine | None) -> bool:
        return not self._run(engine, [self._probe], *pad_batch([self._probe]))[1]

    def _drop(self, engine: Engine | None) -> None:
        """Close `engine` unless another thread has replaced it already."""
        with self._lock:
            if engine is not None and self._engine is engine:
                self._engine = None
                close_engine(engine)

    def _retry(self, rows: Sequence[Ids], vectors: Embeddings, failures: dict[int, EngineFailed]) -> None:
        """Ask the bundle's other engine for the rows that failed; what it answers is put in place."""
        with self._lock:
            if self._spare is None and self._open_spare is not None:
                try:
                    self._spare = self._open_spare()
                except ServingError as error:
                    _log.warning("spare engine does not load reason=%s", error)
                    self._open_spare = None
            spare = self._spare
        if spare is None:
            return
        for row in sorted(failures):
            with self._using_spare:
                answer, failed = _run_together(spare, [rows[row]], self._dimension)
            if not failed:
                vectors[row] = answer[0]
                del failures[row]
                self._on_event("retried")


def run_isolated(
    engine: Engine,
    rows: Sequence[Ids],
    input_ids: Ids,
    attention_mask: Ids,
    dimension: int,
    on_event: OnEvent = lambda _: None,
) -> tuple[Embeddings, dict[int, EngineFailed]]:
    """Run a batch; when it raises, run its halves, so that the text at fault fails alone.

    In a packed batch what is not finite in one text reaches its neighbours, more of them with every layer: those whose
    vectors are not finite are run again, all together if others were, else in halves. Returns vectors [B, D] and the
    failures by row; a failed row's vector is undefined.
    """
    try:
        vectors = engine.embed(input_ids, attention_mask)
    except Exception as error:  # an edge: vendors' errors share no base class, and may quote their input
        if len(rows) == 1:
            failed = EngineFailed(f"the engine raised {type(error).__name__} on this text")
            return np.zeros((1, dimension), dtype=np.float32), {0: failed}
        return _run_halves(engine, rows, dimension)
    if vectors.shape != (len(rows), dimension):
        failed = EngineFailed(f"the engine answered {vectors.shape}, expected {(len(rows), dimension)}")
        return np.zeros((len(rows), dimension), dtype=np.float32), dict.fromkeys(range(len(rows)), failed)
    failures = _find_non_finite(vectors)
    if not failures or len(rows) == 1 or not engine.is_packed:
        return vectors, failures
    on_event("divided")
    spoilt = sorted(failures)
    again = [rows[row] for row in spoilt]
    run = _run_halves if len(again) == len(rows) else _run_together
    vectors[spoilt], still = run(engine, again, dimension)
    return vectors, {spoilt[row]: error for row, error in still.items()}


def _run_together(engine: Engine, rows: Sequence[Ids], dimension: int) -> tuple[Embeddings, dict[int, EngineFailed]]:
    return run_isolated(engine, rows, *pad_batch(rows), dimension)


def _run_halves(engine: Engine, rows: Sequence[Ids], dimension: int) -> tuple[Embeddings, dict[int, EngineFailed]]:
    middle = len(rows) // 2
    first, failures = _run_together(engine, rows[:middle], dimension)
    second, more = _run_together(engine, rows[middle:], dimension)
    return np.concatenate((first, second)), failures | {middle + row: error for row, error in more.items()}


def _find_non_finite(vectors: Embeddings) -> dict[int, EngineFailed]:
    finite = np.isfinite(vectors)
    if finite.all():
        return {}
    failed = EngineFailed("the engine returned a non-finite vector for this text")
    return {int(row): failed for row in np.flatnonzero(~finite.all(axis=1))}
