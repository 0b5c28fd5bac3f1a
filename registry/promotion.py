"""Promotion: gate and approvals in, a moved channel and one entry in the ledger out; rollback; status."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from registry.approval import Approval, ApprovalPolicy, check_approvals
from registry.channel import ChannelRecord, see_channel
from registry.client import check_stored, resolve, verify_stored
from registry.errors import RollbackRefused
from registry.events import Decided, Judged, Moved
from registry.gate import GateRecord
from registry.ledger import Entry, append_once, as_move, read_moves, read_newest, recorded_refusals
from registry.moves import Grounds, find_unfinished, record_move, settle
from registry.store import Store

__all__ = ["CURRENT", "Status", "promote", "rollback", "status"]

CURRENT = "current"
"""Expect the channel to point where it points when the call begins."""


@dataclass(frozen=True, slots=True)
class Status:
    """Where a channel points, since when, by whom and why: its record and the ledger's entry of that move.

    `entry` is None where no entry moved the channel there. `is_finished` is False while a recorded move waits to be
    carried out by the next promotion, rollback or `settle`.
    """

    channel: ChannelRecord
    entry: Entry | None
    is_finished: bool

    @property
    def move(self) -> Moved | None:
        """The move as the ledger has it: kind, reason, gate report's digest and approvals."""
        return as_move(self.entry) if self.entry else None


def promote(
    store: Store,
    model: str,
    digest: str,
    gate: GateRecord,
    approvals: Sequence[Approval],
    policy: ApprovalPolicy,
    *,
    requested_by: str,
    channel: str = "production",
    expected: str | None = CURRENT,
    reason: str = "",
    now: datetime | None = None,
) -> Entry:
    """Point `channel` at the bundle `digest`, every byte of it verified, and return the ledger's entry of the move.

    The verdict and every decision are recorded first, a refusal as well. Run again after it was killed anywhere, it
    goes on where it was: there is one entry for the move, however often it is run. `expected` is the digest that the
    candidate was compared with (None: the channel was never set).

    Raises PromotionRefused, ChannelMoved, BundleNotFound, and what verifying the stored bundle raises.
    """
    with recorded_refusals(store, model, "promote", digest, requested_by):
        if expected == CURRENT:
            current = settle(store, model, channel, read_newest(store, model)).record
            expected = current.digest if current else None
        append_once(store, model, Judged(bundle=digest, report=gate))
        for approval in approvals:
            append_once(store, model, Decided(approval=approval))
        counted = check_approvals(
            policy, digest, gate, approvals, requested_by=requested_by, now=now or datetime.now(UTC)
        )
        verify_stored(store, model, digest)
        grounds = Grounds("move", requested_by, reason, gate.digest, counted)
        return record_move(store, model, channel, digest, expected, grounds)


def rollback(
    store: Store,
    model: str,
    to: str | None = None,
    *,
    asked_by: str,
    channel: str = "production",
    expected: str | None = CURRENT,
    reason: str = "",
    may_empty: bool = False,
) -> Entry:
    """Point `channel` back at the bundle that the current one replaced, or at `to`, which it held before.

    `to` is a digest or its first 8 or more hex digits; `expected` is the digest to get away from. A rollback that was
    killed half-way is finished, not done twice. No approval is asked for: the bundle had one. With `may_empty` a bundle
    that replaced nothing leaves nothing behind: the entry's bundle is None. Raises RollbackRefused, ChannelMoved,
    BundleNotFound, and what reading the stored bundle raises.
    """
    with recorded_refusals(store, model, "rollback", to or "", asked_by):
        unfinished = find_unfinished(store, model, channel)
        current = settle(store, model, channel, read_newest(store, model)).record
        if unfinished is not None and _is_rollback_to(as_move(unfinished), to):
            return unfinished
        if done := _find_done(store, model, channel, current, expected, to):
            return done
        if current is None:
            raise RollbackRefused(f"channel {channel} of {model} was never set: there is nothing to roll back")
        target = _find_target(store, current, may_empty) if to is None else resolve(store, model, to)
        if target is not None:
            _check_was_there(store, current, target)
            check_stored(store, model, target)
        expected = current.digest if expected == CURRENT else expected
        return record_move(store, model, channel, target, expected, Grounds("rollback", asked_by, reason))


def status(store: Store, model: str, channel: str = "production") -> Status | None:
    """What a channel points at and how it came there, or None where it was never set. Reads, never writes."""
    unfinished = find_unfinished(store, model, channel)
    record = see_channel(store, model, channel).record
    if record is None:
        return None
    moves = (entry for entry in read_moves(store, model, channel) if as_move(entry).number <= record.sequence)
    entry = next(moves, None)
    is_its = entry is not None and (as_move(entry).number, as_move(entry).bundle) == (record.sequence, record.digest)
    return Status(record, entry if is_its else None, unfinished is None)


def _find_target(store: Store, current: ChannelRecord, may_empty: bool) -> str | None:
    """What the channel held before `current` was first moved there; a rollback back to it does not count."""
    for entry in read_moves(store, current.model, current.channel):
        event = as_move(entry)
        if event.bundle == current.digest and event.kind != "rollback":
            if event.replaced is None and not may_empty:
                break
            return event.replaced
    raise RollbackRefused(
        f"channel {current.channel} of {current.model} points at {current.digest}, which replaced nothing"
    )


def _check_was_there(store: Store, current: ChannelRecord, target: str) -> None:
    moves = (as_move(entry) for entry in read_moves(store, current.model, current.channel))
    if not any(target in (move.bundle, move.replaced) for move in moves):
        raise RollbackRefused(
            f"channel {current.channel} of {current.model} never held {target}: a rollback leads where it was before"
        )


def _find_done(
    store: Store, model: str, channel: str, current: ChannelRecord | None, expected: str | None, to: str | None
) -> Entry | None:
    """The rollback away from `expected` that brought the channel where it is, if there was one."""
    newest = next(read_moves(store, model, channel), None)
    if newest is None or expected in (CURRENT, current.digest if current else None):
        return None
    move = as_move(newest)
    return newest if _is_rollback_to(move, to) and move.replaced == expected else None


def _is_rollback_to(move: Moved, to: str | None) -> bool:
    return move.kind == "rollback" and (to is None or (move.bundle or "").startswith(to))
