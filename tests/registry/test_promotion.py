"""Promotion: what it takes, what is recorded, and what is left when the promoter dies anywhere."""

import multiprocessing
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from registry.approval import ApprovalPolicy, decide
from registry.channel import read_channel, read_channels
from registry.client import push, verify_stored
from registry.errors import (
    ApprovalExpired,
    ApprovalMissing,
    BundleNotFound,
    ChannelMoved,
    ChannelNotFound,
    GateFailed,
    RollbackRefused,
)
from registry.folder_store import FolderStore
from registry.fsck import check_registry
from registry.gate import Check, GateRecord, Measurement, judge
from registry.ledger import as_move, read_ledger, read_moves, verify_ledger
from registry.promotion import promote, rollback, status
from registry.store import open_store

ROUNDS = 20
TIMEOUT_SECONDS = 120
NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)
POLICY = ApprovalPolicy(approvers=("ann", "bob"))
CHECKS = (Check(metric="cosine_mean", kind="min", limit=0.99, caution_limit=0.98),)


def gate_of(value: float) -> GateRecord:
    return judge({"cosine_mean": Measurement(value, value, value)}, CHECKS)


PASS, CAUTION, FAIL = gate_of(0.995), gate_of(0.985), gate_of(0.9)


@pytest.fixture
def digests(store: FolderStore, bundles: list[Path]) -> list[str]:
    return [push(bundle, store) for bundle in bundles]


def move(store: Any, digest: str, **options: Any) -> Any:
    """Promote with ann's approval of a passing gate."""
    approvals = [decide("ann", digest, PASS, "approve", POLICY, now=NOW)]
    options = {"requested_by": "carl", "now": NOW + timedelta(hours=1)} | options
    return promote(store, "tiny", digest, PASS, approvals, POLICY, **options)


def kinds(store: Any) -> list[str]:
    return [entry.event.kind for entry in read_ledger(store, "tiny")][::-1]


class Killed(BaseException):
    """What stands for SIGKILL between two operations of the store."""


class MortalStore:
    """A store whose user dies after (or just before) its n-th write."""

    def __init__(self, store: FolderStore, num_operations: int) -> None:
        self._store, self._left = store, num_operations

    def __str__(self) -> str:
        return str(self._store)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operation = getattr(self._store, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if self._left == 0:
                raise Killed
            self._left -= 1
            return operation(*arguments, **options)

        return call


def test_promotion_moves_the_channel_and_tells_the_story(store: FolderStore, digests: list[str]) -> None:
    entry = move(store, digests[0], reason="faster")
    record = read_channel(store, "tiny", "production")
    assert (record.digest, record.previous, record.sequence, record.moved_by) == (digests[0], None, 1, "carl")
    assert kinds(store) == ["gate", "approval", "move"]
    event = as_move(entry)
    assert (event.gate, event.approvals[0].approver, event.reason) == (PASS.digest, "ann", "faster")
    assert verify_ledger(store, "tiny") == 3


@pytest.mark.parametrize(
    ("gate", "error"), [(FAIL, GateFailed), (judge({}, CHECKS), GateFailed), (gate_of(float("nan")), GateFailed)]
)
def test_failed_gate_is_recorded_and_refused(
    store: FolderStore, digests: list[str], gate: GateRecord, error: type[Exception]
) -> None:
    approvals = [decide("ann", digests[0], gate, "approve", POLICY, now=NOW, reason="please", is_override=True)]
    with pytest.raises(error):
        promote(store, "tiny", digests[0], gate, approvals, POLICY, requested_by="carl", now=NOW)
    assert kinds(store) == ["gate", "approval", "refusal"]
    with pytest.raises(ChannelNotFound):
        read_channel(store, "tiny", "production")


def test_refusals_name_the_reason(store: FolderStore, digests: list[str]) -> None:
    with pytest.raises(ApprovalMissing, match=r"0 of 1 approvals \(nobody\)"):
        promote(store, "tiny", digests[0], PASS, [], POLICY, requested_by="carl", now=NOW)
    with pytest.raises(ApprovalExpired, match="expired at 2026-11-04 12:00:00 UTC"):
        move(store, digests[0], now=NOW + timedelta(hours=72))
    with pytest.raises(BundleNotFound):
        move(store, "0" * 64)
    refusals = [entry.event for entry in read_ledger(store, "tiny") if entry.event.kind == "refusal"]
    assert [event.error for event in refusals] == ["BundleNotFound", "ApprovalExpired", "ApprovalMissing"]
    assert verify_ledger(store, "tiny") == len(kinds(store))


def test_promotion_expects_what_the_gate_compared_with(store: FolderStore, digests: list[str]) -> None:
    move(store, digests[0])
    with pytest.raises(ChannelMoved, match="expected that it was never set"):
        move(store, digests[1], expected=None)
    assert as_move(move(store, digests[1], expected=digests[0])).replaced == digests[0]


def test_promoter_killed_anywhere_leaves_a_whole_bundle_and_one_move(store: FolderStore, digests: list[str]) -> None:
    move(store, digests[0])
    for num_operations in range(1_000):
        try:
            entry = move(MortalStore(store, num_operations), digests[1])
            break
        except Killed:
            pointed = read_channel(store, "tiny", "production").digest
            assert pointed in digests[:2]
            assert verify_stored(store, "tiny", pointed)
            again = move(store, digests[1])
            moves = list(read_moves(store, "tiny", "production"))
            assert as_move(moves[0]).bundle == digests[1]
            assert again == moves[0]
            assert read_channel(store, "tiny", "production").digest == digests[1]
            assert len(moves) == 2 * num_operations + 2
            verify_ledger(store, "tiny")
            move(store, digests[0])
    assert num_operations > 15
    assert as_move(entry).bundle == digests[1]


def test_rollback_killed_anywhere_is_done_once(store: FolderStore, digests: list[str]) -> None:
    move(store, digests[0])
    for num_operations in range(1_000):
        move(store, digests[1])
        before = len(list(read_moves(store, "tiny", "production")))
        try:
            rollback(MortalStore(store, num_operations), "tiny", asked_by="eve", expected=digests[1])
            break
        except Killed:
            entry = rollback(store, "tiny", asked_by="eve", expected=digests[1])
            assert (as_move(entry).kind, as_move(entry).bundle) == ("rollback", digests[0])
            assert read_channel(store, "tiny", "production").digest == digests[0]
            assert len(list(read_moves(store, "tiny", "production"))) == before + 1
    assert num_operations > 15
    verify_ledger(store, "tiny")


def test_first_promotion_undone_and_killed_anywhere_leaves_no_channel(store: FolderStore, digests: list[str]) -> None:
    for num_operations in range(1_000):
        move(store, digests[0])
        before = len(list(read_moves(store, "tiny", "production")))
        undo = {"asked_by": "eve", "expected": digests[0], "may_empty": True}
        try:
            rollback(MortalStore(store, num_operations), "tiny", **undo)
            break
        except Killed:
            entry = rollback(store, "tiny", **undo)
            assert (as_move(entry).kind, as_move(entry).bundle) == ("rollback", None)
            assert status(store, "tiny") is None
            assert len(list(read_moves(store, "tiny", "production"))) == before + 1
    assert num_operations > 10
    assert list(check_registry(store)) == []


def race(place: str, number: int, digests: list[str], barrier: Barrier, results: Queue) -> None:
    """Both promoters judge against the same champion, then both promote: each a bundle of its own."""
    store = open_store(place)
    for _ in range(ROUNDS):
        records = read_channels(store, "tiny")
        current = records[0].digest if records else None
        target = [digest for digest in digests if digest != current][number]
        barrier.wait(TIMEOUT_SECONDS)
        try:
            entry = move(store, target, expected=current, requested_by=f"promoter{number}")
            results.put((entry.sequence, as_move(entry).moved_by))
        except ChannelMoved:
            results.put(None)
        barrier.wait(TIMEOUT_SECONDS)


@pytest.mark.parametrize("place", ["folder", pytest.param("s3_place", marks=pytest.mark.e2e)])
def test_racing_promoters_move_a_channel_in_one_line(
    place: str, bundles: list[Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    place = str(tmp_path / "registry") if place == "folder" else request.getfixturevalue(place)
    store = open_store(place)
    digests = [push(bundle, store) for bundle in bundles]
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    racers = [context.Process(target=race, args=(place, number, digests, barrier, results)) for number in range(2)]
    for racer in racers:
        racer.start()
    outcomes = [results.get(timeout=TIMEOUT_SECONDS) for _ in range(2 * ROUNDS)]
    for racer in racers:
        racer.join(TIMEOUT_SECONDS)
        assert racer.exitcode == 0
    moves = list(read_moves(store, "tiny", "production"))[::-1]
    assert outcomes.count(None) == ROUNDS
    assert sorted(outcome for outcome in outcomes if outcome) == [(m.sequence, as_move(m).moved_by) for m in moves]
    assert [as_move(entry).number for entry in moves] == list(range(1, ROUNDS + 1))
    assert list(check_registry(store)) == []


def test_rollback_leads_back_step_by_step(store: FolderStore, digests: list[str]) -> None:
    with pytest.raises(RollbackRefused, match="never set"):
        rollback(store, "tiny", asked_by="eve")
    for digest in digests:
        move(store, digest)
    assert as_move(rollback(store, "tiny", asked_by="eve", reason="slow")).bundle == digests[1]
    assert as_move(rollback(store, "tiny", asked_by="eve")).bundle == digests[0]
    with pytest.raises(RollbackRefused, match="replaced nothing"):
        rollback(store, "tiny", asked_by="eve")
    assert as_move(rollback(store, "tiny", digests[2][:12], asked_by="eve")).bundle == digests[2]
    state = status(store, "tiny")
    assert state is not None
    assert state.move is not None
    assert (state.channel.digest, state.move.kind, state.is_finished) == (digests[2], "rollback", True)
    verify_ledger(store, "tiny")
