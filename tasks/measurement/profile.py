"""What an engine run's time goes into: linear layers, other kinds and their kernels against measured ceilings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tasks.measurement.ceilings import Ceilings
from tasks.measurement.linears import Place, place_linears
from tasks.measurement.trace import Kind, Span
from tasks.measurement.work import Linear, RunWork, Work


@dataclass(frozen=True, slots=True)
class Kernel:
    """What ran under one name, in one run: calls, milliseconds, and share of the time that something ran."""

    name: str
    calls: float
    milliseconds: float
    share: float


@dataclass(frozen=True, slots=True)
class Row:
    """One linear layer, in all layers of one run, or one kind, with its kernels, the longest first; see `Kernel`.

    `is_narrow`: a linear layer in E4M3. Rates are over the ceilings; `compute_share` is None where the ceiling was not
    measured.
    """

    kind: Kind
    linear: Linear | None
    is_narrow: bool
    calls: float
    milliseconds: float
    share: float
    work: Work
    bandwidth_share: float
    compute_share: float | None
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """All rows, the longest first; `idle_share` is the part of the span in which nothing ran.

    `unplaced` says why products are one row, where they could not be told apart.
    """

    rows: tuple[Row, ...]
    milliseconds: float
    copy_share: float
    idle_share: float
    longest_gap_ms: float
    unplaced: str | None


@dataclass(frozen=True, slots=True)
class _Runs:
    """What rows are made from: all time of the spans in microseconds, and how many runs they were."""

    count: int
    microseconds: float
    ceilings: Ceilings


_Key = tuple[Kind, Linear | None, bool]


def summarise(spans: Sequence[Span], num_runs: int, work: RunWork, ceilings: Ceilings) -> Profile:
    """Per run of `num_runs` alike, of spans in order of time."""
    busy, longest_gap = _busy(spans)
    whole = max(span.end for span in spans) - spans[0].start
    runs = _Runs(num_runs, sum(span.end - span.start for span in spans), ceilings)
    placed, unplaced = place_linears(spans, len(work.linears)) if work.linears else ({}, None)
    members: dict[_Key, list[int]] = {}
    for number, span in enumerate(spans):
        members.setdefault(_key(span, placed.get(number), work), []).append(number)
    rows = [
        _row(key, [spans[number] for number in numbers], _sum_work(key, numbers, placed, work, num_runs), runs)
        for key, numbers in members.items()
    ]
    rows.sort(key=lambda row: -row.milliseconds)
    copies = sum(row.share for row in rows if row.kind == "copies")
    return Profile(tuple(rows), whole / num_runs / 1e3, copies, 1 - busy / whole, longest_gap / 1e3, unplaced)


def _key(span: Span, place: Place | None, work: RunWork) -> _Key:
    if place is None:
        return span.kind, None, False
    number, linear = place
    return span.kind, linear, work.linears[number][linear].narrow_flops > 0


def _sum_work(key: _Key, numbers: Sequence[int], placed: Mapping[int, Place], work: RunWork, num_runs: int) -> Work:
    """Of one run: a linear layer's of the layers that are in the row."""
    kind, linear, _ = key
    if linear is not None:
        layers = {placed[number][0] for number in numbers}
        return sum((work.linears[layer][linear] for layer in sorted(layers)), Work())
    if placed and kind == "products":  # the rest of them, if any, is counted where it belongs
        return Work()
    counted = work.kinds.get(kind, Work())
    return counted * (len(numbers) / num_runs) if kind == "norms" else counted  # some are part of products


def _row(key: _Key, spans: Sequence[Span], work: Work, runs: _Runs) -> Row:
    kind, linear, is_narrow = key
    kernels = [_kernel(name, [span for span in spans if span.name == name], runs) for name in {s.name for s in spans}]
    kernels.sort(key=lambda kernel: (-kernel.milliseconds, kernel.name))
    seconds = sum(kernel.milliseconds for kernel in kernels) / 1e3
    least = runs.ceilings.least_seconds(work)
    return Row(
        kind,
        linear,
        is_narrow,
        sum(kernel.calls for kernel in kernels),
        seconds * 1e3,
        sum(kernel.share for kernel in kernels),
        work,
        work.num_bytes / seconds / runs.ceilings.bytes_per_second,
        None if least is None else least / seconds,
        tuple(kernels),
    )


def _kernel(name: str, spans: Sequence[Span], runs: _Runs) -> Kernel:
    microseconds = sum(span.end - span.start for span in spans)
    return Kernel(name, len(spans) / runs.count, microseconds / runs.count / 1e3, microseconds / runs.microseconds)


def _busy(spans: Sequence[Span]) -> tuple[float, float]:
    """Microseconds in which at least one span ran, and the longest stretch between two in which none did."""
    busy, gap, end = 0.0, 0.0, spans[0].start
    for span in spans:
        if span.start > end:
            gap = max(gap, span.start - end)
        busy += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    return busy, gap
