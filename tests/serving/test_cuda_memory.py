"""The cuda engine where memory runs out: at its start and in a batch. The GPU is a stand-in, also for its sizes."""

import logging
import sys
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from serving.engines import cuda
from serving.engines.bert import Packed
from serving.engines.cuda import CudaEngine
from serving.engines.cuda_memory import is_out_of_memory
from serving.engines.packing import Limits, packed_size
from serving.errors import EngineUnavailable
from serving.tokenizer import Ids, pad_batch
from tests.serving.test_cuda import Recorded, fill_slots, make_recorded_engine

WEIGHTS = 1000  # bytes
OF_A_TOKEN = {"encoder": 10, "slot": 3, "buffer": 1, "graphs": 5}  # bytes
OF_ALL = 10 + 2 * 3 + 2 * 1 + 5
LONGEST = 48  # tokens


class Piece(SimpleNamespace):
    """Something that takes memory for as long as it lives."""


class Gpu:
    """Memory of `size` bytes, `used` of them by others."""

    def __init__(self, size: int, used: int = 0) -> None:
        self.size, self.used, self.refused = size, used, list[tuple[str, int]]()

    def take(self, name: str, tokens: int) -> Piece:
        size = OF_A_TOKEN[name] * tokens + (WEIGHTS if name == "encoder" else 0)
        if self.used + size > self.size:
            self.refused.append((name, tokens))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        like = SimpleNamespace(max_tokens=tokens)
        piece = Piece(max_tokens=tokens, max_rows=16, results=like, integers=like)
        self.used += size
        weakref.finalize(piece, self._give_back, size)
        return piece

    def _give_back(self, size: int) -> None:
        self.used -= size


Open = Callable[[Gpu, int], CudaEngine]


@pytest.fixture
def open_on(monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens an engine for runs of so many tokens, all of whose parts are pieces of a `Gpu`."""

    def open_engine(gpu: Gpu, max_tokens: int) -> CudaEngine:
        def make_encoder(weights: Any, config: Any, device: Any, max_tokens: int, max_rows: int) -> Piece:
            return gpu.take("encoder", max_tokens)

        for name, value in {
            "_require_gpu": lambda _: torch,
            "check_sizes": lambda *_: None,
            "_check_calibration": lambda *_: None,
            "_Streams": SimpleNamespace(make=lambda: None),
            "_Slot": SimpleNamespace(make=lambda encoder, _: gpu.take("slot", encoder.max_tokens)),
        }.items():
            monkeypatch.setattr(cuda, name, value)
        for name, value in {
            "empty_cache": lambda: None,
            "synchronize": lambda _: None,
            "current_device": lambda: 0,
            "get_device_name": lambda _: "stand-in",
            "memory_reserved": lambda _: gpu.used,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "zeros_like", lambda like, device=None: gpu.take("buffer", like.max_tokens))
        monkeypatch.setattr(CudaEngine, "_capture", lambda engine: gpu.take("graphs", engine.max_tokens))
        monkeypatch.setattr("serving.engines.bert.read_config", lambda _: SimpleNamespace(positions=LONGEST))
        monkeypatch.setattr("serving.engines.bert.load_weights", lambda *_: None)
        encoders = SimpleNamespace(Encoder=make_encoder, Fp8Encoder=make_encoder)
        monkeypatch.setitem(sys.modules, "serving.engines.cuda_encoder", encoders)
        return CudaEngine(Path("model.safetensors"), max_tokens=max_tokens)

    return open_engine


@pytest.mark.parametrize(
    ("size", "refused"),
    [
        (256 * OF_ALL, []),
        (256 * OF_ALL - 1, [("graphs", 256)]),
        (256 * 17, [("buffer", 256)]),
        (256 * 15, [("slot", 256)]),
        (129 * OF_ALL, [("slot", 256)]),
        (127 * OF_ALL, [("slot", 256), ("graphs", 128)]),
        (128 * 17, [("encoder", 256), ("buffer", 128)]),
        (LONGEST * OF_ALL, [("encoder", 256), ("encoder", 128), ("buffer", 64)]),
    ],
)
def test_runs_are_halved_until_all_that_they_need_fits(
    size: int, refused: list[tuple[str, int]], open_on: Open, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = Gpu(WEIGHTS + size)
    engine = open_on(gpu, 256)
    assert gpu.refused == refused
    expected = (256, 128, 64, LONGEST)[len(refused)]
    assert engine.max_tokens == expected
    assert gpu.used == engine.memory_bytes == WEIGHTS + expected * OF_ALL, "what failed tries took is given back"
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    line = f"engine out of memory: runs are smaller than asked max_tokens={expected} asked=256"
    assert said == ([line] if refused else [])
    engine.close()
    assert gpu.used == 0


def test_start_fails_where_one_text_does_not_fit(open_on: Open) -> None:
    gpu = Gpu(WEIGHTS + LONGEST * OF_ALL - 1)
    with pytest.raises(EngineUnavailable, match="no memory for the weights and 48 tokens"):
        open_on(gpu, 100)
    assert gpu.refused[-1] == ("graphs", LONGEST)
    assert gpu.used == 0


def test_a_run_that_does_not_hold_the_longest_text_is_refused(open_on: Open) -> None:
    gpu = Gpu(10**6)
    with pytest.raises(EngineUnavailable, match=r"runs of 47 tokens do not hold a text of 48: set .* to 48"):
        open_on(gpu, LONGEST - 1)
    assert gpu.refused == []


def test_start_fails_at_once_for_another_reason(open_on: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def lose(*_: object) -> None:
        tries.append(1)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(CudaEngine, "_allocate", lose)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        open_on(Gpu(10**6), 256)
    assert len(tries) == 1


class LateGpu(Gpu):
    """Memory that runs out while a graph is captured, upon which ending the capture raises, too."""

    def take(self, name: str, tokens: int) -> Piece:
        try:
            return super().take(name, tokens)
        finally:
            if self.refused[-1:] == [("graphs", tokens)]:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def test_memory_that_runs_out_in_a_capture_is_seen_behind_the_error_of_its_end(open_on: Open) -> None:
    gpu = LateGpu(WEIGHTS + 128 * OF_ALL - 1)
    assert open_on(gpu, 128).max_tokens == 64
    assert gpu.refused == [("graphs", 128)]


def test_memory_of_an_engine_is_its_own(open_on: Open) -> None:
    """That of the engines before it is theirs."""
    gpu = Gpu(10**6, used=4321)
    first, second = open_on(gpu, 256), open_on(gpu, 64)
    assert (first.memory_bytes, second.memory_bytes) == (WEIGHTS + 256 * OF_ALL, WEIGHTS + 64 * OF_ALL)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("Allocation on device"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("out of resource: shared memory"), False),
    ],
)
def test_memory_that_is_missing_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def make_computing_engine(monkeypatch: pytest.MonkeyPatch, log: list[str], most_tokens: int) -> CudaEngine:
    """An engine of 16 tokens a run that runs out of memory in one of more than `most_tokens`; it computes on the CPU.

    A text's vector is the sum of its ids, and its number of tokens.
    """
    engine = make_recorded_engine(monkeypatch, log)

    def compute(integers: torch.Tensor, shape: Any) -> torch.Tensor:
        batch = Packed.of(integers, shape.tokens, shape.rows)
        bounds = batch.offsets.tolist()
        if bounds[-1] > most_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        sums = [batch.ids[first:end].sum() for first, end in pairwise(bounds)]
        return torch.stack([torch.stack(sums), batch.offsets.diff()], dim=1).float()

    def make_slot(number: int) -> SimpleNamespace:
        staging = torch.zeros(packed_size(16, 16), dtype=torch.int32)
        tensors = {"integers": torch.zeros_like(staging), "results": torch.zeros(16, 2)}
        events = {name: Recorded(f"{name} {number}", log) for name in ("copied", "computed", "done")}
        return SimpleNamespace(staging=staging, numbers=staging.numpy(), **tensors, **events)

    parts: dict[str, Any] = {
        "_vectors": torch.zeros(16, 2),
        "_compute": compute,
        "_config": SimpleNamespace(limits=Limits(vocabulary=1000, positions=16), hidden=2),
        "_max_length": 16,
        "memory_limit_tokens": None,
    }
    for name, part in parts.items():
        setattr(engine, name, part)
    fill_slots(engine, make_slot)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: log.append("cache emptied"))
    return engine


def make_batch(lengths: list[int]) -> tuple[Ids, Ids, list[list[int]]]:
    """Ids, mask and the vectors that `make_computing_engine` gives them."""
    rows = [np.arange(length) + 10 * number for number, length in enumerate(lengths)]
    return *pad_batch(rows), [[int(row.sum()), len(row)] for row in rows]


@pytest.mark.parametrize(("most_tokens", "limit"), [(16, None), (15, 12), (8, 6), (7, 5)])
def test_batch_that_does_not_fit_is_split_and_the_limit_learned(
    most_tokens: int, limit: int | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_computing_engine(monkeypatch, [], most_tokens)
    input_ids, mask, expected = make_batch([3, 5, 1, 7, 4, 4, 6, 2, 5, 7])
    assert engine.embed(input_ids, mask).tolist() == expected
    assert engine.memory_limit_tokens == limit
    said = [record.getMessage() for record in caplog.records]
    assert (said[-1:] == [f"engine out of memory: batches are limited tokens={limit}"]) == (limit is not None)
    assert engine.embed(input_ids, mask).tolist() == expected
    assert engine.memory_limit_tokens == limit
    assert len(caplog.records) == len(said), "the same limit is not said again"


def test_lone_text_that_does_not_fit_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_computing_engine(monkeypatch, [], most_tokens=6)
    input_ids, mask, expected = make_batch([3, 7, 6])
    with pytest.raises(torch.OutOfMemoryError):
        engine.embed(input_ids, mask)
    with pytest.raises(torch.OutOfMemoryError):
        engine.embed(input_ids[1:2], mask[1:2])
    assert engine.memory_limit_tokens is None
    assert engine.embed(input_ids[::2], mask[::2]).tolist() == expected[::2]


def test_another_error_splits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, tries = make_computing_engine(monkeypatch, [], most_tokens=16), []

    def lose(*_: object) -> None:
        tries.append(1)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    engine._compute = lose  # type: ignore[assignment, method-assign]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine.embed(*make_batch([3, 5])[:2])
    assert len(tries) == 1


@pytest.mark.parametrize("error", [RuntimeError("launch failed"), KeyboardInterrupt()], ids=repr)
def test_runs_in_flight_are_waited_for_before_an_error_is_raised(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run fails while the first is in flight, and the second's copy in is, too."""
    log: list[str] = []
    engine = make_computing_engine(monkeypatch, log, most_tokens=16)
    whole, runs = engine._compute, []

    def fail_second(integers: Any, shape: Any) -> torch.Tensor:
        runs.append(1)
        if len(runs) == 2:
            raise error
        return whole(integers, shape)

    engine._compute = fail_second  # type: ignore[method-assign]
    input_ids, mask, expected = make_batch([10, 12, 14])
    with pytest.raises(type(error)):
        engine.embed(input_ids, mask)
    streams = [f"host waits for {name}" for name in ("in", "compute", "out")]
    assert log[-5:] == ["in, record copied 1", "compute, wait copied 1", *streams]
    assert not any("host" in line for line in log[:-3])
    assert engine.embed(input_ids, mask).tolist() == expected


def test_runs_in_flight_are_waited_for_before_halves_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    engine = make_computing_engine(monkeypatch, log, most_tokens=12)
    input_ids, mask, expected = make_batch([10, 12, 7, 7])
    assert engine.embed(input_ids, mask).tolist() == expected
    failed = log.index("cache emptied")
    assert log[failed - 3 : failed] == [f"host waits for {name}" for name in ("in", "compute", "out")]
    assert log[failed + 1].startswith("in, ")
