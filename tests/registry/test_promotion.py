"""Promotion: what it takes, what is recorded, and what is left when the promoter dies anywhere."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from registry.approval import ApprovalPolicy, decide
from registry.channel import read_channel
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
from registry.gate import Check, GateRecord, Measurement, judge
from registry.ledger import as_move, read_ledger, read_moves, verify_ledger
from registry.promotion import promote, rollback, status

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
