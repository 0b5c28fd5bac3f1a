"""Garbage collection: deletes the bundles that no channel, recent promotion or recent push needs."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice

from registry.channel import CHANNELS
from registry.events import Collected, Decided, Judged
from registry.ledger import Entry, append, as_move, read_moves, walk_back
from registry.moves import settle
from registry.store import Store

__all__ = ["Collection", "collect"]

_NUM_RECENT = 100


@dataclass(frozen=True, slots=True)
class Collection:
    """What was, or with `dry_run` would be, deleted, and how many bundles stay."""

    deleted: tuple[str, ...]
    num_kept: int


def collect(
    store: Store,
    model: str,
    *,
    collected_by: str,
    keep_promotions: int = 10,
    min_age: timedelta = timedelta(days=7),
    dry_run: bool = False,
    now: datetime | None = None,
) -> Collection:
    """Delete a model's bundles that nothing needs; bundles are told apart by name and age alone.

    Kept is what a channel points at or would roll back to, what the last `keep_promotions` moves of each channel led to
    or away from, what the newest entries of the ledger judge or approve, and what is younger than `min_age`. The
    decision is an entry of the ledger before anything is deleted, so a promotion either comes first and keeps its
    bundle, or finds it collected.
    """
    now = now or datetime.now(UTC)
    found: dict[str, datetime] = {}
    doomed: tuple[str, ...] = ()

    def propose(newest: Entry | None) -> Collected | None:
        nonlocal found, doomed
        found = store.list_published(model)
        needed = _needed(store, model, newest, keep_promotions)
        old = (digest for digest, published_at in found.items() if published_at <= now - min_age)
        doomed = tuple(sorted(digest for digest in old if digest not in needed))
        return Collected(bundles=doomed, collected_by=collected_by) if doomed and not dry_run else None

    append(store, model, propose)
    if not dry_run:
        for digest in doomed:
            store.delete_bundle(model, digest)
    return Collection(doomed, len(found) - len(doomed))


def _needed(store: Store, model: str, newest: Entry | None, keep_promotions: int) -> set[str | None]:
    needed = set[str | None]()
    for channel in CHANNELS:
        record = settle(store, model, channel, newest).record
        if record is not None:
            needed |= {record.digest, record.previous}
        moves = read_moves(store, model, channel, newest) if newest else iter(())
        for entry in islice(moves, keep_promotions):
            move = as_move(entry)
            needed |= {move.bundle, move.replaced}
    for entry in islice(walk_back(store, newest), _NUM_RECENT):
        match entry.event:
            case Judged(bundle=bundle):
                needed.add(bundle)
            case Decided(approval=approval):
                needed.add(approval.bundle)
    return needed - {None}
