"""The CUDA engine: packed batches on our own kernels, CUDA graphs for small ones, copies beside the computation."""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from serving.engines import RUNS_OF_CUDA, Embeddings
from serving.engines.cuda_memory import CAPTURING, empty_cache, fit_runs, is_out_of_memory
from serving.engines.cuda_node import find_problem_here
from serving.engines.cuda_shapes import Shape, list_shapes, make_shape, round_tokens
from serving.engines.packing import FILLER, Lengths, Limits, check_batch, pack, packed_size, split_rows
from serving.errors import EngineUnavailable
from serving.kernels import HEAD_SIZES
from serving.tokenizer import Ids

if TYPE_CHECKING:
    import torch

    from serving.engines.bert import BertConfig, Weights
    from serving.engines.cuda_encoder import Encoder

MAX_TOKENS = 131_072  # of one run; a larger batch takes several
MAX_ROWS = 4096
_LEAST_LENGTH = 16  # tokens of a text, on average, from which a run is full of tokens and not of texts
_WIDTH = 128  # what the kernels take of a row of states or of the intermediate at a time

_log = logging.getLogger(__name__)


class CudaEngine:
    """Runs `model.safetensors` with the `config.json` beside it; `compute` is `f16` or `f8` (E4M3 linear layers).

    As many threads as RUNS_OF_CUDA may run batches: one batch is packed and copied while another is computed.
    Everything the GPU needs is allocated and captured before the first batch; `memory_bytes` is what that took of the
    GPU's memory: by how much torch's part of it grew, so that what else happens to it meanwhile counts, too.
    """

    compiles_shapes, is_packed = False, True
    takes_next = True  # a batch more than it computes at a time

    def __init__(
        self, path: Path, compute: str = "f16", max_tokens: int = MAX_TOKENS, max_length: int = MAX_TOKENS
    ) -> None:
        """Load, warm up and capture, for texts of up to `max_length` tokens if the model takes as many.

        `max_tokens`, of a run, is halved until workspace, staging and graphs fit. Raises EngineUnavailable.
        """
        torch = _require_gpu(compute)
        from serving.engines.bert import load_weights, read_config  # noqa: PLC0415  they need torch

        config_path = path.with_name("config.json")
        self._config = read_config(config_path)
        check_sizes(config_path, self._config)
        weights = load_weights(path, self._config)
        _check_calibration(path, weights, compute)
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._max_length = min(max_length, self._config.positions)
        self._streams, self._submitting = _Streams.make(), threading.Lock()
        self.memory_limit_tokens: int | None = None
        empty_cache()  # what others left there would be used and not be counted
        before = torch.cuda.memory_reserved(self._device)
        fit_runs(partial(self._allocate, weights, compute), self.close, max_tokens, self._max_length)
        self.runtime = f"cuda {torch.version.cuda} {torch.cuda.get_device_name(self._device)} {compute}"
        self.memory_bytes = max(0, torch.cuda.memory_reserved(self._device) - before)

    @property
    def limits(self) -> Limits:
        """What the model takes."""
        return self._config.limits

    @property
    def max_tokens(self) -> int:
        """Tokens of one run, as many as the memory allowed."""
        return self._encoder.max_tokens

    def embed(self, input_ids: Ids, attention_mask: Ids) -> Embeddings:
        """See `Engine.embed`. Raises ValueError for what `check_batch` names, and for a text too long."""
        lengths = self._check(input_ids, attention_mask)
        try:
            return self._embed(input_ids, lengths)
        except RuntimeError as error:  # someone else took the memory: half as much at a time
            if len(lengths) == 1 or not is_out_of_memory(error):
                raise
        empty_cache()
        middle = len(lengths) // 2
        halves = slice(None, middle), slice(middle, None)
        vectors = np.concatenate([self.embed(input_ids[half], attention_mask[half]) for half in halves])
        self._learn_limit(max(int(lengths[half].sum()) for half in halves))
        return vectors

    def _learn_limit(self, tokens: int) -> None:
        """Halves of halves come first, so the smallest stays."""
        if self.memory_limit_tokens is None or tokens < self.memory_limit_tokens:
            self.memory_limit_tokens = tokens
            _log.warning("engine out of memory: batches are limited tokens=%d", tokens)

    def prepare(self, input_ids: Ids, attention_mask: Ids) -> Callable[[], "torch.Tensor"]:
        """Put a batch that fits one run on the GPU; the function computes its vectors there, again and again.

        It runs what `embed` runs between the copies: for measurements and profiles. The next run overwrites them.
        Raises ValueError where the batch takes more than one run.
        """
        import torch  # noqa: PLC0415  loaded with the engine

        lengths = self._check(input_ids, attention_mask)
        most = self._encoder.max_tokens, self._encoder.max_rows
        if lengths.sum() > most[0] or len(lengths) > most[1]:
            raise ValueError(
                f"{lengths.sum()} tokens in {len(lengths)} texts; a run has at most {most[0]} in {most[1]}"
            )
        shape = self._choose_shape(lengths)
        numbers = np.zeros(packed_size(shape.tokens, shape.rows), dtype=np.int32)
        pack(input_ids, lengths, shape.tokens, shape.rows, numbers)
        integers = torch.from_numpy(numbers).to(self._device)
        return lambda: self._compute(integers, shape)[: len(lengths)]

    def _allocate(self, weights: "Weights", compute: str, max_tokens: int) -> None:
        """Take all that runs of `max_tokens` need. Raises what `is_out_of_memory` knows; `close` cleans up then."""
        import torch  # noqa: PLC0415  loaded with the engine

        self._encoder = _make_encoder(weights, self._config, self._device, compute, max_tokens)
        self._slots: SimpleQueue[_Slot] = SimpleQueue()  # that no run uses
        for _ in range(RUNS_OF_CUDA):
            self._last = _Slot.make(self._encoder, self._device)
            self._slots.put(self._last)
        self._vectors = torch.zeros_like(self._last.results, device=self._device)
        self._static = torch.zeros_like(self._last.integers)
        with _small_workspace():
            self._graphs = self._capture()

    def close(self) -> None:
        """See `Engine.close`: gives back what `_allocate` took, however far it came."""
        import torch  # noqa: PLC0415  loaded with the engine

        with self._submitting:  # a batch that another thread brings meanwhile fails
            with CAPTURING:
                torch.cuda.synchronize(self._device)
            for name in ("_graphs", "_static", "_vectors", "_last", "_slots", "_encoder"):
                self.__dict__.pop(name, None)
        empty_cache()

    def _check(self, input_ids: Ids, attention_mask: Ids) -> Lengths:
        """The number of tokens of each text. Raises ValueError, also for one longer than the engine was opened for."""
        lengths = check_batch(input_ids, attention_mask, self.limits)
        longest = int(lengths.max())
        if longest > self._max_length:
            raise ValueError(f"a text of {longest} tokens, the engine was opened for texts of up to {self._max_length}")
        return lengths

    def _embed(self, input_ids: Ids, lengths: Lengths) -> Embeddings:
        vectors = np.empty((len(lengths), self._config.hidden), dtype=np.float32)
        runs = _Runs(self._slots, vectors)
        try:
            for rows in split_rows(lengths, self._encoder.max_tokens, self._encoder.max_rows):
                self._submit(runs.find_slot(rows), input_ids[rows], lengths[rows])
            runs.collect_all()
        except BaseException:
            try:
                self._streams.synchronize()  # a run may still read staging that the next batch writes
            finally:  # a GPU that is lost raises again
                runs.give_up()
            raise
        return vectors

    def _submit(self, slot: "_Slot", input_ids: Ids, lengths: Lengths) -> None:
        """Pack a run, and queue copy in, computation and copy out."""
        shape = self._choose_shape(lengths)
        used = packed_size(shape.tokens, shape.rows)
        pack(input_ids, lengths, shape.tokens, shape.rows, slot.numbers[:used])
        with self._submitting:
            self._queue(slot, shape, used, len(lengths))

    def _queue(self, slot: "_Slot", shape: Shape, used: int, count: int) -> None:
        """Each step on its stream, each behind the one before."""
        import torch  # noqa: PLC0415  loaded with the engine

        streams = self._streams
        with torch.cuda.stream(streams.copy_in):
            slot.integers[:used].copy_(slot.staging[:used], non_blocking=True)
            slot.copied.record()
        with torch.cuda.stream(streams.compute):
            slot.copied.wait()
            out = self._compute(slot.integers, shape)
            self._last.done.wait()  # its vectors left while this run computed
            self._vectors[:count].copy_(out[:count], non_blocking=True)
            slot.computed.record()
        with torch.cuda.stream(streams.copy_out):
            slot.computed.wait()
            slot.results[:count].copy_(self._vectors[:count], non_blocking=True)
            slot.done.record()
        self._last = slot

    def _choose_shape(self, lengths: Lengths) -> Shape:
        real = int(lengths.sum())
        tokens = min(round_tokens(real), self._encoder.max_tokens)
        least = self._encoder.long_length
        is_long = least is not None and int((lengths * lengths).sum()) >= least * real
        return make_shape(tokens, self._encoder.max_rows, is_long)

    def _compute(self, integers: "torch.Tensor", shape: Shape) -> "torch.Tensor":
        """Vectors [rows, H] of a packed batch on the device, on the current stream."""
        used = packed_size(shape.tokens, shape.rows)
        self._static[:used].copy_(integers[:used], non_blocking=True)
        graph, vectors = self._graphs[shape]
        graph.replay()
        return vectors

    def _capture(self) -> "dict[Shape, tuple[torch.cuda.CUDAGraph, torch.Tensor]]":
        """A graph for every shape, all in one pool, the largest first; kernels are compiled on the way."""
        import torch  # noqa: PLC0415  loaded with the engine

        from serving.engines.bert import Packed  # noqa: PLC0415  it needs torch

        graphs: dict[Shape, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        pool, stream = torch.cuda.graph_pool_handle(), self._streams.compute
        own, has_long = self._encoder, self._encoder.long_length is not None
        for shape in list_shapes(own.max_tokens, own.max_rows, has_long):
            batch = Packed.of(self._static, shape.tokens, shape.rows)
            self._fill_static(shape)
            with torch.cuda.stream(stream):
                self._encoder.run(batch, shape.long)
            graph = torch.cuda.CUDAGraph()
            mode = "thread_local"  # what another engine's thread asks of CUDA meanwhile must not break the capture
            # The outer stream brings this thread's own back, which a capture that ends in an error does not.
            with (
                CAPTURING,
                torch.cuda.stream(stream),
                torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode),
            ):
                graphs[shape] = graph, self._encoder.run(batch, shape.long)
        with CAPTURING:
            torch.cuda.synchronize(self._device)
        return graphs

    def _fill_static(self, shape: Shape) -> None:
        """Texts of one token each, so that the kernels read nothing wild while they warm up."""
        import torch  # noqa: PLC0415  loaded with the engine

        numbers = np.zeros(packed_size(shape.tokens, shape.rows), dtype=np.int32)
        lengths = np.ones(shape.rows, dtype=np.int64)
        pack(np.zeros((shape.rows, 1), dtype=np.int64), lengths, shape.tokens, shape.rows, numbers)
        self._static[: len(numbers)].copy_(torch.from_numpy(numbers))


@contextmanager
def _small_workspace() -> Iterator[None]:
    """For cuBLAS 4 MiB instead of Hopper's 32, on the streams that use it first here: it is as fast with them."""
    name = "CUBLAS_WORKSPACE_CONFIG"
    if name in os.environ:  # somebody chose
        yield
        return
    os.environ[name] = ":4096:1"
    try:
        yield
    finally:
        os.environ.pop(name, None)  # which another engine that opens may have done


@dataclass(frozen=True, slots=True)
class _Streams:
    copy_in: "torch.cuda.Stream"
    compute: "torch.cuda.Stream"
    copy_out: "torch.cuda.Stream"

    @classmethod
    def make(cls) -> "_Streams":
        import torch  # noqa: PLC0415  loaded with the engine

        return cls(torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.Stream())

    def synchronize(self) -> None:
        """Wait for all runs, also for one that was queued in part and has no event of its own yet."""
        for stream in (self.copy_in, self.compute, self.copy_out):
            stream.synchronize()


@dataclass(frozen=True, slots=True)
class _Slot:
    """Staging of one run: pinned memory, the twin of what goes in, and the events between the streams."""

    staging: "torch.Tensor"
    numbers: NDArray[np.int32]
    integers: "torch.Tensor"
    results: "torch.Tensor"
    copied: "torch.cuda.Event"
    computed: "torch.cuda.Event"
    done: "torch.cuda.Event"

    @classmethod
    def make(cls, encoder: "Encoder", device: "torch.device") -> "_Slot":
        import torch  # noqa: PLC0415  loaded with the engine

        size, shape = packed_size(encoder.max_tokens, encoder.max_rows), (encoder.max_rows, encoder.config.hidden)
        staging = torch.zeros(size, dtype=torch.int32, pin_memory=True)
        return cls(
            staging,
            staging.numpy(),
            torch.zeros(size, dtype=torch.int32, device=device),
            torch.zeros(shape, dtype=torch.float32, pin_memory=True),
            torch.cuda.Event(),
            torch.cuda.Event(),
            torch.cuda.Event(),
        )


class _Runs:
    """The runs of one batch: each has a slot from when it is packed until its vectors are here."""

    def __init__(self, free: "SimpleQueue[_Slot]", vectors: Embeddings) -> None:
        self._free, self._vectors = free, vectors
        self._running: deque[tuple[slice, _Slot]] = deque()

    def find_slot(self, rows: slice) -> _Slot:
        """One that is free, or that the first of these runs frees; with none of its own a batch waits for another's."""
        slot = self._take()
        self._running.append((rows, slot))
        return slot

    def collect_all(self) -> None:
        """Wait for every run, and take its vectors."""
        while self._running:
            self._collect()

    def give_up(self) -> None:
        """Free the slots of runs that nobody waits for."""
        for _, slot in self._running:
            self._free.put(slot)

    def _take(self) -> _Slot:
        while self._running:
            try:
                return self._free.get_nowait()
            except Empty:
                self._collect()
        return self._free.get()

    def _collect(self) -> None:
        rows, slot = self._running[0]
        slot.done.synchronize()
        self._vectors[rows] = slot.results.numpy()[: rows.stop - rows.start]
        self._running.popleft()
        self._free.put(slot)


def _require_gpu(compute: str) -> Any:
    """The torch module, once nothing keeps this machine from computing in `compute`. Raises EngineUnavailable."""
    problem = find_problem_here(compute)
    if problem is not None:
        raise EngineUnavailable(str(problem))
    import torch  # noqa: PLC0415  only this engine needs it

    return torch


def check_sizes(path: Path, config: "BertConfig") -> None:
    """Raises EngineUnavailable for a model, described by `path`, whose sizes the kernels do not know; asks no GPU."""
    problem = next(_list_misfits(config), None)
    if problem is not None:
        raise EngineUnavailable(f"{path}: {problem}: build it for onnxruntime, openvino or tensorrt")


def _list_misfits(config: "BertConfig") -> Iterator[str]:
    size = config.hidden // config.heads
    if size not in HEAD_SIZES:
        known = " and ".join(map(str, HEAD_SIZES))
        yield f"num_attention_heads {config.heads} makes heads of {size}, the kernels know {known}"
    for name, value in (("hidden_size", config.hidden), ("intermediate_size", config.intermediate)):
        if value % _WIDTH:
            yield f"{name} {value} is no multiple of {_WIDTH}"
    if config.positions < FILLER:
        yield f"max_position_embeddings {config.positions} is less than {FILLER}"


def _check_calibration(path: Path, weights: "Weights", compute: str) -> None:
    """Raise EngineUnavailable for E4M3 without calibration."""
    if compute == "f8" and any(layer.amax is None for layer in weights.layers):
        raise EngineUnavailable(f"{path} holds no activation_amax: f8 needs a calibrated model")


def _make_encoder(
    weights: "Weights", config: "BertConfig", device: "torch.device", compute: str, max_tokens: int
) -> "Encoder":
    from serving.engines.cuda_encoder import Encoder, Fp8Encoder  # noqa: PLC0415  they need triton

    kind = Fp8Encoder if compute == "f8" else Encoder
    return kind(weights, config, device, max_tokens, min(MAX_ROWS, -(-max_tokens // _LEAST_LENGTH)))
