"""What the registry's commands share: options, their completion, and the progress bar."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as ProgressBar

from registry.channel import CHANNELS
from registry.errors import ReferenceInvalid
from registry.store import REGISTRY_VARIABLE, Progress, Store, open_store

__all__ = [
    "SHORT_DIGEST", "JsonOption", "ModelArgument", "ReferenceArgument", "RegistryOption", "complete_channel",
    "complete_model", "complete_reference", "progress_bar",
]  # fmt: skip

SHORT_DIGEST = 12


def complete_model(ctx: typer.Context, incomplete: str) -> list[str]:
    """Models that begin with what was typed."""
    return [name for name in _completion_store(ctx).list_models() if name.startswith(incomplete)]


def complete_channel(incomplete: str) -> list[str]:
    """Channels that begin with what was typed."""
    return [name for name in CHANNELS if name.startswith(incomplete)]


def complete_reference(ctx: typer.Context, incomplete: str) -> list[str]:
    """Channels and short digests that begin with what was typed."""
    try:
        digests = _completion_store(ctx).list_digests(ctx.params.get("model") or "")
    except ReferenceInvalid:
        digests = []
    return [name for name in (*CHANNELS, *(d[:SHORT_DIGEST] for d in digests)) if name.startswith(incomplete)]


def _completion_store(ctx: typer.Context) -> Store:
    return open_store(ctx.params.get("registry"))


RegistryOption = Annotated[
    str | None,
    typer.Option(
        "--registry",
        metavar="PLACE",
        envvar=REGISTRY_VARIABLE,
        help="The registry: a folder or s3://bucket/prefix; by default registry in $THORFORGE_HOME (.thorforge).",
        show_default=False,
    ),
]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model's name.", autocompletion=complete_model, show_default=False)
]
ReferenceArgument = Annotated[
    str,
    typer.Argument(
        metavar="REFERENCE",
        help="A channel, a digest or its first 8 or more hex digits.",
        autocompletion=complete_reference,
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@contextmanager
def progress_bar(title: str) -> Iterator[Progress | None]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with ProgressBar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
