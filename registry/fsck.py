"""fsck: finds what is not as it was written: bundles, signatures, channels, ledger."""

from collections.abc import Iterator
from dataclasses import dataclass

from registry.channel import CHANNELS, ChannelRecord, read_channel_bytes
from registry.client import check_stored, verify_stored
from registry.errors import RegistryError
from registry.ledger import Moved, as_move, read_moves, read_newest, verify_ledger
from registry.store import Store

__all__ = ["Fault", "check_registry"]


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong: of which model, with what (`ledger`, a channel, a bundle's digest), and what it is."""

    model: str
    subject: str
    reason: str


def check_registry(store: Store, model: str | None = None, *, is_quick: bool = False) -> Iterator[Fault]:
    """Everything that is wrong with a model, or with all; changes nothing.

    Reads every byte of every bundle; with `is_quick` only manifests, signatures and the names of files.
    """
    for name in store.list_models() if model is None else [model]:
        yield from _check_ledger(store, name)
        for channel in CHANNELS:
            yield from _check_channel(store, name, channel)
        check = check_stored if is_quick else verify_stored
        for digest in store.list_digests(name):
            try:
                check(store, name, digest)
            except RegistryError as error:
                yield Fault(name, digest, str(error))


def _check_ledger(store: Store, model: str) -> Iterator[Fault]:
    try:
        verify_ledger(store, model)
    except RegistryError as error:
        yield Fault(model, "ledger", str(error))


def _check_channel(store: Store, model: str, channel: str) -> Iterator[Fault]:
    try:
        record, _ = read_channel_bytes(store, model, channel)
        newest = read_newest(store, model)
        entry = next(read_moves(store, model, channel, newest), None) if newest else None
    except RegistryError as error:
        yield Fault(model, channel, str(error))
        return
    if record is not None and not store.has_bundle(model, record.digest):
        yield Fault(model, channel, f"points at {record.digest}, which is not in {store}")
    reason = _compare(record, as_move(entry) if entry else None)
    if reason:
        yield Fault(model, channel, reason)


def _compare(record: ChannelRecord | None, move: Moved | None) -> str | None:
    """How a channel differs from its newest recorded move; None: it does not."""
    if record is None:
        return f"was never set, but move {move.number} to {move.bundle} is recorded" if move else None
    points = f"points at {record.digest} by move {record.sequence} of {record.moved_by}"
    if move is None:
        return f"{points}, which was never recorded"
    if (record.digest, record.previous, record.sequence) == (move.bundle, move.replaced, move.number):
        return None
    if record.sequence == move.number - 1 and record.digest == move.replaced:
        return f"{points}; move {move.number} to {move.bundle} was not carried out: promote or roll back finishes it"
    return f"{points}, the ledger says {move.bundle} by move {move.number} of {move.moved_by}"
