"""Waiting for people: forms of real Prefect runs, answered as the command line answers them."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prefect import flow

from flows.answer import Waiting, answer, find_waiting, list_waiting
from flows.approval import collect_approvals, standing_approvals
from flows.config import OptimizeConfig, PromoteConfig, Settings
from registry.approval import Approval, ApprovalPolicy, decide
from registry.errors import ApprovalExpired, ApprovalMismatch, ApprovalRejected, ApproverUnknown
from registry.events import Decided, Refused
from registry.gate import GateLimits
from registry.ledger import append_once, read_ledger
from registry.store import FolderStore
from tasks.errors import NotWaiting
from tasks.production.promotion import Case, move, open_case
from tests.published import publish_bundle

# The tables of Prefect's server use what SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

_WAIT_SECONDS = 100
# An answer that never comes ends the run after these: a test that fails, not one that hangs.
_VALID_HOURS = 0.05


@pytest.fixture
def case(tmp_path: Path) -> Case:
    store = FolderStore(tmp_path / "registry")
    digest = publish_bundle(store, tmp_path / "bundle")
    return open_case.fn(store, "tiny", digest, GateLimits(), "linus", "a test")


def settings_of(case: Case, policy: ApprovalPolicy) -> Settings:
    return Settings(
        optimize=OptimizeConfig(registry=str(case.store)),
        promote=PromoteConfig(approval=policy),
    )


def yes(case: Case, approver: str, policy: ApprovalPolicy) -> Approval:
    return decide(approver, case.digest, case.gate, "approve", policy, now=datetime.now(UTC))


def refusals(case: Case) -> list[str]:
    return [entry.event.error for entry in read_ledger(case.store, case.model) if isinstance(entry.event, Refused)]


@flow(name="promote")
def wait_for_people(model: str, requested_by: str) -> tuple[Approval, ...]:
    """The part of `promote` that waits; the case and the policy come from the test."""
    case, policy, told = _ARGUMENTS
    return collect_approvals(case, policy, None, lambda: told.append("waiting"))


_ARGUMENTS: Any = None


def wait_in_a_run(case: Case, policy: ApprovalPolicy, told: list[str]) -> tuple[Approval, ...]:
    global _ARGUMENTS  # noqa: PLW0603  a flow's parameters are JSON, and these are not
    _ARGUMENTS = (case, policy, told)
    return wait_for_people("tiny", "linus")


def next_question(seen: set[str]) -> Waiting:
    """The form that waits and was not seen before."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < deadline:
        for waiting in list_waiting():
            if waiting.page not in seen:
                seen.add(waiting.page)
                return waiting
        time.sleep(0.1)
    raise AssertionError("nothing waits")


def test_policy_that_approves_by_itself_asks_nobody(case: Case) -> None:
    (approval,) = collect_approvals(case, ApprovalPolicy(automatic="nightly-lab"), None, pytest.fail)
    assert (approval.approver, approval.kind) == ("nightly-lab", "policy")


def test_approvals_of_a_run_that_was_killed_count_until_a_move_uses_them(case: Case) -> None:
    policy = ApprovalPolicy()
    append_once(case.store, case.model, Decided(approval=yes(case, "ada", policy)))
    counted = collect_approvals(case, policy, None, pytest.fail)
    assert [approval.approver for approval in counted] == ["ada"]
    move.fn(case, counted, policy)
    assert standing_approvals(case, policy, datetime.now(UTC)) == ()


def test_approvals_before_a_no_do_not_count(case: Case) -> None:
    policy = ApprovalPolicy()
    no = yes(case, "grace", policy).model_copy(update={"decision": "reject"})
    for approval in (yes(case, "ada", policy), no, yes(case, "linus", policy)):
        append_once(case.store, case.model, Decided(approval=approval))
    standing = standing_approvals(case, ApprovalPolicy(), datetime.now(UTC))
    assert [approval.approver for approval in standing] == ["linus"]
    assert standing_approvals(case, ApprovalPolicy(refuse_requester=True), datetime.now(UTC)) == ()


def test_people_answer_until_enough_of_them_did(prefect: None, case: Case) -> None:
    policy = ApprovalPolicy(approvers=("ada", "grace"), required=2, valid_hours=_VALID_HOURS)
    settings, told, pages, errors = settings_of(case, policy), list[str](), list[str](), list[str]()

    def people() -> None:
        seen = set[str]()
        first = next_question(seen)
        pages.append(first.page)
        for wrong, kind in ((("mallory", first), ApproverUnknown), (("ada", first), None)):
            try:
                answer(settings, wrong[1], wrong[0], "approve", "", False)
            except ApproverUnknown as error:
                assert kind is ApproverUnknown
                errors.append(str(error))
        second = next_question(seen)
        pages.append(second.page)
        answer(settings, find_waiting(second.name), "grace", "approve", "checked", False)

    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(people)
        approvals = wait_in_a_run(case, policy, told)
        answering.result()
    assert [approval.approver for approval in approvals] == ["ada", "grace"]
    assert told == ["waiting"]
    assert "0 of 2 (nobody yet)" in pages[0]
    assert "1 of 2 (ada)" in pages[1]
    assert errors == ["mallory may not approve: the approvers are ada, grace"]
    assert refusals(case) == ["ApproverUnknown"]
    decided = [e.event.approval.approver for e in read_ledger(case.store, "tiny") if isinstance(e.event, Decided)]
    assert decided == ["grace", "ada"]


def test_answer_of_another_bundle_is_asked_again_and_a_no_ends_it(prefect: None, case: Case) -> None:
    policy = ApprovalPolicy(valid_hours=_VALID_HOURS)
    settings, pages, reasons = settings_of(case, policy), list[str](), list[str]()

    def people() -> None:
        from prefect import get_client

        seen = set[str]()
        first = next_question(seen)
        other = {"approver": "ada", "decision": "approve", "reason": "", "override": False, "gate": first.gate}
        with get_client(sync_client=True) as client:
            unbound = client.resume_flow_run(first.id, run_input=other)
            reasons.append(unbound.details.reason)
            client.resume_flow_run(first.id, run_input={**other, "bundle": "f" * 64})
        second = next_question(seen)
        pages.append(second.page)
        answer(settings, second, "grace", "reject", "wrong corpus", False)

    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(people)
        with pytest.raises(ApprovalRejected, match=r"grace rejected .* wrong corpus"):
            wait_in_a_run(case, policy, [])
        answering.result()
    assert f"ApprovalMismatch: ada's approval is of bundle {'f' * 12}…" in pages[0]
    assert "bundle" in reasons[0], "an answer that does not say what it is about"
    assert refusals(case) == [ApprovalMismatch.__name__]


def test_nobody_answers_in_time(prefect: None, case: Case) -> None:
    with pytest.raises(ApprovalExpired, match=r"nobody answered after the 0\.0004 hours"):
        wait_in_a_run(case, ApprovalPolicy(valid_hours=0.0004), [])
    assert refusals(case) == ["ApprovalExpired"]


def test_answer_to_a_run_that_does_not_wait_lists_those_that_do(prefect: None) -> None:
    with pytest.raises(NotWaiting, match="no promotion waits under 'amber-falcon'; waiting: none"):
        find_waiting("amber-falcon")
