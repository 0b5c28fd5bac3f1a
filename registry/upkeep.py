"""`thorforge registry gc|fsck|sign|keys`: what keeps a registry small, sound and signed."""

import json
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from registry import client
from registry.collect import collect
from registry.fsck import check_registry
from registry.keys import user_name
from registry.manifest import MANIFEST_NAME
from registry.options import JsonOption, ModelArgument, ReferenceArgument, RegistryOption, complete_model
from registry.settings import load_settings, variable_of
from registry.signing import make_keys
from registry.signing import sign as sign_manifest
from registry.store import open_store

__all__ = ["app"]

app = typer.Typer()


@app.command(epilog="Example: thorforge registry gc minilm --keep 5 --dry-run")
def gc(
    model: ModelArgument,
    *,
    keep: Annotated[int, typer.Option(min=1, help="How many of each channel's last moves stay possible to undo.")] = 10,
    min_age_days: Annotated[float, typer.Option(min=0, help="Younger bundles and uploads stay.")] = 7,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be deleted.")] = False,
    as_json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Delete the bundles that no channel, recent promotion or recent push needs, and print their digests.

    The ledger records what is deleted. Uploads that broke off are removed as well.
    """
    store, age = open_store(registry), timedelta(days=min_age_days)
    done = collect(store, model, collected_by=user_name(), keep_promotions=keep, min_age=age, dry_run=dry_run)
    num_leftovers = 0 if dry_run else store.delete_leftovers(age)
    if as_json:
        typer.echo(json.dumps({**asdict(done), "num_leftovers": num_leftovers, "dry_run": dry_run}, indent=2))
        return
    for digest in done.deleted:
        typer.echo(digest)
    verb = "would delete" if dry_run else "deleted"
    typer.echo(f"{verb} {len(done.deleted)} bundles and {num_leftovers} leftovers, kept {done.num_kept}", err=True)


@app.command(epilog="Example: thorforge registry fsck --quick")
def fsck(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Only this model.", autocompletion=complete_model)
    ] = None,
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Do not hash the bundles' files.")] = False,
    as_json: JsonOption = False,
    registry: RegistryOption = None,
) -> None:
    """Check every bundle, signature, channel and entry of the ledger; changes nothing. Exit status 1: faults found."""
    store = open_store(registry)
    faults = list(check_registry(store, model, is_quick=quick))
    if as_json:
        typer.echo(json.dumps([asdict(fault) for fault in faults], indent=2))
    else:
        for fault in faults:
            typer.echo(f"{fault.model} {fault.subject}: {fault.reason}")
        typer.echo(f"{len(faults) or 'no'} faults in {store}", err=True)
    if faults:
        raise typer.Exit(1)


@app.command(epilog="Example: thorforge registry sign minilm 3f2a9c01 --key release.pem")
def sign(
    model: ModelArgument,
    reference: ReferenceArgument,
    *,
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar=variable_of("signing_key"),
            help="Private Ed25519 key in PEM.",
            show_default="registry.signing_key of thorforge.toml",
        ),
    ] = None,
    registry: RegistryOption = None,
) -> None:
    """Verify a stored bundle, add your signature to it, and print its digest: for keys that builders must not hold."""
    private_key = key or load_settings().signing_key
    if private_key is None:
        raise typer.BadParameter("give --key FILE, or registry.signing_key in thorforge.toml")
    store = open_store(registry)
    digest = client.resolve(store, model, reference)
    client.verify_stored(store, model, digest, needs_signature=False)
    with store.open_file(model, digest, MANIFEST_NAME) as stream:
        store.put_signature(model, digest, sign_manifest(stream.read(), private_key))
    typer.echo(digest)


@app.command(epilog="Example: thorforge registry keys release.pem release.pub")
def keys(
    private_key: Annotated[Path, typer.Argument(metavar="PRIVATE", help="File to write it to.", show_default=False)],
    public_key: Annotated[Path, typer.Argument(metavar="PUBLIC", help="File to write it to.", show_default=False)],
) -> None:
    """Make a pair of Ed25519 keys: the private one signs bundles, the public one is what servers check them with."""
    make_keys(private_key, public_key)
    typer.echo(str(public_key))
