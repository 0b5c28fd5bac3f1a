"""profile: run an engine under torch's profiler; a table of what its time goes into, and a timeline for Perfetto."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serving.engines.bert import BertConfig, Packed, encode, load_weights, read_config
from serving.engines.cuda_node import examine_node, find_problem
from serving.errors import EngineUnavailable
from tasks.profile import Ceilings, Profile, count_work, read_spans, summarise

_WARM_UP, _RUNS = 3, 5
_GPU_SIZE, _CPU_SIZE = 8192, 1024  # of the square matrices whose product is the ceiling


@dataclass(frozen=True, slots=True)
class Profiled:
    """The summary, where it was measured and the trace it was read from."""

    profile: Profile
    ceilings: Ceilings
    device: str
    trace: Path


def profile_engine(path: Path, batch_size: int, length: int, trace: Path, compute: str = "f16") -> Profiled:
    """Profile runs of `batch_size` texts of `length` tokens on the files of the cuda engine at `path`.

    Where there is no GPU for it, its plain-PyTorch twin runs on the CPU. Raises EngineUnavailable and ProfileInvalid.
    """
    config = read_config(path.with_name("config.json"))
    if not 1 <= length <= config.positions or batch_size < 1:
        raise EngineUnavailable(f"{batch_size} x {length}: 1 text at least, of 1 to {config.positions} tokens")
    on_gpu = find_problem(examine_node(), compute) is None
    rows = list(np.random.default_rng(0).integers(0, config.vocabulary, (batch_size, length)))
    run, device = _open_gpu(path, rows, compute) if on_gpu else _open_cpu(path, config, rows)
    ceilings = _measure_ceilings(on_gpu)
    _record(run, on_gpu, trace)
    work = count_work(config, [length] * batch_size, 1 if on_gpu and compute == "f8" else 2 if on_gpu else 4)
    return Profiled(summarise(read_spans(trace), _RUNS, work, ceilings), ceilings, device, trace)


def _open_gpu(path: Path, rows: list[Any], compute: str) -> tuple[Callable[[], object], str]:
    from serving.engines.cuda import CudaEngine  # noqa: PLC0415  needs triton

    engine = CudaEngine(path, compute, max(512, sum(map(len, rows))))
    ids = np.stack(rows).astype(np.int64)
    return lambda: engine.embed(ids, np.ones_like(ids)), engine.runtime


def _open_cpu(path: Path, config: BertConfig, rows: list[Any]) -> tuple[Callable[[], object], str]:
    weights, batch = load_weights(path, config), Packed.of_rows(rows)
    return lambda: encode(weights, config, batch), "plain PyTorch in float32 on the CPU"


def _record(run: Callable[[], object], on_gpu: bool, trace: Path) -> None:
    import torch  # noqa: PLC0415  seconds that no other command pays
    from torch.profiler import ProfilerActivity, profile  # noqa: PLC0415

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.inference_mode():
        for _ in range(_WARM_UP):
            run()
        with profile(activities=activities) as recorded:
            for _ in range(_RUNS):
                run()
    trace.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(trace))


def _measure_ceilings(on_gpu: bool) -> Ceilings:
    """A copy, counting what is read and written, and a product of random matrices; the best of several each."""
    import torch  # noqa: PLC0415  seconds that no other command pays

    size, dtype = (_GPU_SIZE, torch.float16) if on_gpu else (_CPU_SIZE, torch.float32)
    device = torch.device("cuda" if on_gpu else "cpu")
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    source = torch.empty(16 * size * size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_seconds = _best_seconds(lambda: target.copy_(source), on_gpu)
    product_seconds = _best_seconds(lambda: torch.mm(left, right, out=out), on_gpu)
    return Ceilings(2 * source.numel() / copy_seconds, 2 * size**3 / product_seconds)


def _best_seconds(run: Callable[[], object], on_gpu: bool) -> float:
    import torch  # noqa: PLC0415

    seconds = []
    for _ in range(_WARM_UP + _RUNS):
        started = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
