"""`thorforge registry`: what a person at a terminal, or a script, does with bundles and channels.

Results go to stdout, progress and remarks to stderr. A refusal is one `error:` line and exit status 1.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from registry import client
from registry.channel import CHANNELS, ChannelRecord, read_channel, read_channels
from registry.errors import ChannelNotFound, RegistryError
from registry.keys import user_name
from registry.manifest import digest_of, verify_bundle
from registry.moves import move_channel
from registry.options import (
    SHORT_DIGEST,
    JsonOption,
    ModelArgument,
    ReferenceArgument,
    RegistryOption,
    complete_channel,
    complete_model,
    progress_bar,
)
from registry.store import Store, open_store
from registry.upkeep import app as upkeep_app

__all__ = ["app"]


class _OneLineErrors(TyperGroup):
    """Prints what we refuse, and what the system refuses us, as one line; our own bugs keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `... | head` is no error; click ends quietly
            raise
        except (RegistryError, OSError) as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    name="registry",
    cls=_OneLineErrors,
    no_args_is_help=True,
    help="Push, pull and inspect bundles, and move the channels that point at them.",
)
channel_app = typer.Typer(no_args_is_help=True, help="Read and move channels: production and canary.")
app.add_typer(channel_app, name="channel")
app.add_typer(upkeep_app)


@app.command(epilog="Example: thorforge registry push build/minilm-int8")
def push(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder of a bundle.", show_default=False)],
    registry: RegistryOption = None,
) -> None:
    """Verify a bundle, publish it whole or not at all, and print its digest.

    Pushing a bundle that is already there changes nothing.
    """
    with progress_bar("pushing") as progress:
        typer.echo(client.push(bundle, open_store(registry), progress))


@app.command(epilog="Example: thorforge registry pull minilm production /srv/models/minilm")
def pull(
    model: ModelArgument,
    reference: ReferenceArgument,
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="The folder to make; it appears whole.", show_default=False)
    ],
    registry: RegistryOption = None,
) -> None:
    """Copy a bundle into a folder, every byte verified, and print its digest."""
    with progress_bar("pulling") as progress:
        client.pull(open_store(registry), model, reference, target, progress)
    typer.echo(digest_of(target))


@app.command("list", epilog="Example: thorforge registry list minilm")
def list_(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Only this model.", autocompletion=complete_model)
    ] = None,
    as_json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Compare the stored bundles: quality, speed and the channels that point at them."""
    store = open_store(registry)
    bundles = client.list_bundles(store, model)
    for bundle in bundles:
        if bundle.fault:
            typer.echo(f"warning: {bundle.fault}", err=True)
    if as_json:
        typer.echo(json.dumps([_as_json(bundle) for bundle in bundles], indent=2))
    elif bundles:
        _print_bundles(bundles)
    else:
        typer.echo(f"no bundles{f' of {model}' if model else ''} in {store}", err=True)


@app.command(epilog="Example: thorforge registry show minilm production --json")
def show(
    model: ModelArgument,
    reference: ReferenceArgument,
    as_json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Print everything a bundle's manifest says."""
    store = open_store(registry)
    digest = client.resolve(store, model, reference)
    contents = client.read_stored(store, model, digest)
    channels = tuple(record.channel for record in read_channels(store, model) if record.digest == digest)
    document = _as_json(client.StoredBundle(model, digest, channels, contents, ""))
    if as_json:
        typer.echo(json.dumps(document, indent=2))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("digest", digest)
    table.add_row("channels", ", ".join(channels) or "-")
    for key, value in _flatten(document["manifest"]):
        table.add_row(key, value)
    _print(table)


@app.command(epilog="Examples: thorforge registry verify build/minilm-int8, or: verify minilm@production")
def verify(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="BUNDLE_OR_REFERENCE", help="A bundle's folder, or MODEL@REFERENCE.", show_default=False
        ),
    ],
    registry: RegistryOption = None,
) -> None:
    """Hash every byte of a folder or of a stored bundle, and print its digest if it is what its manifest says."""
    model, at, reference = subject.partition("@")
    if not at or Path(subject).exists():
        digest = digest_of(Path(subject))
        verify_bundle(Path(subject), digest)
    else:
        store = open_store(registry)
        digest = client.resolve(store, model, reference)
        with progress_bar("verifying") as progress:
            client.verify_stored(store, model, digest, progress)
    typer.echo(digest)


@channel_app.command("get", epilog="Example: thorforge registry channel get minilm production")
def get_channel(
    model: ModelArgument,
    channel: Annotated[
        str | None,
        typer.Argument(metavar="CHANNEL", help="Only this channel.", autocompletion=complete_channel),
    ] = None,
    as_json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Print the digest a channel points at or, without CHANNEL, all of a model's channels."""
    store = open_store(registry)
    records = read_channels(store, model) if channel is None else [read_channel(store, model, channel)]
    if as_json:
        documents = [record.model_dump(mode="json") for record in records]
        typer.echo(json.dumps(documents if channel is None else documents[0], indent=2))
    elif channel is not None:
        typer.echo(records[0].digest)
    elif records:
        _print_channels(records)
    else:
        typer.echo(f"no channel of {model} was ever set in {store}", err=True)


@channel_app.command(
    "set", epilog="Example: thorforge registry channel set minilm production 3f2a9c01 --expect 77b0e1d2"
)
def set_channel(
    model: ModelArgument,
    channel: Annotated[
        str,
        typer.Argument(
            metavar="CHANNEL", help=" or ".join(CHANNELS), autocompletion=complete_channel, show_default=False
        ),
    ],
    reference: ReferenceArgument,
    *,
    expect: Annotated[
        str | None,
        typer.Option(
            metavar="DIGEST",
            help="Move only if the channel points at this digest (8 or more hex digits), or at 'none'.",
            show_default="what it points at now",
        ),
    ] = None,
    by: Annotated[str | None, typer.Option(metavar="NAME", help="Who moves it.", show_default="your user name")] = None,
    registry: RegistryOption = None,
) -> None:
    """Point a channel at a bundle and print the digest; refused where somebody else moved it first."""
    store = open_store(registry)
    digest = client.resolve(store, model, reference)
    expected = _expected_digest(store, model, channel, expect)
    record = move_channel(store, model, channel, digest, expected, moved_by=user_name() if by is None else by)
    typer.echo(f"{channel} of {model} was {record.previous or 'never set'} (move {record.sequence})", err=True)
    typer.echo(record.digest)


def _expected_digest(store: Store, model: str, channel: str, expect: str | None) -> str | None:
    """What the channel must point at: the full digest where `expect` abbreviates the current one."""
    try:
        current = read_channel(store, model, channel).digest
    except ChannelNotFound:
        current = None
    if expect is None:
        return current
    if expect == "none":
        return None
    is_current = current is not None and len(expect) >= client.MIN_PREFIX and current.startswith(expect)
    return current if is_current else expect


def _as_json(bundle: client.StoredBundle) -> dict[str, Any]:
    return {
        "model": bundle.model,
        "digest": bundle.digest,
        "channels": list(bundle.channels),
        "manifest": bundle.manifest.model_dump(mode="json") if bundle.manifest else None,
        "fault": bundle.fault or None,
    }


def _flatten(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values of a JSON document; a list of plain values stays on one line."""
    if isinstance(value, dict):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        items = enumerate(value)
    else:
        text = value if isinstance(value, str) else json.dumps(value)
        yield key, "-" if value is None else text
        return
    for name, item in items:
        yield from _flatten(item, f"{key}.{name}" if key else str(name))


def _print_bundles(bundles: list[client.StoredBundle]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("model", "variant", "digest", "precision"):
        table.add_column(name, no_wrap=True)
    for name in ("cosine", "p50 ms", "texts/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("compatibility", "created", "channels"):
        table.add_column(name)
    for bundle in bundles:
        manifest, channels = bundle.manifest, ", ".join(bundle.channels)
        if manifest is None:
            table.add_row(bundle.model, "unreadable", bundle.digest[:SHORT_DIGEST], *("-" * 6), channels)
            continue
        table.add_row(
            manifest.model_name,
            manifest.variant,
            bundle.digest[:SHORT_DIGEST],
            manifest.precision,
            f"{manifest.validation.cosine_similarity_vs_fp32.mean:.4f}",
            f"{manifest.performance.latency_p50_ms:.2f}",
            f"{manifest.performance.throughput_qps:.0f}",
            manifest.compatibility,
            f"{manifest.created_at:%Y-%m-%d %H:%M}",
            channels,
        )
    _print(table)


def _print_channels(records: list[ChannelRecord]) -> None:
    table = Table("channel", "digest", "previous", "move", "moved at", "moved by", box=None, pad_edge=False)
    for record in records:
        previous = record.previous[:SHORT_DIGEST] if record.previous else "-"
        moved_at = f"{record.moved_at:%Y-%m-%d %H:%M}"
        digest = record.digest[:SHORT_DIGEST]
        table.add_row(record.channel, digest, previous, str(record.sequence), moved_at, record.moved_by)
    _print(table)


def _print(table: Table) -> None:
    # Into a file or a pipe every row is one line, however long.
    console = Console(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else 10_000)
    console.print(table)
