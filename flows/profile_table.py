"""The table of a profile, for a terminal of 80 columns."""

from collections.abc import Iterator

from rich import box
from rich.markup import escape
from rich.table import Table

from tasks.measurement.ceilings import Ceilings
from tasks.measurement.profile import Kernel, Profile, Row
from tasks.measurement.work import Compute

_MOST_KERNELS = 4  # of one row that are named
_COLUMNS = ("calls", "ms", "time", "MB", "GB/s", "of\ncopy", "GFLOP", "GFLOP/s", "of\nprod.")


def fill_table(profile: Profile, ceilings: Ceilings, compute: Compute, title: str, end: str) -> Table:
    """A line for each linear layer or kind, rates beside the share of the ceiling they reach, and below it its kernels.

    Nothing is cut at 80 columns: names are folded. `end` is the last line.
    """
    table = Table(
        title=escape(title), caption=escape("\n".join((*_describe_rest(profile, ceilings, compute), end))),
        caption_justify="left", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False,
        show_edge=False,
    )  # fmt: skip
    table.add_column("what, kernels", overflow="fold")
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in profile.rows:
        _add_row(table, row, compute)
    return table


def _add_row(table: Table, row: Row, compute: Compute) -> None:
    name = _name(row, compute)
    if len(row.kernels) == 1:
        name += f"\n {_brief(row.kernels[0].name)}"
    spent = f"{row.calls:.0f}", _number(row.milliseconds), f"{row.share:.1%}"
    table.add_row(escape(name), *spent, *(_list_rates(row) if row.work.flops else ()))
    if len(row.kernels) > 1:
        for kernel in _shorten(row.kernels):
            part = f"{kernel.calls:.0f}", _number(kernel.milliseconds), f"{kernel.share:.1%}"
            table.add_row(escape(f" {_brief(kernel.name)}"), *part, style="dim")


def _name(row: Row, compute: Compute) -> str:
    """In a run in E4M3 a linear layer's with what it is in."""
    if row.linear is None:
        return row.kind
    return f"{row.linear} {'f8' if row.is_narrow else 'f16'}" if compute == "f8" else row.linear


def _brief(kernel: str) -> str:
    """Without the arguments of templates, which take lines; JSON and the timeline have them."""
    return kernel.removeprefix("void ").partition("<")[0]


def _list_rates(row: Row) -> Iterator[str]:
    seconds = row.milliseconds / 1e3
    yield _number(row.work.num_bytes / 1e6)
    yield _number(row.work.num_bytes / 1e9 / seconds)
    yield f"{row.bandwidth_share:.0%}"
    yield _number(row.work.flops / 1e9)
    yield _number(row.work.flops / 1e9 / seconds)
    yield "?" if row.compute_share is None else f"{row.compute_share:.0%}"


def _number(value: float) -> str:
    """In five characters up to 100,000, seven up to ten millions."""
    if 0 < value < 0.001:
        return f"{value:.0e}"
    return f"{value:.{3 if value < 10 else 1 if value < 1000 else 0}f}"


def _shorten(kernels: tuple[Kernel, ...]) -> Iterator[Kernel]:
    """The longest, and the others in one."""
    yield from kernels[:_MOST_KERNELS]
    rest = kernels[_MOST_KERNELS:]
    if rest:
        calls, milliseconds = sum(kernel.calls for kernel in rest), sum(kernel.milliseconds for kernel in rest)
        yield Kernel(f"{len(rest)} more", calls, milliseconds, sum(kernel.share for kernel in rest))


def _describe_rest(profile: Profile, ceilings: Ceilings, compute: Compute) -> Iterator[str]:
    idle = f"idle {profile.idle_share:.1%}, longest gap {profile.longest_gap_ms:.3f} ms"
    yield f"copies {profile.copy_share:.1%} of the time, {idle}"
    if profile.unplaced is not None:
        yield f"linear layers are not told apart: {profile.unplaced}"
    wide = "f32" if compute == "f32" else "f16"
    product = f"product in {wide} {ceilings.flops_per_second / 1e9:.0f} GFLOP/s"
    yield f"ceilings, measured: copy {ceilings.bytes_per_second / 1e9:.0f} GB/s, {product}"
    if compute == "f8":
        narrow = ceilings.narrow_flops_per_second
        rate = "not measured: torch has none here" if narrow is None else f"{narrow / 1e9:.0f} GFLOP/s"
        yield f"product in f8: {rate}"
