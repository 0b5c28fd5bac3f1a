"""Answering a promotion that waits, from the command line: what waits, what is asked, and a yes or a no."""

import json
import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from prefect import get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterState
from prefect.client.schemas.filters import FlowRunFilterStateType as StateTypes
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.states import Failed

from flows.approval import too_late
from flows.config import Settings, open_registry
from registry.approval import Decision, check_approval, decide
from registry.errors import ApprovalRejected, PromotionRefused
from registry.events import Judged, Refused
from registry.gate import GateRecord
from registry.ledger import append_once, read_ledger
from registry.store import Store
from tasks.errors import NotWaiting
from tasks.production.notify import notify_refused

_log = logging.getLogger(__name__)
# Within which a run that is paused has stored its question, and how often it is looked for.
_QUESTION_COMES, _QUESTION_TRIES = timedelta(seconds=5), 20


@dataclass(frozen=True, slots=True)
class Waiting:
    """A promotion that waits: its run, what it asks, and the page that an approver reads."""

    id: UUID
    name: str
    model: str
    requested_by: str
    bundle: str
    gate: str
    page: str


def list_waiting() -> list[Waiting]:
    """Every promotion that waits for an answer, oldest first."""
    with get_client(sync_client=True) as client:
        return [waiting for run in _paused_runs(client) if (waiting := _read_waiting(client, run))]


def find_waiting(run: str) -> Waiting:
    """The promotion whose run has this name or id. Raises NotWaiting, which lists those that wait."""
    waiting = list_waiting()
    for one in waiting:
        if run in (one.name, str(one.id)):
            return one
    raise NotWaiting(f"no promotion waits under {run!r}; waiting: {', '.join(one.name for one in waiting) or 'none'}")


def answer(
    settings: Settings, waiting: Waiting, approver: str, decision: Decision, reason: str, is_override: bool
) -> None:
    """Hand a decision on exactly what `waiting` asks to its run.

    One that the configuration here would not count is refused and recorded at once, and the run waits on; the run
    judges it by its own configuration all the same. Raises PromotionRefused, NotWaiting.
    """
    store = open_registry(settings)
    gate = _find_gate(store, waiting)
    if gate is not None:
        _refuse_what_cannot_count(store, settings, waiting, gate, approver, decision, reason, is_override)
    form = {
        "approver": approver,
        "decision": decision,
        "reason": reason,
        "override": is_override,
        "bundle": waiting.bundle,
        "gate": waiting.gate,
    }
    with get_client(sync_client=True) as client:
        result = client.resume_flow_run(waiting.id, run_input=form)
    if result.status != SetStateStatus.ACCEPT:
        raise NotWaiting(f"{waiting.name} did not take the answer: {getattr(result.details, 'reason', result.status)}")


def end_unanswered(settings: Settings, now: datetime) -> list[Waiting]:
    """End every suspended promotion that nobody answered in time, on record: its own process is gone and cannot."""
    policy, store, ended = settings.promote.approval, open_registry(settings), list[Waiting]()
    asked_before = now - timedelta(hours=policy.valid_hours)
    with get_client(sync_client=True) as client:
        for run in _paused_runs(client):
            state = run.state
            if state is None or state.name != "Suspended" or state.timestamp > asked_before:
                continue
            waiting = _read_waiting(client, run)
            if waiting is None:
                continue
            error = too_late(policy, waiting.bundle, "nobody answered")
            _record(store, waiting, error, waiting.requested_by)
            client.set_flow_run_state(run.id, Failed(message=f"{type(error).__name__}: {error}"))
            ended.append(waiting)
            notify_refused(
                settings.promote.webhooks, waiting.model, waiting.bundle, waiting.requested_by, reason=str(error)
            )
    return ended


def _refuse_what_cannot_count(
    store: Store,
    settings: Settings,
    waiting: Waiting,
    gate: GateRecord,
    approver: str,
    decision: Decision,
    reason: str,
    is_override: bool,
) -> None:
    policy, now = settings.promote.approval, datetime.now(UTC)
    approval = decide(approver, waiting.bundle, gate, decision, policy, now=now, reason=reason, is_override=is_override)
    try:
        check_approval(policy, waiting.bundle, gate, approval, requested_by=waiting.requested_by, now=now)
    except ApprovalRejected:
        return  # a plain no, which the run is to hear
    except PromotionRefused as error:
        _record(store, waiting, error, approver)
        raise


def _record(store: Store, waiting: Waiting, error: PromotionRefused, asked_by: str) -> None:
    name, reason = type(error).__name__, str(error)
    refused = Refused(action="promote", bundle=waiting.bundle, error=name, reason=reason, asked_by=asked_by)
    append_once(store, waiting.model, refused)


def _find_gate(store: Store, waiting: Waiting) -> GateRecord | None:
    """The gate report that is asked about, from the ledger; None where this registry is not the run's."""
    for entry in read_ledger(store, waiting.model):
        if isinstance(entry.event, Judged) and entry.event.report.digest == waiting.gate:
            return entry.event.report
    return None


def _paused_runs(client: SyncPrefectClient) -> list[FlowRun]:
    return client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=["promote"])),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=StateTypes(any_=[StateType.PAUSED]))),
    )


def _read_waiting(client: SyncPrefectClient, run: FlowRun) -> Waiting | None:
    """What a paused run asks; None for one that asks nothing: it was paused by hand, or its process was killed."""
    question = _read_question(client, run, run.state) if run.state else None
    if question is None:
        return None
    form, page = question
    defaults = {name: field.get("default") for name, field in form["properties"].items()}
    return Waiting(
        id=run.id,
        name=run.name,
        model=run.parameters["model"],
        requested_by=run.parameters["requested_by"],
        bundle=defaults["bundle"],
        gate=defaults["gate"],
        page=page,
    )


def _read_question(client: SyncPrefectClient, run: FlowRun, state: State[Any]) -> tuple[dict[str, Any], str] | None:
    """The form's schema and the page above it, which Prefect stores one after the other once it has paused the run.

    None for a run that was paused by hand and, with a warning, where they do not come: a process that ends in between
    leaves a run that asks nothing, and the promotions beside it are to be answered all the same.
    """
    keys = state.state_details.run_input_keyset
    if keys is None:
        return None
    prefix, age = keys["schema"].removesuffix("schema"), datetime.now(UTC) - state.timestamp
    for tries_left in reversed(range(1 if age > _QUESTION_COMES else _QUESTION_TRIES)):
        parts = client.filter_flow_run_input(run.id, key_prefix=prefix, limit=10, exclude_keys=set())
        stored = {part.key: part.value for part in parts}
        if keys["schema"] in stored and keys["description"] in stored:
            return json.loads(stored[keys["schema"]]), stored[keys["description"]]
        if tries_left:
            time.sleep(_QUESTION_COMES.total_seconds() / _QUESTION_TRIES)
    _log.warning("%s is paused, but asks nothing: cancel it, and promote anew", run.name)
    return None
