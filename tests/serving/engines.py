"""Engines with a will of their own; each implements the protocol around a real one."""

import threading
from collections.abc import Callable

import numpy as np

from serving.engines import Embeddings, Engine
from serving.tokenizer import Ids


class WrappedEngine:
    """The real engine, with every batch shape noted."""

    def __init__(self, inner: Engine) -> None:
        self.inner = inner
        self.shapes: list[tuple[int, int]] = []
        self.is_closed = False

    @property
    def runtime(self) -> str:
        return self.inner.runtime

    @property
    def compiles_shapes(self) -> bool:
        return self.inner.compiles_shapes

    @property
    def is_packed(self) -> bool:
        return self.inner.is_packed

    def embed(self, input_ids: Ids, attention_mask: Ids) -> Embeddings:
        self.shapes.append((input_ids.shape[0], input_ids.shape[1]))
        return self.inner.embed(input_ids, attention_mask)

    def close(self) -> None:
        self.is_closed = True


class HeldEngine(WrappedEngine):
    """Computes only while `gate` is set, unless `is_free(input_ids)`; `entered` says that a held run has begun."""

    def __init__(self, inner: Engine, is_free: Callable[[Ids], bool] = lambda _: False) -> None:
        super().__init__(inner)
        self.gate, self.entered = threading.Event(), threading.Event()
        self._is_free = is_free

    def embed(self, input_ids: Ids, attention_mask: Ids) -> Embeddings:
        if not self._is_free(input_ids):
            self.entered.set()
            assert self.gate.wait(20), "the test never opened the gate"
        return super().embed(input_ids, attention_mask)


class FaultyEngine(WrappedEngine):
    """Applies `fault(input_ids, embeddings)` to every answer; it may raise."""

    def __init__(self, inner: Engine, fault: Callable[[Ids, Embeddings], Embeddings]) -> None:
        super().__init__(inner)
        self._fault = fault

    def embed(self, input_ids: Ids, attention_mask: Ids) -> Embeddings:
        return self._fault(input_ids, super().embed(input_ids, attention_mask))


def raise_on(token: int, message: str = "poison") -> Callable[[Ids, Embeddings], Embeddings]:
    """A fault that raises when `token` is in the batch."""

    def fault(input_ids: Ids, embeddings: Embeddings) -> Embeddings:
        if (input_ids == token).any():
            raise RuntimeError(message)
        return embeddings

    return fault


def nan_on(token: int) -> Callable[[Ids, Embeddings], Embeddings]:
    """A fault that spoils the vectors of texts that hold `token`."""

    def fault(input_ids: Ids, embeddings: Embeddings) -> Embeddings:
        spoiled = embeddings.copy()
        spoiled[(input_ids == token).any(axis=1)] = np.nan
        return spoiled

    return fault


def die(input_ids: Ids, embeddings: Embeddings) -> Embeddings:
    """A fault of the whole engine."""
    raise RuntimeError("dead")
