"""One model on several GPUs: an engine on each, and every batch goes to one that has nothing to do."""

import logging
import threading
from collections.abc import Callable, Sequence

from serving.engines import Embeddings, Engine, close_engine, memory_of
from serving.engines.packing import Limits
from serving.errors import EngineUnavailable
from serving.tokenizer import Ids

_log = logging.getLogger(__name__)


class ReplicatedEngine:
    """Equal engines behind one: as many threads may run batches as there are engines, others wait for their turn.

    An engine that raises on a batch which another then answers gets no more of them: its GPU is lost to this process.
    The last one is kept, so that its failures are those of an engine that stands alone.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        """`engines`, one at least, run one batch at a time each."""
        self._engines, self._left = tuple(engines), list(engines)
        self._idle = list(reversed(engines))  # the last is taken first: a lone client keeps one GPU awake, not all
        self._changed = threading.Condition()  # guards the two lists
        self.compiles_shapes = any(engine.compiles_shapes for engine in engines)
        self.is_packed = all(engine.is_packed for engine in engines)

    @property
    def runtime(self) -> str:
        """See `Engine.runtime`; also says how many of the GPUs still get batches."""
        names = " + ".join(dict.fromkeys(engine.runtime for engine in self._engines))
        return f"{names} on {len(self._left)} of {len(self._engines)} GPUs"

    @property
    def memory_limit_tokens(self) -> int | None:
        """Tokens of the largest batch that each GPU's memory holds, where one has learned it."""
        limits = [getattr(engine, "memory_limit_tokens", None) for engine in self._engines]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def memory_bytes(self) -> int | None:
        """See `memory_of`; what a lost GPU holds included."""
        return memory_of(*self._engines)

    @property
    def limits(self) -> Limits | None:
        """What the model takes, where its engines say it."""
        return getattr(self._engines[0], "limits", None)

    def embed(self, input_ids: Ids, attention_mask: Ids) -> Embeddings:
        """See `Engine.embed`. Raises what two engines raise on this batch, or the only one left."""
        engine = self._take()
        assert engine is not None, "one engine is always left"
        try:
            return engine.embed(input_ids, attention_mask)
        except Exception as error:  # vendors' errors share no base class
            failure = error
        finally:
            self._give_back(engine)
        return self._ask_another(engine, failure, input_ids, attention_mask)

    def close(self) -> None:
        """See `Engine.close`. What a lost GPU holds is left to the end of the process."""
        for engine in self._left:
            close_engine(engine)

    def _ask_another(self, engine: Engine, failure: Exception, input_ids: Ids, attention_mask: Ids) -> Embeddings:
        """Whether the batch is at fault or the engine: the first is raised on by every engine."""
        other = self._take(other_than=engine)
        if other is None:
            raise failure
        try:
            vectors = other.embed(input_ids, attention_mask)
        finally:
            self._give_back(other)
        self._lose(engine, failure)
        return vectors

    def _take(self, other_than: Engine | None = None) -> Engine | None:
        """An idle engine, as soon as there is one; None where only `other_than` is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._left == [other_than] or any(e is not other_than for e in self._idle))
            found = next((engine for engine in reversed(self._idle) if engine is not other_than), None)
            if found is not None:
                self._idle.remove(found)
            return found

    def _give_back(self, engine: Engine) -> None:
        with self._changed:
            if engine in self._left:
                self._idle.append(engine)
            self._changed.notify_all()

    def _lose(self, engine: Engine, failure: Exception) -> None:
        with self._changed:
            if engine not in self._left or len(self._left) == 1:
                return
            self._left.remove(engine)
            if engine in self._idle:
                self._idle.remove(engine)
            self._changed.notify_all()
        _log.error(
            "engine gets no more batches gpu=%d left=%d error=%s",
            self._engines.index(engine),
            len(self._left),
            type(failure).__name__,
        )


def open_on_devices(open_one: Callable[[], Engine], devices: Sequence[int]) -> Engine:
    """What `open_one` opens on CUDA's current device, on each of `devices`; one of them needs no other around it.

    One after the other: a graph cannot be captured while another thread takes memory. Raises EngineUnavailable for a
    GPU that is not there, and what `open_one` raises; what was open is closed then.
    """
    import torch  # noqa: PLC0415  only the engines that are opened here need it

    count = torch.cuda.device_count()
    if count == 0:
        return open_one()  # which says why there is none
    for device in devices:
        if device >= count:
            raise EngineUnavailable(f"embedding.multi_gpu.devices has {device}, CUDA shows GPUs 0 to {count - 1}")
    engines: list[Engine] = []
    try:
        for device in devices:
            with torch.cuda.device(device):
                engines.append(open_one())
    except BaseException:
        for engine in engines:
            close_engine(engine)
        raise
    return engines[0] if len(engines) == 1 else ReplicatedEngine(engines)
