"""fsck: finds what is not as it was written: bundles, signatures, channels, ledger."""

from collections.abc import Iterator
from dataclasses import dataclass

from registry.channel import CHANNELS, Seen, see_channel
from registry.client import check_stored, verify_stored
from registry.errors import RegistryError
from registry.events import Moved
from registry.ledger import as_move, read_moves, read_newest, verify_ledger
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
        now = see_channel(store, model, channel)
        newest = read_newest(store, model)
        entry = next(read_moves(store, model, channel, newest), None) if newest else None
    except RegistryError as error:
        yield Fault(model, channel, str(error))
        return
    if now.record is not None and not store.has_bundle(model, now.record.digest):
        yield Fault(model, channel, f"points at {now.record.digest}, which is not in {store}")
    reason = _compare(now, as_move(entry) if entry else None)
    if reason:
        yield Fault(model, channel, reason)


def _compare(now: Seen, move: Moved | None) -> str | None:
    """How a channel differs from its newest recorded move; None: it does not."""
    digest, previous = (now.record.digest, now.record.previous) if now.record else (None, None)
    by = f" by move {now.sequence}{f' of {now.record.moved_by}' if now.record else ''}" if now.sequence else ""
    points = f"points at {digest or 'nothing'}{by}"
    if move is None:
        return f"{points}, which was never recorded" if now.sequence else None
    if (digest, now.sequence) == (move.bundle, move.number) and (digest is None or previous == move.replaced):
        return None
    wanted = f"{move.bundle or 'nothing'} by move {move.number} of {move.moved_by}"
    if now.sequence == move.number - 1 and digest == move.replaced:
        return f"{points}; the move to {wanted} was not carried out: promote or roll back finishes it"
    return f"{points}, the ledger says {wanted}"
