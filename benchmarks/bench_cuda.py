"""The cuda engine against plain torch float16 on one GPU, the systems taking turns; quality on real MiniLM weights.

`python -m benchmarks.bench_cuda [--cases NAME ...] [--minilm FOLDER] [--commit TEXT] [--out FILE] [--processes N]`.
A case's rows are written as soon as it is measured. Engine figures
start with packed ids on the GPU and end with vectors there, as the baseline's do; `host_tokens_per_s` starts and ends
in host memory. An engine is opened for its case's tokens and longest text, as the baseline has memory for its batch
alone. `--minilm` names a folder that `python -m benchmarks.cuda_files FOLDER` filled (the files of cuda-fp16, in `fp8/`
those of cuda-fp8, and `texts.npz`: ids, lengths, and the vectors of sentence-transformers in float32) and adds the
quality rows; where one is below its limit the exit status is 1, once everything is written. Weights are random
otherwise.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import triton
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from benchmarks.rows import append_rows, make_row, print_rows
from benchmarks.torch_baseline import TorchEncoder, compile_ahead, pad, pad_sorted, sort_and_cut
from serving.engines.bert import Packed, load_weights, read_config
from serving.engines.cuda import CudaEngine
from serving.engines.e4m3 import calibrate

_VOCABULARY = 30_522
_MODELS = {
    "minilm": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert-base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
_MIXED = "mixed"
_CASES: dict[str, list[int] | str] = {
    "minilm-1x32": [32],
    "minilm-1024x128": [128] * 1024,
    "minilm-mixed": _MIXED,
    "bert-base-512x50": [50] * 512,
    "bert-base-128x512": [512] * 128,
    "bert-base-mixed": _MIXED,
}
_ROUNDS, _RUNS = 5, 6
_LEAST_COSINE = {"minilm-quality": 0.9999, "minilm-quality-fp8": 0.997}  # on average
_WARM_SECONDS = 0.2  # under full load a card takes half of it to come down to the clocks that it keeps


@dataclass(frozen=True, slots=True)
class Measured:
    """Milliseconds (median of all runs) and megabytes at the peak."""

    milliseconds: float
    peak_mb: float = 0.0


def main() -> int:
    """Measure, print a table, append the rows. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=list(_CASES), choices=list(_CASES))
    parser.add_argument("--minilm", type=Path, help="folder of real MiniLM files: adds the quality rows")
    parser.add_argument("--commit", help="commit to write into the rows, where there is no checkout")
    parser.add_argument("--out", type=Path, help="rows go to this file instead of benchmarks/results/cuda.jsonl")
    parser.add_argument("--processes", type=int, default=1, help="that compile the baseline beside each other first")
    arguments = parser.parse_args()
    about = _describe(arguments.commit)
    if arguments.processes > 1:
        compile_ahead([job for case in arguments.cases for job in _list_jobs(case)], _VOCABULARY, arguments.processes)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        measurements = [partial(_run_case, case, Path(scratch), about) for case in arguments.cases]
        if arguments.minilm:
            measurements.insert(0, partial(_quality_rows, arguments.minilm, about))
        for measure in measurements:
            measured = measure()
            append_rows("cuda", measured, arguments.out)
            _print_table(measured)
            rows += measured
    print_rows(rows)
    failures = _list_failures(rows)
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def _list_failures(rows: list[dict[str, Any]]) -> list[str]:
    """What to say of each mean cosine that is not at least its limit: below it, or not a number."""
    return [
        f"{row['case']}: mean cosine {row['value']:.6f}, at least {least} is needed: run the kernels' tests on this GPU"
        for row in rows
        if row["metric"] == "cosine_mean" and not row["value"] >= (least := _LEAST_COSINE[row["case"]])
    ]


def _list_jobs(case: str) -> list[tuple[dict[str, int], list[int]]]:
    """What `compile_ahead` is to compile for a case."""
    sizes, lengths = _read_case(case)
    batches = [lengths, *sort_and_cut(lengths)] if case.endswith(_MIXED) else [lengths]
    return [(_MODELS[sizes], batch) for batch in batches]


def _read_case(case: str) -> tuple[str, list[int]]:
    """Model and lengths."""
    name = next(model for model in _MODELS if case.startswith(model))
    return name, _mixed_lengths() if _CASES[case] == _MIXED else list(_CASES[case])


def _run_case(case: str, scratch: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Baseline, fp16 and fp8 of one case."""
    name, lengths = _read_case(case)
    path = _write_model(name, scratch)
    baselines, peaks = _open_baselines(name, lengths, case)
    systems: dict[str, Callable[[], object]] = dict(baselines)
    engines: dict[str, CudaEngine] = {}
    ids, mask = _host_batch(lengths)
    for compute in ("f16", "f8"):
        before = _start_peak()
        engines[compute] = CudaEngine(path, compute, max_tokens=sum(lengths), max_length=max(lengths))
        systems[compute] = engines[compute].prepare(ids, mask)
        systems[compute]()
        peaks[compute] = _peak_mb(before)
    times = _take_turns(systems)
    host = {compute: _host_seconds(engine, ids, mask) for compute, engine in engines.items()}
    for engine in engines.values():
        engine.close()
    torch._dynamo.reset()
    return _case_rows(case, sum(lengths), times, host, peaks, about)


def _open_baselines(
    name: str, lengths: list[int], case: str
) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """Every form of the torch baseline, and the peak memory of one eager run (MB) by baseline."""
    before = _start_peak()
    model = TorchEncoder(_MODELS[name])
    layouts = {"padded": [pad(lengths, _VOCABULARY)]}
    if case.endswith(_MIXED):
        layouts["sorted-128"] = pad_sorted(lengths, _VOCABULARY)
    systems, peaks = {}, {}
    for layout, batches in layouts.items():
        torch.cuda.reset_peak_memory_stats()
        model._embed(*batches[0])
        peaks[layout] = _peak_mb(before)
        for mode, run in model.modes(batches).items():
            systems[f"torch-{layout}-{mode}"] = run
    return systems, peaks


def _take_turns(systems: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each system; they take turns so that they meet the same temperature."""
    times: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(_ROUNDS):
        for name, run in systems.items():
            times[name] += _time(run)
    return {name: median(values) for name, values in times.items()}


def _time(run: Callable[[], object]) -> list[float]:
    """Milliseconds of each run, back to back, at the clocks that the card keeps under this load."""
    warm_until = time.perf_counter() + _WARM_SECONDS
    while time.perf_counter() < warm_until:
        run()
        torch.cuda.synchronize()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(_RUNS)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _host_seconds(engine: CudaEngine, ids: Any, mask: Any) -> float:
    """Median seconds of `embed`, from arrays in host memory to vectors there."""
    seconds = []
    for _ in range(_ROUNDS * _RUNS):
        started = time.perf_counter()
        engine.embed(ids, mask)
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def _case_rows(
    case: str, tokens: int, times: dict[str, float], host: dict[str, float], peaks: dict[str, float], about: Any
) -> list[dict[str, Any]]:
    layouts = [layout for layout in peaks if layout not in host]
    rows = []
    for compute, suffix in (("f16", ""), ("f8", "-fp8")):
        own = times[compute]
        for layout in layouts:
            base = min((name for name in times if name.startswith(f"torch-{layout}-")), key=times.__getitem__)
            extra = {"baseline": base, **about}
            rows += [
                make_row("cuda", case + suffix, "latency_ms", "ms", own, baseline_value=times[base], **extra),
                make_row("cuda", case + suffix, "tokens_per_s", "tokens/s", tokens / own * 1e3,
                         baseline_value=tokens / times[base] * 1e3, **extra),
                make_row("cuda", case + suffix, "peak_memory_mb", "MB", peaks[compute],
                         baseline_value=peaks[layout], **(extra | {"baseline": f"torch-{layout}-eager"})),
            ]  # fmt: skip
        rows.append(make_row("cuda", case + suffix, "host_tokens_per_s", "tokens/s", tokens / host[compute], **about))
    rows.append(make_row("cuda", f"{case}-fp8", "tokens_per_s", "tokens/s", tokens / times["f8"] * 1e3,
                         baseline="thorforge fp16", baseline_value=tokens / times["f16"] * 1e3, **about))  # fmt: skip
    everything = {name: round(value, 4) for name, value in times.items()}
    return [row | {"config": {"tokens": tokens, "all_ms": everything}} for row in rows]


def _quality_rows(folder: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Cosine to sentence-transformers in float32 on real weights and text."""
    from serving.engines.cuda_encoder import Encoder, Fp8Encoder  # noqa: PLC0415  they need a GPU to be of use
    from serving.engines.cuda_folded import move  # noqa: PLC0415  likewise

    texts = np.load(folder / "texts.npz", allow_pickle=False)
    rows, device = np.split(texts["ids"].astype(np.int64), texts["lengths"].cumsum()[:-1]), torch.device("cuda")
    batch: Packed = move(Packed.of_rows(rows), device)
    tokens, count = len(batch.ids), len(rows)
    found = []
    for case, kind, own in (("minilm-quality", Encoder, folder), ("minilm-quality-fp8", Fp8Encoder, folder / "fp8")):
        config = read_config(own / "config.json")
        encoder = kind(load_weights(own / "model.safetensors", config), config, device, tokens, count)
        cosines = (encoder.run(batch, is_long=True).cpu().numpy() * texts["vectors"]).sum(axis=1)
        for metric, value in (("cosine_mean", cosines.mean()), ("cosine_min", cosines.min())):
            found.append(make_row("cuda", case, metric, "share", float(value), config={"texts": count}, **about))
    return found


def _write_model(name: str, scratch: Path) -> Path:
    """The engine's files of a random model, calibrated on random ids."""
    folder = scratch / name
    path = folder / "model.safetensors"
    if path.exists():
        return path
    folder.mkdir()
    sizes = BertConfig(**_MODELS[name])
    fields = sizes.to_dict() | {"pooling": "mean", "normalize": True}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    torch.manual_seed(0)
    tensors = {key: value.half() for key, value in BertModel(sizes, add_pooling_layer=False).state_dict().items()}
    save_file(tensors, path)
    config = read_config(folder / "config.json")
    batch = Packed.of_rows(list(np.random.default_rng(0).integers(0, _VOCABULARY, (2, 64))))
    save_file(tensors | calibrate(load_weights(path, config), config, [batch]), path)
    return path


def _host_batch(lengths: Sequence[int]) -> tuple[Any, Any]:
    """A padded batch of random ids in host memory."""
    sizes = np.array(lengths)
    mask = (np.arange(sizes.max()) < sizes[:, None]).astype(np.int64)
    return np.random.default_rng(1).integers(0, _VOCABULARY, mask.shape) * mask, mask


def _mixed_lengths() -> list[int]:
    """Token lengths of 1,024 texts drawn from natural questions and SciFact abstracts, cut at 512."""
    return list(json.loads((Path(__file__).parent / "mixed_lengths.json").read_text(encoding="utf-8")))


@cache
def _open_blas() -> None:
    """The first product of a process makes cuBLAS take a workspace, which is no system's own."""
    ones = torch.ones(16, 16, dtype=torch.float16, device="cuda")
    torch.mm(ones, ones)


def _start_peak() -> int:
    _open_blas()
    gc.collect()  # torch.compile leaves cycles that hold memory, whose end would count against whoever comes next
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # blocks that are left count whole for whoever takes most of one: by up to a megabyte
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak_mb(before: int) -> float:
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def _describe(commit: str | None) -> dict[str, Any]:
    """Hardware and versions of the rows: the GPU's, not the processor's."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    major, minor = torch.cuda.get_device_capability()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    return {
        "hardware": f"{gpu}, compute capability {major}.{minor}",
        "versions": versions,
        **({"commit": commit} if commit else {}),
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        against = f"{row['ratio']:8.3f} x {row['baseline']} ({row['baseline_value']:,.3f})" if "ratio" in row else ""
        line = f"{row['case']:26} {row['metric']:18} {row['value']:18,.4f} {row['unit']:9} {against}"
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
