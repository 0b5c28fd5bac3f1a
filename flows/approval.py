"""The approval: a typed form on which a `promote` run waits, in Prefect's pages, for a command or an HTTP call."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Literal
from uuid import UUID

from prefect import get_client, pause_flow_run, suspend_flow_run
from prefect.artifacts import create_markdown_artifact
from prefect.exceptions import FlowPauseTimeout
from prefect.input import RunInput
from prefect.runtime import deployment, flow_run
from pydantic import ConfigDict, Field

from registry.approval import Approval, ApprovalPolicy, approve_by_policy, check_approval, check_approvals, decide
from registry.errors import ApprovalExpired, ApprovalMissing, ApprovalRejected, PromotionRefused
from registry.events import Decided, Moved, Refused
from registry.ledger import append_once, read_ledger
from tasks.production.case_page import describe_case
from tasks.production.promotion import Case

_POLL_SECONDS = 1
# A suspended run can be answered this much longer than the answer counts, so that one too late is on record too.
_GRACE = timedelta(days=1)
_DIGEST = "^[0-9a-f]{64}$"


class ApprovalForm(RunInput):
    """What an approver decides. Leave `bundle` and `gate` as they are: they say what is decided on."""

    # Prefilled, and asked for all the same: who answers by HTTP has to say what the answer is about.
    model_config = ConfigDict(json_schema_extra={"required": ["approver", "decision", "bundle", "gate"]})

    approver: str = Field(title="Your name", min_length=1, max_length=256)
    decision: Literal["approve", "reject"] = Field(title="Decision")
    reason: str = Field(default="", title="Reason", max_length=4096)
    override: bool = Field(default=False, title="Approve in spite of a caution (needs a reason)")
    bundle: str = Field(pattern=_DIGEST)
    gate: str = Field(pattern=_DIGEST)

    def to_approval(self, case: Case, policy: ApprovalPolicy, decided_at: datetime) -> Approval:
        """The decision as the registry records it."""
        approval = decide(
            self.approver,
            self.bundle,
            case.gate,
            self.decision,
            policy,
            now=decided_at,
            reason=self.reason,
            is_override=self.override,
        )
        return approval.model_copy(update={"gate": self.gate})


def collect_approvals(
    case: Case, policy: ApprovalPolicy, report_url: str | None, on_wait: Callable[[], object]
) -> tuple[Approval, ...]:
    """Wait until the policy is content; `on_wait` is called once, before the first question.

    What people decided on this very bundle and gate report in a run that was killed counts, until it is used by a move
    or somebody says no. An answer that does not count is recorded and asked for again, with the reason above the form.
    Raises ApprovalRejected, ApprovalExpired.
    """
    now = datetime.now(UTC)
    if automatic := approve_by_policy(case.digest, case.gate, policy, now=now):
        return (automatic,)
    counted, attempt, note = standing_approvals(case, policy, now), 1, ""
    while not _is_enough(case, policy, counted):
        page = describe_case(case, policy, counted, note, report_url)
        if attempt == 1 and not _was_asked(f"approval-{attempt}"):  # else it was suspended, and starts from the top
            create_markdown_artifact(page, key="promote-case", description="What an approver decides on")
            on_wait()
        form, decided_at = _ask(case, policy, f"approval-{attempt}", page)
        approval = form.to_approval(case, policy, decided_at)
        try:
            # By the time of the decision: a suspended run is run again from the top and must come to the same.
            check_approval(policy, case.digest, case.gate, approval, requested_by=case.requested_by, now=decided_at)
        except ApprovalRejected:
            append_once(case.store, case.model, Decided(approval=approval))
            raise
        except PromotionRefused as error:
            record_refusal(case, approval.approver, error)
            note = f"{type(error).__name__}: {error}"
        else:
            append_once(case.store, case.model, Decided(approval=approval))
            counted, note = (*counted, approval), ""
        attempt += 1
    return counted


def record_refusal(case: Case, asked_by: str, error: PromotionRefused) -> None:
    """Write a decision that does not count into the ledger, once."""
    refused = Refused(
        action="promote", bundle=case.digest, error=type(error).__name__, reason=str(error), asked_by=asked_by
    )
    append_once(case.store, case.model, refused)


def standing_approvals(case: Case, policy: ApprovalPolicy, now: datetime) -> tuple[Approval, ...]:
    """Decisions in the ledger that count for this case: not used by a move yet, and made since the last no."""
    found: list[Approval] = []
    oldest = now - timedelta(hours=policy.valid_hours)
    for entry in read_ledger(case.store, case.model):
        if entry.recorded_at < oldest or (isinstance(entry.event, Moved) and entry.event.bundle == case.digest):
            break
        if isinstance(entry.event, Decided) and entry.event.approval.bundle == case.digest:
            approval = entry.event.approval
            if approval.decision == "reject":
                break
            try:
                check_approval(policy, case.digest, case.gate, approval, requested_by=case.requested_by, now=now)
            except PromotionRefused:
                continue
            found.insert(0, approval)
    return tuple(found)


def _is_enough(case: Case, policy: ApprovalPolicy, counted: tuple[Approval, ...]) -> bool:
    try:
        check_approvals(policy, case.digest, case.gate, counted, requested_by=case.requested_by, now=datetime.now(UTC))
    except ApprovalMissing:
        return False
    return True


def _ask(case: Case, policy: ApprovalPolicy, key: str, page: str) -> tuple[ApprovalForm, datetime]:
    """The answer to one question and when it was given.

    A deployment's run is suspended: its process ends, and the run starts again from the top when it is answered. A run
    of the command line holds its process and waits. Raises ApprovalExpired, on record, for no answer in time.
    """
    form = ApprovalForm.with_initial_data(
        description=page,
        bundle=Field(default=case.digest, title="Bundle (leave as it is)", pattern=_DIGEST),
        gate=Field(default=case.gate.digest, title="Gate report (leave as it is)", pattern=_DIGEST),
    )
    valid = timedelta(hours=policy.valid_hours)
    is_deployed = deployment.id is not None
    try:
        if is_deployed:
            wait = int((valid + _GRACE).total_seconds())
            answer = suspend_flow_run(wait_for_input=form, key=key, timeout=wait)
        else:
            answer = pause_flow_run(
                wait_for_input=form, key=key, timeout=int(valid.total_seconds()), poll_interval=_POLL_SECONDS
            )
    except FlowPauseTimeout:
        raise _expired(case, policy, "nobody answered") from None
    asked_at, decided_at = _asked_and_answered(key)
    if decided_at > asked_at + valid:
        raise _expired(case, policy, f"{answer.approver} answered")
    return answer, decided_at


def _expired(case: Case, policy: ApprovalPolicy, what: str) -> ApprovalExpired:
    error = too_late(policy, case.digest, what)
    record_refusal(case, case.requested_by, error)
    return error


def too_late(policy: ApprovalPolicy, digest: str, what: str) -> ApprovalExpired:
    """What ends a promotion that was answered too late, or never."""
    return ApprovalExpired(
        f"{what} after the {policy.valid_hours:g} hours in which bundle {digest} could be approved "
        "(promote.approval.valid_hours)"
    )


def _asked_and_answered(key: str) -> tuple[datetime, datetime]:
    """When the server stored the form, and when its answer."""
    created = _stored_at(key)
    return created["schema"], created["response"]


def _was_asked(key: str) -> bool:
    """Whether this run has asked that question before."""
    return "schema" in _stored_at(key)


def _stored_at(key: str) -> dict[str, datetime]:
    """When the server stored the parts of a question: its schema, description and response."""
    prefix = f"{'paused' if deployment.id is None else 'suspended'}-{key}-"
    with get_client(sync_client=True) as client:
        stored = client.filter_flow_run_input(UUID(str(flow_run.id)), key_prefix=prefix, limit=10, exclude_keys=set())
    return {entry.key.removeprefix(prefix): entry.created for entry in stored if entry.created is not None}
