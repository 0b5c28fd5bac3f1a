"""What an engine run's time goes into: kernels by kind against measured ceilings, copies and gaps, from a trace.

A trace is Chrome's format, as torch.profiler writes it and Perfetto opens it. Time is told apart by the names of what
ran: the engine's own kernels, the library's matrix products and torch's operations on the CPU.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from serving.engines.bert import BertConfig
from tasks.errors import ProfileInvalid

Kind = Literal["embedding", "products", "attention", "norms", "pooling", "whole encoder", "copies", "other"]
# The first name found in an event's decides. Library products have many names: they are what has `gemm` or `nvjet`.
_KINDS: tuple[tuple[str, Kind], ...] = (
    ("memcpy", "copies"), ("memset", "copies"), ("aten::copy_", "copies"), ("aten::to", "copies"),
    ("_encode_kernel", "whole encoder"), ("few_tokens", "whole encoder"),
    ("_embed_norm", "embedding"), ("aten::index", "embedding"),
    ("_add_norm", "norms"), ("layer_norm", "norms"),
    ("_attention_kernel", "attention"), ("attention_hopper", "attention"), ("scaled_dot_product", "attention"),
    ("_pool_kernel", "pooling"), ("aten::mean", "pooling"), ("aten::normalize", "pooling"),
    ("linear", "products"), ("gemm", "products"), ("nvjet", "products"), ("cutlass", "products"), ("xmma", "products"),
    ("feed_forward", "products"), ("aten::addmm", "products"), ("aten::mm", "products"), ("aten::gelu", "products"),
)  # fmt: skip
_ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}


@dataclass(frozen=True, slots=True)
class Span:
    """Something that ran, in microseconds."""

    name: str
    start: float
    end: float

    @property
    def kind(self) -> Kind:
        """What it was for."""
        lower = self.name.lower()
        return next((kind for part, kind in _KINDS if part in lower), "other")


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device can do, as measured in the same run: bytes and floating-point operations a second."""

    bytes_per_second: float
    flops_per_second: float


@dataclass(frozen=True, slots=True)
class Work:
    """The fewest bytes and operations that one kind takes in one run; of norms, that each takes."""

    num_bytes: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """One kind in one run: calls, milliseconds, share of the time something ran, and rates over the ceilings."""

    kind: Kind
    calls: float
    milliseconds: float
    share: float
    work: Work
    bandwidth_share: float
    compute_share: float
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """All kinds, the longest first; `idle_share` is the part of the span in which nothing ran."""

    rows: tuple[Row, ...]
    milliseconds: float
    copy_share: float
    idle_share: float
    longest_gap_ms: float


def read_spans(path: Path) -> list[Span]:
    """What ran on the GPU, or, in a trace without one, torch's outermost operations. Raises ProfileInvalid."""
    try:
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    except (OSError, ValueError, KeyError) as error:
        raise ProfileInvalid(f"{path} is no trace: {type(error).__name__}: {error}") from None
    timed = [event for event in events if event.get("ph") == "X" and event.get("dur", 0) > 0]
    on_gpu = [event for event in timed if event.get("cat") in _ON_GPU]
    spans = [_span(event) for event in on_gpu or (event for event in timed if event.get("cat") == "cpu_op")]
    if not spans:
        raise ProfileInvalid(f"{path} shows nothing that ran")
    spans.sort(key=lambda span: (span.start, -span.end))
    return spans if on_gpu else _outermost(spans)


def _span(event: dict[str, object]) -> Span:
    start = float(str(event["ts"]))
    return Span(str(event["name"]), start, start + float(str(event["dur"])))


def _outermost(spans: Iterable[Span]) -> list[Span]:
    kept: list[Span] = []
    for span in spans:
        if not kept or span.start >= kept[-1].end:
            kept.append(span)
    return kept


def count_work(config: BertConfig, lengths: Sequence[int], weight_bytes: int = 2) -> dict[Kind, Work]:
    """The fewest bytes and operations of one run over texts of so many tokens, activations in two bytes."""
    tokens, hidden, inner, layers = sum(lengths), config.hidden, config.intermediate, config.layers
    weights = 4 * hidden * hidden + 2 * hidden * inner
    states = 2 * tokens * hidden
    return {
        "embedding": Work(states + 2 * hidden * min(tokens, config.vocabulary), 8 * tokens * hidden),
        "products": Work(
            layers * (weights * weight_bytes + 2 * tokens * (3 * hidden + 3 * hidden + 2 * hidden + 2 * inner)),
            2 * layers * tokens * weights,
        ),
        "attention": Work(layers * 4 * states, layers * 4 * hidden * sum(length * length for length in lengths)),
        "norms": Work(2 * states, 8 * tokens * hidden),
        "pooling": Work(states + 4 * len(lengths) * hidden, tokens * hidden),
        "whole encoder": Work(
            layers * weights * weight_bytes,
            2 * layers * tokens * weights + layers * 4 * hidden * sum(length * length for length in lengths),
        ),
    }


def summarise(spans: Sequence[Span], num_runs: int, work: dict[Kind, Work], ceilings: Ceilings) -> Profile:
    """Per run of `num_runs` alike."""
    busy, longest_gap = _busy(spans)
    whole = max(span.end for span in spans) - spans[0].start
    total = sum(span.end - span.start for span in spans)
    rows = [
        _row(kind, [span for span in spans if span.kind == kind], num_runs, total, work.get(kind, Work()), ceilings)
        for kind in dict.fromkeys(span.kind for span in spans)
    ]
    rows.sort(key=lambda row: -row.milliseconds)
    copies = sum(row.share for row in rows if row.kind == "copies")
    return Profile(tuple(rows), whole / num_runs / 1e3, copies, 1 - busy / whole, longest_gap / 1e3)


def _row(kind: Kind, spans: Sequence[Span], num_runs: int, total: float, work: Work, ceilings: Ceilings) -> Row:
    seconds, calls = sum(span.end - span.start for span in spans) / 1e6, len(spans) / num_runs
    if kind == "norms":  # some are part of products
        work = Work(calls * work.num_bytes, calls * work.flops)
    return Row(
        kind,
        calls,
        seconds / num_runs * 1e3,
        seconds * 1e6 / total,
        work,
        work.num_bytes * num_runs / seconds / ceilings.bytes_per_second,
        work.flops * num_runs / seconds / ceilings.flops_per_second,
        tuple(sorted({span.name for span in spans})),
    )


def _busy(spans: Sequence[Span]) -> tuple[float, float]:
    """Microseconds in which at least one span ran, and the longest stretch between two in which none did."""
    busy, gap, end = 0.0, 0.0, spans[0].start
    for span in spans:
        if span.start > end:
            gap = max(gap, span.start - end)
        busy += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    return busy, gap
