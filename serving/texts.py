"""What becomes of a request beside its engine runs: options checked, texts to ids, vectors cut as asked."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from registry.manifest import Manifest
from serving.errors import ClientGone, InvalidRequest, Overloaded
from serving.tokenizer import Ids, TextTokenizer

# Tokenising this much takes under 1 ms; more goes to a thread, so that the loop stays free.
_INLINE_CHARS = 4096
_INLINE_TEXTS = 16

# How an answer spells a vector.
Encoding = Literal["float", "base64", "int8", "ubinary"]
Receive = Callable[[], Awaitable[Any]]


@dataclass(slots=True)
class EmbedRequest:
    """What every dialect asks for. `param` is the field the texts came in, for error messages.

    `truncate_left` drops the beginning of a text that is too long; `normalize` is None where the model decides.
    `use_custom_kernels` is None where any engine will do.
    """

    texts: list[str]
    is_single: bool
    param: str
    model: str | None = None
    dimensions: int | None = None
    encoding: Encoding = "float"
    truncate: bool = True
    truncate_left: bool = False
    normalize: bool | None = None
    prompt: str | None = None
    use_custom_kernels: bool | None = None


@dataclass(slots=True)
class Embedded:
    """Vectors in the order of the texts, float32 [N, D], contiguous, the tokens they took and where the time went."""

    vectors: NDArray[np.float32]
    num_tokens: int
    tokenize_seconds: float
    queue_seconds: float
    engine_seconds: float


class TextModel(Protocol):
    """A model as a request sees it, whichever process its engine runs in."""

    @property
    def name(self) -> str:
        """What clients call it."""
        ...

    @property
    def manifest(self) -> Manifest:
        """Its bundle's."""
        ...

    @property
    def tokenizer(self) -> TextTokenizer:
        """From texts to its ids."""
        ...

    @property
    def runtime(self) -> str:
        """The engine's runtime and its version."""
        ...

    @property
    def has_custom_kernels(self) -> bool:
        """Whether its engine computes on kernels of our own."""
        ...


class AnswerMetrics(Protocol):
    """Counts the requests of one version of a model."""

    def count_answer(self, seconds: float) -> None:
        """One was answered with vectors."""
        ...

    def count_failure(self, status: int, error: str) -> None:
        """One failed; `error` is the error's code."""
        ...


class Service(Protocol):
    """Answers requests for one version of a model."""

    @property
    def model(self) -> TextModel:
        """What it answers for."""
        ...

    @property
    def metrics(self) -> AnswerMetrics:
        """Where its requests are counted."""
        ...

    async def embed(self, request: EmbedRequest, receive: Receive | None = None) -> Embedded:
        """Vectors of the request's texts; `receive` tells of a client that hangs up. Raises as `EmbeddingService`."""
        ...

    def is_flooded(self) -> bool:
        """Whether the next request may be refused unread, so that it pays to ask `turn_away`."""
        ...

    def turn_away(self) -> Overloaded | None:
        """Why the next request is refused, whatever it asks."""
        ...

    def is_healthy(self) -> bool:
        """Whether its engine answers in time."""
        ...


class TextSide:
    """The part of answering that needs a model's manifest and tokenizer, not its engine. Lives on one event loop."""

    def __init__(self, model: TextModel) -> None:
        self._model = model
        self._thread = ThreadPoolExecutor(1, "tokenizer")
        self.num_tokenising = 0  # texts that the thread has, or will get

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def check(self, request: EmbedRequest) -> None:
        """Raises InvalidRequest for options that the model does not have."""
        dimension = self._model.manifest.dimension
        if request.dimensions is not None and not 1 <= request.dimensions <= dimension:
            raise InvalidRequest(f"dimensions is {request.dimensions}, limits 1 and {dimension}", "dimensions")
        if request.normalize is False and self._model.manifest.normalize:
            raise InvalidRequest("normalize must be true: this model's engine normalises its vectors", "normalize")
        if request.use_custom_kernels not in (None, self._model.has_custom_kernels):
            wanted = str(request.use_custom_kernels).lower()
            raise InvalidRequest(
                f"use_custom_kernels is {wanted}, but {self._model.name} is served by {self._model.runtime}",
                "use_custom_kernels",
            )

    async def tokenise(self, request: EmbedRequest) -> tuple[list[Ids], bool]:
        """Ids of the texts, and whether others had a turn meanwhile: not where it is quick, without a thread.

        Raises InputTooLong, or InvalidRequest for a prompt that the model does not have.
        """
        texts = request.texts
        if request.prompt is not None:
            prefix = self._prompt(request.prompt)
            texts = [prefix + text for text in texts]
        encode, options = self._model.tokenizer.encode, (request.truncate, request.param, request.truncate_left)
        if len(texts) <= _INLINE_TEXTS and sum(map(len, texts)) <= _INLINE_CHARS:
            return encode(texts, *options), False
        self.num_tokenising += len(texts)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, encode, texts, *options), True
        finally:
            self.num_tokenising -= len(texts)

    def finish(self, request: EmbedRequest, embedded: Embedded) -> Embedded:
        """`embedded` with its vectors cut and scaled as the request asks."""
        manifest = self._model.manifest
        dimensions = request.dimensions or manifest.dimension
        if dimensions < manifest.dimension or (request.normalize and not manifest.normalize):
            embedded.vectors = shorten(embedded.vectors, dimensions)
        return embedded

    def _prompt(self, name: str) -> str:
        prompts = self._model.manifest.prompts
        if name not in prompts:
            raise InvalidRequest(f"the model has no such prompt, it has {sorted(prompts)}", "prompt")
        return prompts[name]


class Accepted:
    """Counts the requests inside its `with` blocks. Lives on one event loop."""

    def __init__(self) -> None:
        self.count = 0
        self._answered = asyncio.Event()

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(self, *_: object) -> None:
        self.count -= 1
        if not self.count:
            self._answered.set()

    async def wait(self) -> None:
        """Return once every one is answered."""
        while self.count:
            self._answered.clear()
            await self._answered.wait()


async def watch_client(receive: Receive, fail: Callable[[Exception], None]) -> None:
    """Give a request up when its client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass
    fail(ClientGone())


def shorten(vectors: NDArray[np.float32], dimensions: int) -> NDArray[np.float32]:
    """The first `dimensions` values of each vector, scaled to unit length again."""
    cut = np.ascontiguousarray(vectors[:, :dimensions])
    norms = np.linalg.norm(cut, axis=1, keepdims=True)
    shortened: NDArray[np.float32] = cut / np.maximum(norms, np.finfo(np.float32).tiny)
    return shortened
