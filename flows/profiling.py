"""profile: run an engine under torch's profiler; a table of what its time goes into, and a timeline for Perfetto."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.table import Table

from serving.engines.bert import CONFIG_NAME, BertConfig, Packed, encode, load_weights, read_config
from serving.engines.cuda_node import examine_node, find_problem
from tasks.encoder import ENCODER_NAME, write_encoder
from tasks.errors import ProfileInvalid
from tasks.measurement.profile import Ceilings, Profile, count_work, read_spans, summarise
from tasks.models.teacher import load_teacher

_WARM_UP, _RUNS = 3, 5
_GPU_SIZE, _CPU_SIZE = 8192, 1024  # of the square matrices whose product is the ceiling


@dataclass(frozen=True, slots=True)
class Profiled:
    """The summary, where it was measured and the trace it was read from."""

    profile: Profile
    ceilings: Ceilings
    device: str
    trace: Path


def profile_source(source: str, batch: str, trace: Path, compute: str = "f16") -> Profiled:
    """Profile a folder of the cuda engine's files, or a model (folder, package:, hf:), on a batch such as `32x64`.

    Raises ProfileInvalid, EngineUnavailable and what loading a model raises.
    """
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", batch)
    if match is None:
        raise ProfileInvalid(f"batch {batch!r} is not texts x tokens, such as 32x64")
    path = Path(source) / ENCODER_NAME
    with TemporaryDirectory() as scratch:
        if not _is_engine(path):
            path = write_encoder(load_teacher.fn(source), Path(scratch))
        return profile_engine(path, int(match[1]), int(match[2]), trace, compute)


def _is_engine(path: Path) -> bool:
    """Whether these are an engine's files: a model's configuration knows nothing of pooling."""
    config = path.with_name(CONFIG_NAME)
    return path.exists() and config.exists() and "pooling" in json.loads(config.read_text(encoding="utf-8"))


def profile_engine(path: Path, batch_size: int, length: int, trace: Path, compute: str = "f16") -> Profiled:
    """Profile runs of `batch_size` texts of `length` tokens on the files of the cuda engine at `path`.

    Where there is no GPU for it, its plain-PyTorch twin runs on the CPU. Raises EngineUnavailable and ProfileInvalid.
    """
    config = read_config(path.with_name(CONFIG_NAME))
    if length > config.positions:
        raise ProfileInvalid(f"{length} tokens, the model has {config.positions} positions")
    on_gpu = find_problem(examine_node(), compute) is None
    rows = list(np.random.default_rng(0).integers(0, config.vocabulary, (batch_size, length)))
    run, device = _open_gpu(path, rows, compute) if on_gpu else _open_cpu(path, config, rows)
    ceilings = _measure_ceilings(on_gpu)
    _record(run, on_gpu, trace)
    work = count_work(config, [length] * batch_size, 1 if on_gpu and compute == "f8" else 2 if on_gpu else 4)
    return Profiled(summarise(read_spans(trace), _RUNS, work, ceilings), ceilings, device, trace)


def _open_gpu(path: Path, rows: list[Any], compute: str) -> tuple[Callable[[], object], str]:
    from serving.engines.cuda import CudaEngine  # noqa: PLC0415  needs triton

    engine = CudaEngine(path, compute, max(512, sum(map(len, rows))), max_length=len(rows[0]))
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


def as_table(profiled: Profiled) -> Table:
    """A line for each kind, rates beside the share of the ceiling they reach."""
    profile, ceilings = profiled.profile, profiled.ceilings
    title = f"{profiled.device}: {profile.milliseconds:.3f} ms a run"
    table = Table(title=title, caption=_describe_rest(profiled), caption_justify="left")
    rates = ("GB", "GB/s", "of the copy", "GFLOP", "GFLOP/s", "of the product")
    for column in ("what", "calls", "ms", "of the time", *rates):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in profile.rows:
        reached = (
            f"{row.work.num_bytes / 1e9:.4f}",
            f"{row.bandwidth_share * ceilings.bytes_per_second / 1e9:.0f}",
            f"{row.bandwidth_share:.0%}",
            f"{row.work.flops / 1e9:.2f}",
            f"{row.compute_share * ceilings.flops_per_second / 1e9:.0f}",
            f"{row.compute_share:.0%}",
        )
        is_counted = row.work.flops > 0
        time_spent = (f"{row.calls:.0f}", f"{row.milliseconds:.4f}", f"{row.share:.1%}")
        table.add_row(row.kind, *time_spent, *(reached if is_counted else ("",) * len(rates)))
    return table


def _describe_rest(profiled: Profiled) -> str:
    profile, ceilings = profiled.profile, profiled.ceilings
    copy, product = ceilings.bytes_per_second / 1e9, ceilings.flops_per_second / 1e9
    return (
        f"copies {profile.copy_share:.1%} of the time, idle {profile.idle_share:.1%}, longest gap "
        f"{profile.longest_gap_ms:.3f} ms\nceilings, measured: copy {copy:.0f} GB/s, product {product:.0f} GFLOP/s\n"
        f"timeline: {profiled.trace}, for https://ui.perfetto.dev"
    )
