"""The cuda engine: what it says where it cannot run, and on a GPU that it is the oracle, copies and graphs included."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from serving.engines import has_nvidia_driver, open_engine
from serving.engines.bert import list_linears
from serving.engines.cuda import CudaEngine, _Streams
from serving.engines.packing import Limits, packed_size
from serving.errors import EngineUnavailable
from serving.tokenizer import pad_batch

if TYPE_CHECKING:
    from registry.manifest import EngineEntry

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
EVERYTHING = list_linears(2)


def entry(compute: str = "f16") -> "EngineEntry":
    from registry.manifest import EngineEntry  # pydantic, which a machine that only measures need not have

    return EngineEntry.model_validate(
        {"runtime": "cuda", "file": "model.safetensors", "sha256": "0" * 64, "size": 1, "compute": compute}
    )


@WITHOUT_GPU
def test_open_engine_says_what_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("pydantic")
    with pytest.raises(EngineUnavailable, match=r"triton is not installed|built without CUDA|no NVIDIA GPU"):
        open_engine(tmp_path, entry())


@pytest.mark.skipif(has_nvidia_driver(), reason="about machines without a driver")
def test_torch_is_not_loaded_to_find_that_there_is_no_gpu() -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom serving.engines.cuda import CudaEngine\n"
        "try:\n    CudaEngine(Path('model.safetensors'))\nexcept Exception as error:\n    print(error)\n"
        "print('torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    message, is_loaded = ended.stdout.splitlines()
    assert message.startswith("no NVIDIA GPU")
    assert is_loaded == "False"


def test_cuda_engine_refuses_an_arithmetic_it_does_not_have(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    with pytest.raises(EngineUnavailable, match="has no f32: it computes in f16 or f8"):
        CudaEngine(tmp_path / "model.safetensors", "f32")


def test_opening_another_engine_imports_neither_torch_nor_triton() -> None:
    pytest.importorskip("pydantic")
    code = (
        "import sys, serving.engines, serving.worker, serving.engines.onnxruntime\n"
        "sys.exit(len({'torch', 'triton', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@dataclass
class Recorded:
    """A buffer or an event of that name: what is done to it, behind the stream that is to do it."""

    name: str
    log: list[str]

    def __getitem__(self, rows: slice) -> "Recorded":
        return self

    def copy_(self, source: "Recorded", non_blocking: bool) -> None:
        assert non_blocking
        self.log[-1] += f", {source.name} to {self.name}"

    def record(self) -> None:
        self.log[-1] += f", record {self.name}"

    def wait(self) -> None:
        self.log[-1] += f", wait {self.name}"

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.name}")


def make_recorded_engine(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> CudaEngine:
    """An engine of 16 tokens on stand-ins, each line of whose log is what one stream gets."""

    @contextmanager
    def enter(stream: Recorded) -> Iterator[None]:
        log.append(stream.name)
        yield

    def compute(integers: Recorded, shape: Any) -> Recorded:
        log[-1] += f", compute {integers.name}"
        return Recorded("out", log)

    def make_slot(number: int) -> SimpleNamespace:
        names = "staging", "integers", "results", "copied", "computed", "done"
        fields = {name: Recorded(f"{name} {number}", log) for name in names}
        return SimpleNamespace(numbers=np.zeros(packed_size(16, 16), dtype=np.int32), **fields)

    monkeypatch.setattr(torch.cuda, "stream", enter)
    engine = CudaEngine.__new__(CudaEngine)
    parts: dict[str, Any] = {
        "_encoder": SimpleNamespace(max_tokens=16, max_rows=16, long_length=32),
        "_streams": _Streams(*(Recorded(name, log) for name in ("in", "compute", "out"))),
        "_submitting": threading.Lock(),
        "_vectors": Recorded("vectors", log),
        "_compute": compute,
    }
    for name, part in parts.items():
        setattr(engine, name, part)
    fill_slots(engine, make_slot)
    return engine


def fill_slots(engine: CudaEngine, make_slot: Callable[[int], Any]) -> None:
    """Give it two that no run uses."""
    engine._slots = SimpleQueue()
    for number in (0, 1):
        engine._last = make_slot(number)
        engine._slots.put(engine._last)


def test_vectors_wait_on_the_device_until_those_before_them_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """They share a buffer there: the computing stream writes it behind the copy out of the run before, but computes
    before it waits."""
    log: list[str] = []
    engine = make_recorded_engine(monkeypatch, log)
    slots = engine._slots.get(), engine._slots.get()
    for slot in (0, 1, 0):
        engine._submit(slots[slot], np.zeros((2, 3), dtype=np.int64), np.array([3, 2]))
    expected = []
    for own, last in ((0, 1), (1, 0), (0, 1)):
        work = f"wait copied {own}, compute integers {own}, wait done {last}, out to vectors, record computed {own}"
        expected += [
            f"in, staging {own} to integers {own}, record copied {own}",
            f"compute, {work}",
            f"out, wait computed {own}, vectors to results {own}, record done {own}",
        ]
    assert log == expected


def test_cuda_engine_refuses_a_text_longer_than_it_was_opened_for() -> None:
    engine: Any = CudaEngine.__new__(CudaEngine)
    engine._config, engine._max_length = SimpleNamespace(limits=Limits(vocabulary=10, positions=128)), 32
    assert engine._check(*pad_batch([np.zeros(32, dtype=np.int64)])).tolist() == [32]
    with pytest.raises(ValueError, match="a text of 33 tokens, the engine was opened for texts of up to 32"):
        engine.embed(*pad_batch([np.zeros(1, dtype=np.int64), np.zeros(33, dtype=np.int64)]))


@pytest.mark.gpu
@NEEDS_GPU
def test_cuda_engine_for_short_texts_equals_the_oracle(tmp_path: Path) -> None:
    """Its runs have fewer tokens than the model has positions."""
    from serving.engines.bert import Packed, encode
    from tests.serving.kernels.models import make_encoder, read_model
    from tests.serving.kernels.packs import TOKENS

    path = make_encoder(tmp_path)
    engine = CudaEngine(path, max_tokens=20, max_length=20)
    rows = [np.random.default_rng(0).integers(0, TOKENS, length) for length in (1, 20, 7, 2, 19, 12)]
    config, weights = read_model(path)
    oracle = encode(weights, config, Packed.of_rows(rows)).numpy()
    assert (engine.embed(*pad_batch(rows)) * oracle).sum(axis=1).min() > 0.9999
    engine.close()


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize(
    ("compute", "float16"),
    [("f16", []), ("f8", []), ("f8", EVERYTHING[::3]), ("f8", EVERYTHING[1::2]), ("f8", EVERYTHING)],
    ids=["f16", "f8", "every third in f16", "every second in f16", "all in f16"],
)
def test_cuda_engine_equals_the_oracle_in_runs_of_any_size(compute: str, float16: list[str], tmp_path: Path) -> None:
    from serving.engines.bert import Packed, encode
    from tests.serving.kernels.models import make_encoder, read_model
    from tests.serving.kernels.packs import TOKENS

    path = make_encoder(tmp_path, float16=float16)
    engine = CudaEngine(path, compute, max_tokens=512)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, TOKENS, length) for length in (1, 128, 7, 100, 90, 128, 128, 60, 33, 2)]
    vectors = engine.embed(*pad_batch(rows))
    config, weights = read_model(path)
    oracle = encode(weights, config, Packed.of_rows(rows)).numpy()
    is_rounded = compute == "f8" and float16 != EVERYTHING
    assert (vectors * oracle).sum(axis=1).min() > (0.97 if is_rounded else 0.9999)
    before = torch.cuda.memory_reserved()
    # E4M3 magnifies the last bit, and other GPUs than Hopper may compute it otherwise in another batch.
    limit = 1e-3 if compute == "f16" else 0.05
    for count in range(1, len(rows)):
        np.testing.assert_allclose(engine.embed(*pad_batch(rows[:count])), vectors[:count], atol=limit)
    assert torch.cuda.memory_reserved() == before
    with pytest.raises(ValueError, match="positions"):
        engine.embed(*pad_batch([np.zeros(129, dtype=np.int64)]))
    engine.close()


@pytest.mark.gpu
@NEEDS_GPU
def test_an_engine_serves_on_while_others_open_and_close_on_its_gpu(tmp_path: Path) -> None:
    """As a worker swaps versions: graphs are captured in one thread, batches are answered in another."""
    from tests.serving.kernels.models import make_encoder
    from tests.serving.kernels.packs import TOKENS

    path = make_encoder(tmp_path)
    engine = CudaEngine(path, max_tokens=512)
    batch = pad_batch([np.random.default_rng(0).integers(0, TOKENS, length) for length in (1, 128, 7, 100, 90)])
    expected = engine.embed(*batch)
    opened = threading.Event()
    with ThreadPoolExecutor() as pool:

        def swap() -> None:
            for _ in range(3):
                CudaEngine(path, max_tokens=2048).close()

        def serve() -> int:
            answered = 0
            while not opened.is_set():
                np.testing.assert_array_equal(engine.embed(*batch), expected)
                answered += 1
            return answered

        serving, swaps = pool.submit(serve), [pool.submit(swap) for _ in range(2)]
        try:
            for swapped in swaps:
                swapped.result()
        finally:
            opened.set()
        assert serving.result() > 0
    engine.close()
