"""The ledger: one hash-chained line of records a model (`registry.events`), which nobody writes twice.

Entry n lies under `ledger/<model>/<n>.json`, is created once and never written again, and holds the SHA-256 of entry
n-1. To create it is to take place n, so writers who race form one line. `head` names one that was newest a moment ago.
"""

import hashlib
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from typing import Literal

from pydantic import AwareDatetime, Field, PrivateAttr, ValidationError

from registry.errors import LedgerBroken, RecordInvalid, RegistryError, StoreFull
from registry.events import Action, Collected, Event, Judged, Moved, Part, Refused
from registry.manifest import SafeName, Sha256, describe_validation
from registry.store import Store, check_model_name

__all__ = [
    "COLLECTED", "Entry", "append", "append_once", "as_move", "read_entry", "read_ledger", "read_moves", "read_newest",
    "recorded_refusals", "verify_ledger", "walk_back",
]  # fmt: skip

COLLECTED = "collected"
"""The key of `Entry.latest` under which the newest collection stands, beside the names of the channels."""

_MAX_DIGITS = 12
_NUM_RECENT = 32


class Entry(Part):
    """One entry. `previous` is the SHA-256 of the entry before, `latest` says where each channel moved before this one.

    Following `latest` reads a channel's moves, newest first, and nothing else. `id` is random: no two writers ever
    write the same bytes.
    """

    schema_version: Literal[1] = 1
    model: SafeName
    sequence: int = Field(ge=1)
    previous: Sha256 | None
    latest: dict[str, int]
    id: str = Field(pattern=r"^[0-9a-f]{16}$")
    recorded_at: AwareDatetime
    event: Event
    _digest: str = PrivateAttr(default="")

    @property
    def digest(self) -> str:
        """SHA-256 of the entry as it lies in the store."""
        return self._digest

    @property
    def state(self) -> dict[str, int]:
        """Where each channel's newest move, and the newest collection, stands up to and with this entry."""
        subject = _subject(self.event)
        return {**self.latest, subject: self.sequence} if subject else {**self.latest}


Propose = Callable[[Entry | None], Event | None]
"""From the newest entry to the event that may follow it, or None: there is nothing to write any more."""


def append(store: Store, model: str, event: Event | Propose, *, now: datetime | None = None) -> Entry | None:
    """Write `event` as the newest entry, and return that.

    A function in its place is asked again after every entry that somebody else wrote first, so what it decides is
    decided on the very state that its event follows. Raises what the function raises, RecordInvalid, LedgerBroken,
    StoreFull.
    """
    newest, hint = _find_end(store, model)
    while True:
        proposed = event(newest) if callable(event) else event
        if proposed is None:
            return None
        entry, data = _follow(model, newest, proposed, now or datetime.now(UTC))
        if store.swap_record(_key(model, entry.sequence), None, data):
            store.swap_record(_head_key(model), hint, f"{entry.sequence} {entry.digest}".encode())
            return entry
        newest = _read_on(store, model, newest)


def append_once(store: Store, model: str, event: Event) -> None:
    """Write `event` unless one of the newest entries is this very event: for steps that are run again."""

    def propose(newest: Entry | None) -> Event | None:
        recent = islice(walk_back(store, newest), _NUM_RECENT)
        return None if any(entry.event == event for entry in recent) else event

    append(store, model, propose)


@contextmanager
def recorded_refusals(store: Store, model: str, action: Action, bundle: str, asked_by: str) -> Iterator[None]:
    """Write what the block refuses into the ledger, then let it pass on."""
    try:
        yield
    except StoreFull:  # then nothing can be written either
        raise
    except RegistryError as error:
        reason = str(error)
        append(
            store,
            model,
            Refused(action=action, bundle=bundle[:256], error=type(error).__name__, reason=reason, asked_by=asked_by),
        )
        raise


def read_newest(store: Store, model: str) -> Entry | None:
    """The newest entry, or None where nothing was ever recorded. Costs three reads, however long the ledger is."""
    return _find_end(store, model)[0]


def read_entry(store: Store, model: str, sequence: int) -> Entry:
    """One entry. Raises LedgerBroken where there is none, RecordInvalid where it cannot be read."""
    data = store.read_record(_key(model, sequence))
    if data is None:
        raise LedgerBroken(f"entry {sequence} of {model} is missing from the ledger in {store}")
    return _parse(data, store, model, sequence)


def read_ledger(store: Store, model: str, limit: int | None = None) -> Iterator[Entry]:
    """The entries, newest first, `limit` of them at most; each is read when it is asked for, and its link checked.

    Raises LedgerBroken, RecordInvalid.
    """
    yield from islice(walk_back(store, read_newest(store, model)), limit)


def read_moves(store: Store, model: str, channel: str, newest: Entry | None = None) -> Iterator[Entry]:
    """The entries in which a channel moved, newest first, without reading those in between.

    From the end of the ledger, or from `newest` back. Raises LedgerBroken, RecordInvalid.
    """
    entry = newest or read_newest(store, model)
    sequence = entry.state.get(channel, 0) if entry else 0
    while entry is not None and sequence:
        if entry.sequence != sequence:
            entry = read_entry(store, model, sequence)
        if not (isinstance(entry.event, Moved) and entry.event.channel == channel):
            raise LedgerBroken(f"entry {sequence} of {model} in {store} is no move of {channel}")
        yield entry
        sequence = entry.latest.get(channel, 0)


def as_move(entry: Entry) -> Moved:
    """The entry's event, where it is known to be a move."""
    assert isinstance(entry.event, Moved)
    return entry.event


def verify_ledger(store: Store, model: str) -> int:
    """Check every entry and link from the newest to the first, and that every channel's moves form one line.

    Returns how many entries there are. Raises LedgerBroken, which names the entry, or RecordInvalid.
    """
    length, later_moves, unseen_gates = 0, dict[str, Moved](), dict[str, int]()
    for entry in read_ledger(store, model):
        length = max(length, entry.sequence)
        if isinstance(entry.event, Judged):
            unseen_gates.pop(entry.event.report.digest, None)
        if entry.sequence == 1 and (entry.previous is not None or entry.latest):
            raise LedgerBroken(f"entry 1 of {model} in {store} follows something")
        if isinstance(entry.event, Moved):
            _check_line(entry, later_moves.get(entry.event.channel), store)
            later_moves[entry.event.channel] = entry.event
            if entry.event.gate:
                unseen_gates[entry.event.gate] = entry.sequence
    for channel, move in later_moves.items():
        if move.number != 1 or move.replaced is not None:
            raise LedgerBroken(f"the first recorded move of {channel} of {model} in {store} is move {move.number}")
    for gate, sequence in unseen_gates.items():
        raise LedgerBroken(f"entry {sequence} of {model} in {store} names gate report {gate}, which was not recorded")
    return length


def _check_line(entry: Entry, later: Moved | None, store: Store) -> None:
    move = entry.event
    if (
        later is not None
        and isinstance(move, Moved)
        and (later.number, later.replaced) != (move.number + 1, move.bundle)
    ):
        raise LedgerBroken(
            f"entry {entry.sequence} of {entry.model} in {store}: move {move.number} of {move.channel} "
            f"to {move.bundle} is followed by move {later.number} from {later.replaced}"
        )


def _find_end(store: Store, model: str) -> tuple[Entry | None, bytes | None]:
    """The newest entry, and the hint that led there: it lags behind where a writer died before writing it."""
    hint = store.read_record(_head_key(model))
    newest = None
    if hint is not None:
        sequence, _, digest = hint.decode(errors="replace").partition(" ")
        if not (sequence.isdigit() and len(sequence) < _MAX_DIGITS):
            raise LedgerBroken(f"{_head_key(model)} in {store} names no entry")
        newest = read_entry(store, model, int(sequence))
        if newest.digest != digest:
            raise LedgerBroken(f"entry {sequence} of {model} in {store} is not the one that was written")
    return _read_on(store, model, newest), hint


def _read_on(store: Store, model: str, newest: Entry | None) -> Entry | None:
    """The last entry from `newest` on, found by trying the next one until there is none."""
    while True:
        sequence = newest.sequence + 1 if newest else 1
        data = store.read_record(_key(model, sequence))
        if data is None:
            return newest
        newest = _parse(data, store, model, sequence)


def walk_back(store: Store, newest: Entry | None) -> Iterator[Entry]:
    """`newest` and the entries before it; every link is checked. Raises LedgerBroken, RecordInvalid."""
    while newest is not None:
        yield newest
        newest = _read_before(store, newest) if newest.sequence > 1 else None


def _read_before(store: Store, entry: Entry) -> Entry:
    before = read_entry(store, entry.model, entry.sequence - 1)
    if (entry.previous, entry.latest) != (before.digest, before.state):
        raise LedgerBroken(
            f"entry {entry.sequence} of {entry.model} in {store} does not follow entry {before.sequence} as it is now"
        )
    return before


def _follow(model: str, newest: Entry | None, event: Event, now: datetime) -> tuple[Entry, bytes]:
    """The entry after `newest`, and its bytes."""
    entry = Entry.model_validate(
        {
            "model": model,
            "sequence": newest.sequence + 1 if newest else 1,
            "previous": newest.digest if newest else None,
            "latest": newest.state if newest else {},
            "id": secrets.token_hex(8),
            "recorded_at": now,
            "event": event,
        }
    )
    data = (entry.model_dump_json(indent=2) + "\n").encode()
    entry._digest = hashlib.sha256(data).hexdigest()
    return entry, data


def _parse(data: bytes, store: Store, model: str, sequence: int) -> Entry:
    place = f"entry {sequence} of {model} in {store}"
    try:
        entry = Entry.model_validate_json(data)
    except ValidationError as error:
        raise RecordInvalid(f"{place}: {describe_validation(error)}") from None
    if (entry.model, entry.sequence) != (model, sequence):
        raise LedgerBroken(f"{place} is entry {entry.sequence} of {entry.model}")
    entry._digest = hashlib.sha256(data).hexdigest()
    return entry


def _subject(event: Event) -> str | None:
    """What the event is the newest word on: a channel, or collection."""
    match event:
        case Moved(channel=channel):
            return channel
        case Collected():
            return COLLECTED
    return None


def _key(model: str, sequence: int) -> str:
    return f"{_folder(model)}/{sequence:08d}.json"


def _head_key(model: str) -> str:
    return f"{_folder(model)}/head"


def _folder(model: str) -> str:
    check_model_name(model)
    return f"ledger/{model}"
