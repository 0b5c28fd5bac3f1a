"""What ran, from a trace in Chrome's format, as torch.profiler writes it and Perfetto opens it, and what it was for.

What it was for shows in the names: the engine's own kernels, the library's matrix products and torch's operations on
the CPU.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    ("splitk", "products"), ("feed_forward", "products"),
    ("aten::addmm", "products"), ("aten::mm", "products"), ("aten::gelu", "products"),
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


def read_spans(path: Path) -> list[Span]:
    """What ran on the GPU, or, in a trace without one, torch's outermost operations, in order of their start.

    Raises ProfileInvalid.
    """
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
