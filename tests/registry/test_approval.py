"""Approvals: what counts, what does not, and the reason in words."""

from datetime import datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from registry.approval import Approval, ApprovalPolicy, approve_by_policy, check_approvals, decide
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
    PromotionRefused,
)
from registry.gate import GateRecord
from tests.registry.test_promotion import CAUTION, FAIL, NOW, PASS

BUNDLE = "1" * 64
LISTED = ApprovalPolicy(approvers=("ann", "bob"), refuse_requester=True)
TWO = ApprovalPolicy(approvers=("ann", "bob", "cy"), required=2)


def give(approver: str = "ann", gate: GateRecord = PASS, decision: Any = "approve", **options: Any) -> Approval:
    return decide(approver, BUNDLE, gate, decision, LISTED, now=NOW, **options)


def check(*approvals: Approval, policy: ApprovalPolicy = LISTED, gate: GateRecord = PASS, **options: Any) -> int:
    options = {"requested_by": "carl", "now": NOW + timedelta(hours=1)} | options
    return len(check_approvals(policy, BUNDLE, gate, approvals, **options))


def test_one_listed_person_is_enough_and_two_where_two_are_asked_for() -> None:
    assert check(give()) == 1
    assert check(give("Ann "), give("bob"), policy=TWO) == 2
    with pytest.raises(ApprovalMissing, match=r"1 of 2 approvals \(ANN\)"):
        check(give("ann"), give("ANN"), policy=TWO)
    assert check(give("anybody"), policy=ApprovalPolicy()) == 1


@pytest.mark.parametrize(
    ("approval", "options", "error", "message"),
    [
        (give("eve"), {}, ApproverUnknown, "eve may not approve: the approvers are ann, bob"),
        (give(), {"requested_by": "Ann"}, ApproverIsRequester, "ann started this run"),
        (give(decision="reject", reason="slow"), {}, ApprovalRejected, "ann rejected .*: slow"),
        (give(), {"now": NOW + timedelta(hours=72)}, ApprovalExpired, "expired at 2026-11-04 12:00:00 UTC"),
        (give(), {"now": NOW - timedelta(hours=1)}, ApprovalExpired, "is dated"),
        (give().model_copy(update={"expires_at": NOW + timedelta(days=99)}), {"now": NOW + timedelta(days=4)},
         ApprovalExpired, "expired at 2026-11-04"),
        (give().model_copy(update={"bundle": "2" * 64}), {}, ApprovalMismatch, f"of bundle {'2' * 64}, not"),
        (give(gate=CAUTION), {}, ApprovalMismatch, "of gate report"),
        (give(gate=CAUTION), {"gate": CAUTION}, OverrideRequired, "ann's is an approval"),
        (give(gate=CAUTION, is_override=True), {"gate": CAUTION}, OverrideRequired, "ann's without a reason"),
        (give(gate=FAIL, is_override=True, reason="x"), {"gate": FAIL}, GateFailed, "cannot be approved"),
    ],
)  # fmt: skip
def test_what_does_not_count_is_refused_with_its_reason(
    approval: Approval, options: dict[str, Any], error: type[PromotionRefused], message: str
) -> None:
    with pytest.raises(error, match=message):
        check(approval, **options)


def test_one_bad_approval_spoils_a_good_one() -> None:
    with pytest.raises(ApproverUnknown):
        check(give("ann"), give("eve"))


def test_caution_is_overridden_with_a_reason() -> None:
    assert check(give(gate=CAUTION, is_override=True, reason="holiday traffic"), gate=CAUTION) == 1


def test_policy_approves_what_passes_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = ApprovalPolicy(approvers=("ann", "bob"), required=2, automatic="nightly")
    automatic = approve_by_policy(BUNDLE, PASS, policy, now=NOW)
    assert automatic is not None
    assert (automatic.kind, automatic.approver, automatic.reason) == ("policy", "nightly", "policy nightly")
    assert check(automatic, policy=policy) == 1
    assert approve_by_policy(BUNDLE, CAUTION, policy, now=NOW) is None
    assert approve_by_policy(BUNDLE, PASS, LISTED, now=NOW) is None
    with pytest.raises(PolicyUnknown, match="'nightly' approves nothing here: the configured one is none"):
        check(automatic)
    forged = automatic.model_copy(update={"gate": CAUTION.digest})
    with pytest.raises(OverrideRequired, match="a policy approves a pass alone"):
        check(forged, policy=policy, gate=CAUTION)


@pytest.mark.parametrize("field", [{"approver": ""}, {"bundle": "x"}, {"kind": "sudo"}, {"decision": "maybe"}])
def test_approval_of_another_shape_is_none(field: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        Approval.model_validate({**give().model_dump(), **field})
    with pytest.raises(ValidationError):
        Approval.model_validate({**give().model_dump(), "decided_at": datetime(2026, 1, 1)})


@pytest.mark.parametrize(
    "settings", [{"approvers": ["ann", "Ann"], "required": 2}, {"approvers": [" "]}, {"required": 0}, {"x": 1}]
)
def test_policy_that_cannot_be_met_is_no_policy(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ApprovalPolicy.model_validate(settings)


def test_report_with_another_number_has_another_digest() -> None:
    assert len({PASS.digest, CAUTION.digest, FAIL.digest}) == 3
    assert GateRecord.model_validate_json(PASS.model_dump_json()).digest == PASS.digest
