"""The ledger: one chain whoever races, read at little cost, and no way to change it unseen."""

from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from registry.collect import collect
from registry.errors import LedgerBroken, RecordInvalid
from registry.events import Judged, Moved, Refused
from registry.ledger import append, append_once, read_entry, read_ledger, read_newest, verify_ledger
from registry.moves import move_channel
from registry.promotion import status
from registry.store import FolderStore
from tests.registry.test_promotion import PASS


class CountingStore:
    """Counts a store's operations by name."""

    def __init__(self, store: FolderStore) -> None:
        self._store, self.calls = store, Counter[str]()

    def __str__(self) -> str:
        return str(self._store)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        self.calls[name] += 1
        return getattr(self._store, name)


def refused(reason: str) -> Refused:
    return Refused(action="promote", bundle="", error="GateFailed", reason=reason, asked_by="ann")


@pytest.fixture
def ledger(store: FolderStore) -> FolderStore:
    """A store with five entries of the model `tiny`."""
    for number in range(5):
        append(store, "tiny", refused(str(number)))
    return store


def entry_path(store: FolderStore, sequence: int) -> Path:
    return store.root / "ledger" / "tiny" / f"{sequence:08d}.json"


def test_entries_come_newest_first_and_follow_each_other(ledger: FolderStore) -> None:
    entries = list(read_ledger(ledger, "tiny"))
    assert [entry.sequence for entry in entries] == [5, 4, 3, 2, 1]
    assert [entry.previous for entry in entries] == [*(entry.digest for entry in entries[1:]), None]
    assert [entry.sequence for entry in read_ledger(ledger, "tiny", limit=2)] == [5, 4]
    assert list(read_ledger(ledger, "other")) == []
    assert (verify_ledger(ledger, "tiny"), verify_ledger(ledger, "other")) == (5, 0)


def test_same_event_is_written_once_by_a_step_that_runs_again(store: FolderStore) -> None:
    for _ in range(3):
        append_once(store, "tiny", Judged(bundle="0" * 64, report=PASS))
    append_once(store, "tiny", Judged(bundle="1" * 64, report=PASS))
    assert verify_ledger(store, "tiny") == 2


def test_writer_who_loses_the_race_decides_again(store: FolderStore) -> None:
    seen: list[int] = []

    def propose(newest: Any) -> Refused | None:
        seen.append(newest.sequence if newest else 0)
        if len(seen) < 3:
            append(store, "tiny", refused("overtaken"))
        return refused("mine") if len(seen) < 4 else None

    entry = append(store, "tiny", propose)
    assert entry is not None
    assert (seen, entry.sequence) == ([0, 1, 2], 3)
    assert verify_ledger(store, "tiny") == 3


def test_hint_may_lag_behind(ledger: FolderStore) -> None:
    path = ledger.root / "ledger" / "tiny" / "head"
    for hint in (f"3 {read_entry(ledger, 'tiny', 3).digest}", None):
        path.write_text(hint) if hint else path.unlink()
        newest = read_newest(ledger, "tiny")
        assert newest is not None
        assert newest.sequence == 5
    append(ledger, "tiny", refused("more"))
    assert path.read_text().startswith("6 ")
    path.write_text("x")
    with pytest.raises(LedgerBroken, match="names no entry"):
        read_newest(ledger, "tiny")


@pytest.mark.parametrize("sequence", range(1, 6))
def test_any_changed_byte_is_noticed(ledger: FolderStore, sequence: int) -> None:
    path = entry_path(ledger, sequence)
    data = path.read_text()
    path.write_text(data.replace('"reason": "', '"reason": "x'))
    with pytest.raises(LedgerBroken, match=f"entry {sequence} .*(as it is now|not the one that was written)"):
        verify_ledger(ledger, "tiny")
    path.write_text(data.replace("{", "[", 1))
    with pytest.raises(RecordInvalid, match=f"entry {sequence} of tiny"):
        verify_ledger(ledger, "tiny")
    path.unlink()
    with pytest.raises(LedgerBroken, match=f"entry {sequence} of tiny is missing"):
        verify_ledger(ledger, "tiny")


def test_exchanged_entries_are_noticed(ledger: FolderStore) -> None:
    first, second = entry_path(ledger, 1).read_bytes(), entry_path(ledger, 2).read_bytes()
    entry_path(ledger, 1).write_bytes(second)
    entry_path(ledger, 2).write_bytes(first)
    with pytest.raises(LedgerBroken, match="is entry"):
        verify_ledger(ledger, "tiny")


def test_moves_that_form_no_line_are_noticed(store: FolderStore) -> None:
    first = Moved(kind="set", channel="production", bundle="1" * 64, replaced=None, number=1, moved_by="ann")
    append(store, "tiny", first)
    append(store, "tiny", first.model_copy(update={"bundle": "2" * 64, "number": 2, "replaced": "3" * 64}))
    with pytest.raises(LedgerBroken, match=f"is followed by move 2 from {'3' * 64}"):
        verify_ledger(store, "tiny")


def test_move_without_its_gate_report_is_noticed(store: FolderStore) -> None:
    move = Moved(
        kind="move", channel="production", bundle="1" * 64, replaced=None, number=1, moved_by="ann", gate="2" * 64
    )
    append(store, "tiny", move)
    with pytest.raises(LedgerBroken, match=f"names gate report {'2' * 64}, which was not recorded"):
        verify_ledger(store, "tiny")


def test_thousand_versions_cost_status_log_and_gc_little(store: FolderStore) -> None:
    model = store.root / "models" / "tiny"
    digests = [f"{number:064x}" for number in range(1_000)]
    for digest in digests:
        (model / digest).mkdir(parents=True)
    for number, digest in enumerate(digests[:4]):
        move_channel(store, "tiny", "production", digest, digests[number - 1] if number else None, moved_by="ann")
    for digest in digests[4:34]:
        append(store, "tiny", Judged(bundle=digest, report=PASS))
    counted: Any = CountingStore(store)
    state = status(counted, "tiny")
    assert state is not None
    assert (state.channel.digest, state.channel.previous) == (digests[3], digests[2])
    assert counted.calls == {"read_record": counted.calls["read_record"]}
    assert counted.calls["read_record"] <= 12
    counted.calls.clear()
    assert len(list(read_ledger(counted, "tiny", limit=20))) == 20
    assert counted.calls == {"read_record": 22}
    counted.calls.clear()
    done = collect(counted, "tiny", collected_by="ann", dry_run=True, min_age=timedelta(0))
    assert (len(done.deleted), done.num_kept) == (966, 34)
    assert counted.calls["list_published"] == 1
    assert counted.calls.keys() == {"list_published", "read_record"}
    assert counted.calls["read_record"] <= 60
