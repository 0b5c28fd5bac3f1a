"""Moves of channels: recorded in the ledger first, then carried out, so that one is never done without the other.

The ledger's entry decides: to create it is to win the race, and who dies before the channel follows is completed by
whoever comes next (`settle`).
"""

from dataclasses import asdict, dataclass
from typing import Literal

from pydantic import ValidationError

from registry.approval import Approval
from registry.channel import ChannelRecord, EmptiedRecord, Seen, see_channel, swap_channel
from registry.errors import BundleNotFound, ChannelMoved, LedgerBroken, RecordInvalid
from registry.events import Collected, Moved
from registry.ledger import COLLECTED, Entry, append, as_move, read_entry, read_moves, read_newest
from registry.manifest import describe_validation
from registry.store import Store

__all__ = ["Grounds", "find_unfinished", "move_channel", "record_move", "settle"]


def move_channel(
    store: Store, model: str, channel: str, digest: str, expected: str | None, *, moved_by: str
) -> ChannelRecord:
    """Move a channel by hand, past gate and approval; the ledger says so. Returns where the channel points then.

    Raises what `record_move` raises.
    """
    record_move(store, model, channel, digest, expected, Grounds("set", moved_by))
    record = see_channel(store, model, channel).record
    assert record is not None
    return record


@dataclass(frozen=True, slots=True)
class Grounds:
    """Why a channel moves: how, by whom, and on which gate report and approvals."""

    kind: Literal["move", "rollback", "set"]
    moved_by: str
    reason: str = ""
    gate: str | None = None
    approvals: tuple[Approval, ...] = ()


def record_move(
    store: Store, model: str, channel: str, digest: str | None, expected: str | None, grounds: Grounds
) -> Entry:
    """Point a channel at `digest` if it still points at `expected` (None: nowhere); returns the ledger's entry.

    With a `digest` of None a rollback empties the channel: it points nowhere again, as before its first move.
    Moving a channel to where it already points changes nothing and returns the entry that moved it there. Raises
    ChannelMoved (names where it points now), BundleNotFound, ReferenceInvalid, RecordInvalid, LedgerBroken, StoreFull.
    """

    def propose(newest: Entry | None) -> Moved | None:
        now = settle(store, model, channel, newest)
        points_at = now.record.digest if now.record else None
        if digest is not None and (not store.has_bundle(model, digest) or _is_collected(store, model, digest, newest)):
            raise BundleNotFound(f"channel {channel} cannot move to {digest}: {store} holds no such bundle of {model}")
        if points_at == digest:
            return None
        if points_at != expected:
            raise _moved(now.record, model, channel, expected)
        return _next_move(now, model, channel, digest, grounds)

    entry = append(store, model, propose) or next(read_moves(store, model, channel), None)
    if entry is None:
        raise LedgerBroken(f"channel {channel} of {model} in {store} points at {digest}, but no entry moved it there")
    settle(store, model, channel, entry)
    return entry


def settle(store: Store, model: str, channel: str, newest: Entry | None) -> Seen:
    """Carry out the newest recorded move of a channel if its mover did not, and return the channel as it is then.

    `newest` is the ledger's newest entry, as the caller has seen it.
    """
    move = next(read_moves(store, model, channel, newest), None) if newest else None
    while True:
        now = see_channel(store, model, channel)
        if move is None or now.sequence >= as_move(move).number:
            return now
        swap_channel(store, _record_of(move), now.data)  # lost, somebody else has moved it: then look again as well


def find_unfinished(store: Store, model: str, channel: str) -> Entry | None:
    """The recorded move that the channel has not followed yet, or None."""
    newest = read_newest(store, model)
    move = next(read_moves(store, model, channel, newest), None) if newest else None
    if move is None or see_channel(store, model, channel).sequence >= as_move(move).number:
        return None
    return move


def _next_move(now: Seen, model: str, channel: str, digest: str | None, grounds: Grounds) -> Moved:
    try:
        return Moved.model_validate(
            {
                **asdict(grounds),
                "channel": channel,
                "bundle": digest,
                "replaced": now.record.digest if now.record else None,
                "number": now.sequence + 1,
                "approvals": grounds.approvals,
            }
        )
    except ValidationError as error:
        raise RecordInvalid(f"channel {channel} of {model}: {describe_validation(error)}") from None


def _record_of(move: Entry) -> ChannelRecord | EmptiedRecord:
    event = as_move(move)
    return (EmptiedRecord if event.bundle is None else ChannelRecord).model_validate(
        {
            "model": move.model,
            "channel": event.channel,
            "digest": event.bundle,
            "previous": event.replaced,
            "sequence": event.number,
            "moved_at": move.recorded_at,
            "moved_by": event.moved_by,
        }
    )


def _is_collected(store: Store, model: str, digest: str, newest: Entry | None) -> bool:
    """Whether the newest collection, which may still be deleting, holds `digest`, and it was not pushed again since."""
    sequence = newest.state.get(COLLECTED, 0) if newest else 0
    if not sequence:
        return False
    entry = read_entry(store, model, sequence)
    if not isinstance(entry.event, Collected) or digest not in entry.event.bundles:
        return False
    return store.list_published(model)[digest] <= entry.recorded_at


def _moved(current: ChannelRecord | None, model: str, channel: str, expected: str | None) -> ChannelMoved:
    now = f"points at {current.digest} (move {current.sequence} by {current.moved_by})" if current else "was never set"
    return ChannelMoved(f"channel {channel} of {model} {now}, expected {expected or 'that it was never set'}")
