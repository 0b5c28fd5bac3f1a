"""Channels: one line of moves, whoever races."""

import json
import multiprocessing
from datetime import UTC, datetime
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from pydantic import ValidationError

from registry.channel import CHANNELS, ChannelRecord, read_channel, read_channels
from registry.client import push
from registry.errors import BundleNotFound, ChannelMoved, ChannelNotFound, RecordInvalid, ReferenceInvalid
from registry.moves import move_channel
from registry.store import FolderStore

ROUNDS = 20
TIMEOUT_SECONDS = 60


@pytest.fixture
def digests(store: FolderStore, bundles: list[Path]) -> list[str]:
    return [push(bundle, store) for bundle in bundles]


def test_channel_moves_and_remembers(store: FolderStore, digests: list[str]) -> None:
    start = datetime.now(UTC)
    first = move_channel(store, "tiny", "production", digests[0], None, moved_by="ann")
    assert (first.sequence, first.previous, first.moved_by) == (1, None, "ann")
    second = move_channel(store, "tiny", "production", digests[1], digests[0], moved_by="bob")
    assert (second.sequence, second.previous, second.digest) == (2, digests[0], digests[1])
    assert start <= first.moved_at <= second.moved_at <= datetime.now(UTC)
    assert read_channel(store, "tiny", "production") == second
    assert read_channels(store, "tiny") == [second]


def test_channels_are_independent(store: FolderStore, digests: list[str]) -> None:
    records = [
        move_channel(store, "tiny", channel, digest, None, moved_by="ann")
        for channel, digest in zip(CHANNELS, digests, strict=False)
    ]
    assert read_channels(store, "tiny") == records
    assert [record.channel for record in records] == ["production", "canary"]


def test_move_refuses_what_the_caller_has_not_seen(store: FolderStore, digests: list[str]) -> None:
    with pytest.raises(ChannelMoved, match=f"was never set, expected {digests[1]}"):
        move_channel(store, "tiny", "production", digests[0], digests[1], moved_by="ann")
    move_channel(store, "tiny", "production", digests[0], None, moved_by="ann")
    for expected in (None, digests[1], digests[0][:12]):
        with pytest.raises(ChannelMoved, match=rf"points at {digests[0]} \(move 1 by ann\), expected"):
            move_channel(store, "tiny", "production", digests[2], expected, moved_by="bob")
    assert read_channel(store, "tiny", "production").sequence == 1


def test_move_to_where_it_is_keeps_the_way_back(store: FolderStore, digests: list[str]) -> None:
    move_channel(store, "tiny", "production", digests[0], None, moved_by="ann")
    record = move_channel(store, "tiny", "production", digests[1], digests[0], moved_by="ann")
    assert move_channel(store, "tiny", "production", digests[1], digests[1], moved_by="bob") == record
    assert read_channel(store, "tiny", "production").previous == digests[0]


def test_move_refuses_a_digest_the_store_lacks(store: FolderStore, digests: list[str]) -> None:
    for digest in ("0" * 64, digests[0][:12], ""):
        with pytest.raises(BundleNotFound, match=f"cannot move to {digest}"):
            move_channel(store, "tiny", "production", digest, None, moved_by="ann")
    with pytest.raises(BundleNotFound):
        move_channel(store, "other", "production", digests[0], None, moved_by="ann")
    with pytest.raises(ChannelNotFound):
        read_channel(store, "tiny", "production")


@pytest.mark.parametrize("channel", ["staging", "", "Production", "../production", "champion"])
def test_unknown_channels_are_refused_with_the_list(store: FolderStore, digests: list[str], channel: str) -> None:
    with pytest.raises(ReferenceInvalid, match="use one of production, canary"):
        move_channel(store, "tiny", channel, digests[0], None, moved_by="ann")
    with pytest.raises(ReferenceInvalid, match="use one of production, canary"):
        read_channel(store, "tiny", channel)


def test_model_that_is_no_name_is_refused(store: FolderStore) -> None:
    with pytest.raises(ReferenceInvalid, match=r"'\.\./tiny' is not a model name"):
        read_channel(store, "../tiny", "production")


@pytest.mark.parametrize("moved_by", ["", "x" * 257])
def test_move_wants_a_name(store: FolderStore, digests: list[str], moved_by: str) -> None:
    with pytest.raises(RecordInvalid, match="moved_by"):
        move_channel(store, "tiny", "production", digests[0], None, moved_by=moved_by)
    assert read_channels(store, "tiny") == []


@pytest.mark.parametrize(
    "change", [{"surprise": 1}, {"sequence": 0}, {"digest": "x"}, {"moved_at": "2026-01-01T00:00"}]
)
def test_damaged_record_is_refused(store: FolderStore, digests: list[str], change: dict[str, object]) -> None:
    move_channel(store, "tiny", "production", digests[0], None, moved_by="ann")
    path = store.root / "channels" / "tiny" / "production.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RecordInvalid, match=next(iter(change))):
        read_channel(store, "tiny", "production")
    with pytest.raises(RecordInvalid):
        move_channel(store, "tiny", "production", digests[1], digests[0], moved_by="ann")


def test_record_is_frozen_and_round_trips(store: FolderStore, digests: list[str]) -> None:
    record = move_channel(store, "tiny", "production", digests[0], None, moved_by="ann")
    assert ChannelRecord.model_validate_json(record.model_dump_json()) == record
    with pytest.raises(ValidationError):
        record.digest = digests[1]


def race(root: Path, number: int, digests: list[str], barrier: Barrier, results: Queue) -> None:
    """Both racers see the same record, then both move it: each to a digest of its own, neither to the current one."""
    store = FolderStore(root)
    for _ in range(ROUNDS):
        records = read_channels(store, "tiny")
        current = records[0].digest if records else None
        target = [digest for digest in digests if digest != current][number]
        barrier.wait(TIMEOUT_SECONDS)
        try:
            record = move_channel(store, "tiny", "production", target, current, moved_by=f"racer{number}")
            results.put(record.model_dump_json())
        except ChannelMoved:
            results.put(None)
        barrier.wait(TIMEOUT_SECONDS)


def test_racing_processes_move_a_channel_in_one_line(store: FolderStore, digests: list[str]) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    racers = [context.Process(target=race, args=(store.root, number, digests, barrier, results)) for number in range(2)]
    for racer in racers:
        racer.start()
    outcomes = [results.get(timeout=TIMEOUT_SECONDS) for _ in range(2 * ROUNDS)]
    for racer in racers:
        racer.join(TIMEOUT_SECONDS)
        assert racer.exitcode == 0
    moves = sorted((ChannelRecord.model_validate_json(o) for o in outcomes if o), key=lambda r: r.sequence)
    assert outcomes.count(None) == ROUNDS
    assert [move.sequence for move in moves] == list(range(1, ROUNDS + 1))
    assert [move.previous for move in moves] == [None, *(move.digest for move in moves[:-1])]
    assert read_channel(store, "tiny", "production") == moves[-1]
