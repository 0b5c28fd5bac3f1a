"""Approvals: people's recorded decisions on one bundle and one gate report, and whether they are enough. Pure."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from registry.errors import (
    ApprovalExpired,
    ApprovalMismatch,
    ApprovalMissing,
    ApprovalRejected,
    ApproverIsRequester,
    ApproverUnknown,
    GateFailed,
    OverrideRequired,
    PolicyUnknown,
)
from registry.gate import GateRecord
from registry.manifest import SafeName, Sha256

__all__ = [
    "Approval", "ApprovalPolicy", "Decision", "Person", "approve_by_policy", "check_approval", "check_approvals",
    "decide",
]  # fmt: skip

Decision = Literal["approve", "reject"]
Person = str


class ApprovalPolicy(BaseModel):
    """Whose yes it takes to promote. Only this configuration grants anything; no environment variable does."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    approvers: tuple[str, ...] = Field(default=(), description="who may approve; empty: any person who gives a name")
    required: int = Field(default=1, ge=1, le=20, description="how many different people must approve")
    refuse_requester: bool = Field(default=False, description="whether who started the run may not approve it")
    valid_hours: float = Field(default=72, gt=0, le=8760, description="hours after which a decision no longer counts")
    automatic: SafeName | None = Field(
        default=None,
        description="name of a policy that approves what passes the gate without a person; none: people do",
    )

    @model_validator(mode="after")
    def _can_be_met(self) -> Self:
        people = {_same(name) for name in self.approvers}
        if self.approvers and len(people) < self.required:
            raise ValueError(f"required is {self.required}, but approvers names {len(people)} people")
        if "" in people:
            raise ValueError("approvers holds an empty name")
        return self


class Approval(BaseModel):
    """One decision: who, on which bundle and which gate report, why, and until when it counts.

    `override` is a yes in spite of a caution and gives its reason; `policy` is the automatic policy of the
    configuration, whose name is the approver.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    approver: Person = Field(min_length=1, max_length=256)
    bundle: Sha256
    gate: Sha256
    decision: Decision
    kind: Literal["approval", "override", "policy"] = "approval"
    reason: str = Field(default="", max_length=4096)
    decided_at: AwareDatetime
    expires_at: AwareDatetime


def decide(
    approver: Person,
    bundle: str,
    gate: GateRecord,
    decision: Decision,
    policy: ApprovalPolicy,
    *,
    now: datetime,
    reason: str = "",
    is_override: bool = False,
) -> Approval:
    """A person's decision on the bundle `bundle` (its digest) as `gate` judged it; it expires as `policy` says."""
    return Approval(
        approver=approver.strip(),
        bundle=bundle,
        gate=gate.digest,
        decision=decision,
        kind="override" if is_override else "approval",
        reason=reason.strip(),
        decided_at=now,
        expires_at=now + timedelta(hours=policy.valid_hours),
    )


def approve_by_policy(bundle: str, gate: GateRecord, policy: ApprovalPolicy, *, now: datetime) -> Approval | None:
    """The yes of the configuration's automatic policy, or None: there is none, or the gate did not plainly pass."""
    if policy.automatic is None or gate.verdict != "pass":
        return None
    by_hand = decide(policy.automatic, bundle, gate, "approve", policy, now=now, reason=f"policy {policy.automatic}")
    return by_hand.model_copy(update={"kind": "policy"})


def check_approvals(
    policy: ApprovalPolicy,
    bundle: str,
    gate: GateRecord,
    approvals: Sequence[Approval],
    *,
    requested_by: Person,
    now: datetime,
) -> tuple[Approval, ...]:
    """The approvals that let `bundle` through: N different people's, or the automatic policy's.

    One that is not in order refuses the whole, so nothing is passed on a part of the evidence. Raises GateFailed,
    ApprovalMissing and what `check_approval` raises.
    """
    if gate.verdict == "fail":
        raise GateFailed(f"bundle {bundle} fails the gate, and a fail cannot be approved: {gate.reason}")
    for approval in approvals:
        check_approval(policy, bundle, gate, approval, requested_by=requested_by, now=now)
    automatic = tuple(approval for approval in approvals if approval.kind == "policy")
    if automatic:
        return automatic[:1]
    people = {_same(approval.approver): approval for approval in approvals}
    if len(people) < policy.required:
        names = ", ".join(approval.approver for approval in people.values()) or "nobody"
        raise ApprovalMissing(f"bundle {bundle} has {len(people)} of {policy.required} approvals ({names})")
    return tuple(people.values())


def check_approval(
    policy: ApprovalPolicy, bundle: str, gate: GateRecord, approval: Approval, *, requested_by: Person, now: datetime
) -> None:
    """Refuse one decision that does not count for this bundle and this gate report, and a plain no.

    Raises ApprovalMismatch, ApprovalExpired, ApprovalRejected, ApproverUnknown, ApproverIsRequester, OverrideRequired
    or PolicyUnknown.
    """
    _check_binding(policy, bundle, gate, approval, now)
    if approval.kind == "policy":
        _check_automatic(policy, gate, approval)
    else:
        _check_person(policy, approval, requested_by)
    if approval.decision == "reject":
        raise ApprovalRejected(f"{approval.approver} rejected bundle {bundle}: {approval.reason or 'no reason given'}")
    if gate.verdict == "caution" and (approval.kind != "override" or not approval.reason.strip()):
        given = "without a reason" if approval.kind == "override" else f"is an {approval.kind}"
        raise OverrideRequired(
            f"the gate says caution ({gate.reason}): it takes an override with a reason, {approval.approver}'s {given}"
        )


def _check_binding(policy: ApprovalPolicy, bundle: str, gate: GateRecord, approval: Approval, now: datetime) -> None:
    for what, given, wanted in (("bundle", approval.bundle, bundle), ("gate report", approval.gate, gate.digest)):
        if given != wanted:
            raise ApprovalMismatch(f"{approval.approver}'s approval is of {what} {given}, not of {wanted}")
    # The configuration's limit holds too: whoever writes an approval cannot make it last for ever.
    limit = approval.decided_at + timedelta(hours=policy.valid_hours)
    expires_at = min(approval.expires_at, limit)
    if now >= expires_at:
        raise ApprovalExpired(
            f"{approval.approver}'s approval of {bundle} expired at {expires_at:%Y-%m-%d %H:%M:%S %Z}, "
            f"it is {now:%Y-%m-%d %H:%M:%S %Z}"
        )
    if approval.decided_at > now + _MAX_CLOCK_SKEW:
        raise ApprovalExpired(f"{approval.approver}'s approval of {bundle} is dated {approval.decided_at}, after {now}")


_MAX_CLOCK_SKEW = timedelta(minutes=5)


def _check_automatic(policy: ApprovalPolicy, gate: GateRecord, approval: Approval) -> None:
    if approval.approver != policy.automatic:
        configured = policy.automatic or "none"
        raise PolicyUnknown(f"policy {approval.approver!r} approves nothing here: the configured one is {configured}")
    if gate.verdict != "pass":
        raise OverrideRequired(f"the gate says {gate.verdict} ({gate.reason}): a policy approves a pass alone")


def _check_person(policy: ApprovalPolicy, approval: Approval, requested_by: Person) -> None:
    person = _same(approval.approver)
    if policy.approvers and person not in {_same(name) for name in policy.approvers}:
        allowed = ", ".join(policy.approvers)
        raise ApproverUnknown(f"{approval.approver} may not approve: the approvers are {allowed}")
    if policy.refuse_requester and person == _same(requested_by):
        raise ApproverIsRequester(f"{approval.approver} started this run and may not approve it")


def _same(name: str) -> str:
    """Two spellings of one person's name are one person."""
    return " ".join(name.split()).casefold()
