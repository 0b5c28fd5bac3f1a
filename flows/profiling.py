"""profile: run an engine under torch's profiler; a table of what its time goes into, and a timeline for Perfetto."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
from rich.table import Table

from flows.profile_table import fill_table
from serving.engines.bert import CONFIG_NAME, BertConfig, Packed, encode, load_weights, read_config
from serving.engines.cuda_node import LEAST_CAPABILITY, examine_node, find_problem
from tasks.encoder import ENCODER_NAME, write_encoder
from tasks.errors import ProfileInvalid
from tasks.measurement.ceilings import Ceilings, measure_ceilings
from tasks.measurement.profile import Profile, summarise
from tasks.measurement.trace import read_spans
from tasks.measurement.work import Compute, count_work
from tasks.models.teacher import load_teacher

_WARM_UP, _RUNS = 3, 5


@dataclass(frozen=True, slots=True)
class Profiled:
    """The summary, where and in what it was measured, and the trace it was read from.

    `problem`: why it was not the cuda engine that ran, None where it was.
    """

    profile: Profile
    ceilings: Ceilings
    device: str
    compute: Compute
    problem: str | None
    trace: Path


def profile_source(source: str, batch: str, trace: Path, compute: str = "f16") -> Profiled:
    """Profile a folder of the cuda engine's files, or a model (folder, package:, hf:), on a batch such as `32x64`.

    Raises ProfileInvalid, EngineUnavailable and what loading a model raises.
    """
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", batch)
    if match is None:
        raise ProfileInvalid(f"batch {batch!r} is not texts x tokens, such as 32x64")
    _check_compute(compute)
    path = Path(source) / ENCODER_NAME
    with TemporaryDirectory() as scratch:
        if not _is_engine(path):
            path = write_encoder(load_teacher.fn(source), Path(scratch))
        return profile_engine(path, int(match[1]), int(match[2]), trace, compute)


def _check_compute(compute: str) -> Compute:
    """What the cuda engine computes in. Raises ProfileInvalid."""
    for known in get_args(Compute):
        if compute == known and known in LEAST_CAPABILITY:
            return known
    raise ProfileInvalid(f"compute {compute!r} is unknown: give {' or '.join(LEAST_CAPABILITY)}")


def _is_engine(path: Path) -> bool:
    """Whether these are an engine's files: a model's configuration knows nothing of pooling. Raises ProfileInvalid."""
    config = path.with_name(CONFIG_NAME)
    if not path.exists() or not config.exists():
        return False
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ProfileInvalid(f"{config} is not JSON: {error}; fetch or export the files again") from None
    if not isinstance(fields, dict):
        raise ProfileInvalid(f"{config} is not a JSON object but {type(fields).__name__}; fetch or export it again")
    return "pooling" in fields


def profile_engine(path: Path, batch_size: int, length: int, trace: Path, compute: str = "f16") -> Profiled:
    """Profile runs of `batch_size` texts of `length` tokens on the files of the cuda engine at `path`.

    Where there is no GPU for it, its plain-PyTorch twin runs on the CPU. Raises EngineUnavailable and ProfileInvalid.
    """
    asked = _check_compute(compute)
    config = read_config(path.with_name(CONFIG_NAME))
    if length > config.positions:
        raise ProfileInvalid(f"{length} tokens, the model has {config.positions} positions")
    problem = find_problem(examine_node(), asked)
    on_gpu = problem is None
    rows = list(np.random.default_rng(0).integers(0, config.vocabulary, (batch_size, length)))
    run, device = _open_gpu(path, rows, asked) if on_gpu else _open_cpu(path, config, rows)
    ran: Compute = asked if on_gpu else "f32"
    ceilings = measure_ceilings(ran)
    _record(run, on_gpu, trace)
    profile = summarise(read_spans(trace), _RUNS, count_work(config, [length] * batch_size, ran), ceilings)
    return Profiled(profile, ceilings, device, ran, None if problem is None else problem.reason, trace)


def _open_gpu(path: Path, rows: list[Any], compute: Compute) -> tuple[Callable[[], object], str]:
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
        # There is one cycle: with `acc_events` torch does not warn that it would forget the one before.
        with profile(activities=activities, acc_events=True) as recorded:
            for _ in range(_RUNS):
                run()
    trace.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(trace))


def as_table(profiled: Profiled) -> Table:
    """A line for each linear layer, kind and kernel, rates beside the share of the ceiling they reach."""
    title = f"{profiled.device}: {profiled.profile.milliseconds:.3f} ms a run"
    if profiled.problem is not None:
        title += f"\nnot the cuda engine: {profiled.problem}"
    end = f"timeline: {profiled.trace}, for https://ui.perfetto.dev"
    return fill_table(profiled.profile, profiled.ceilings, profiled.compute, title, end)
