"""Waiting for people: forms of real Prefect runs, answered as the command line answers them."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect import flow, get_client
from prefect.client.schemas.objects import State
from prefect.states import Paused
from pydantic import Field

from flows.answer import Waiting, answer, find_waiting, list_waiting
from flows.approval import ApprovalForm, collect_approvals, standing_approvals
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


@contextmanager
def answered_by(people: Callable[[], None]) -> Iterator[None]:
    """Questions of the block are answered by `people`, whose own failure comes before that of the run left waiting."""
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(people)
        try:
            yield
        finally:
            answering.result()


@pytest.fixture
def paused(prefect: None, case: Case) -> Iterator[Callable[[str], Callable[[str], None]]]:
    """Pauses a run of that name as Prefect does; the parts of its question are stored by the caller, one by one."""
    runs = []
    form = ApprovalForm.with_initial_data(
        description="What to decide", bundle=Field(default=case.digest), gate=Field(default=case.gate.digest)
    )
    parts = {"schema": json.dumps(form.model_json_schema()), "description": "What to decide"}

    def pause(name: str) -> Callable[[str], None]:
        state: State[Any] = Paused(timeout_seconds=60, pause_key="approval-1")
        keys = {part: f"paused-approval-1-{part}" for part in ("schema", "description", "response")}
        state.state_details.run_input_keyset = keys
        parameters = {"model": "tiny", "requested_by": "linus"}
        with get_client(sync_client=True) as client:
            run = client.create_flow_run(wait_for_people, parameters=parameters, name=name, state=state)
        runs.append(run.id)

        def store(part: str) -> None:
            with get_client(sync_client=True) as client:
                client.create_flow_run_input(run.id, keys[part], parts[part])

        return store

    yield pause
    with get_client(sync_client=True) as client:
        for run in runs:
            client.delete_flow_run(run)


def test_question_is_read_whole_although_it_is_stored_in_parts(
    paused: Callable[[str], Callable[[str], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, tried = paused("amber-falcon"), list[float]()

    def store_one_more(seconds: float) -> None:
        tried.append(seconds)
        store(("schema", "description")[len(tried) - 1])

    monkeypatch.setattr("flows.answer.time", SimpleNamespace(sleep=store_one_more))  # others in this process sleep
    waiting = find_waiting("amber-falcon")
    assert (waiting.page, len(tried)) == ("What to decide", 2)


def test_run_that_was_killed_before_it_asked_holds_up_nobody(
    paused: Callable[[str], Callable[[str], None]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    paused("amber-falcon")("schema")
    store = paused("silver-wren")
    store("schema")
    store("description")
    monkeypatch.setattr("flows.answer._QUESTION_COMES", timedelta())  # it was paused long ago
    assert "silver-wren" in [waiting.name for waiting in list_waiting()]
    assert "amber-falcon is paused, but asks nothing: cancel it, and promote anew" in caplog.messages


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

    with answered_by(people):
        approvals = wait_in_a_run(case, policy, told)
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
        seen = set[str]()
        first = next_question(seen)
        other = {"approver": "ada", "decision": "approve", "reason": "", "override": False, "gate": first.gate}
        with get_client(sync_client=True) as client:
            unbound = client.resume_flow_run(first.id, run_input=other)
            reasons.append(getattr(unbound.details, "reason", "none"))
            client.resume_flow_run(first.id, run_input={**other, "bundle": "f" * 64})
        second = next_question(seen)
        pages.append(second.page)
        answer(settings, second, "grace", "reject", "wrong corpus", False)

    with answered_by(people), pytest.raises(ApprovalRejected, match=r"grace rejected .* wrong corpus"):
        wait_in_a_run(case, policy, [])
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
