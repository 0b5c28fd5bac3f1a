"""The page an approver decides on: verdict, checks, what changes in production, and how to answer. Markdown."""

import re
from collections.abc import Iterable, Iterator, Sequence

from registry.approval import Approval, ApprovalPolicy
from registry.client import read_stored
from registry.errors import RegistryError
from registry.gate import GateRecord
from registry.manifest import Manifest
from tasks.production.promotion import Case

_SHORT = 12  # of a digest: Prefect's dialog is narrow, and does not break what is longer than a line


def describe_case(
    case: Case, policy: ApprovalPolicy, approvals: Sequence[Approval], note: str, report_url: str | None
) -> str:
    """Everything needed for a yes or a no, the shortest first. `note` says why the last answer did not count."""
    manifest = case.manifest
    parts = [
        f"## Promote {manifest.model_name} {manifest.version}?",
        f"> **The last answer did not count.** {_shorten(note)}" if note else "",
        f"**The gate says {case.gate.verdict}**: {case.gate.reason}. {_consequence(case.gate)}",
        f"[The HTML report, with plots]({report_url})" if report_url else "",
        "### What would change",
        _list(_changes(case)),
        "### What was checked",
        _list(f"**{result.verdict}** {result.reason}" for result in case.gate.results),
        "### Who decides",
        _list(_rules(case, policy, approvals)),
    ]
    return "\n\n".join(part for part in parts if part)


def _consequence(gate: GateRecord) -> str:
    if gate.verdict == "caution":
        return "A yes takes an override: switch on *Approve in spite of a caution* and give the reason."
    return "A no ends this run and changes nothing."


def _changes(case: Case) -> Iterator[str]:
    """The bundle's figures, each with production's behind it; both as their own runs measured them."""
    production = _read_production(case)
    old = _figures(production) if production else {}
    yield f"in production now: {production.version if production else case.replaces or 'nothing yet'}"
    for name, value in _figures(case.manifest).items():
        beside = (
            "" if name not in old else ", as in production" if old[name] == value else f", in production {old[name]}"
        )
        yield f"{name}: **{value}**{beside}"


def _rules(case: Case, policy: ApprovalPolicy, approvals: Sequence[Approval]) -> Iterator[str]:
    yield f"asked for by **{case.requested_by}**: {case.reason or 'no reason given'}"
    given = ", ".join(approval.approver for approval in approvals) or "nobody yet"
    yield f"approvals: {len(approvals)} of {policy.required} ({given})"
    yield f"may approve: {', '.join(policy.approvers) or 'anybody who gives a name'}"
    if policy.refuse_requester:
        yield f"not {case.requested_by}, who started this"
    yield f"counts for {policy.valid_hours:g} hours, for bundle `{case.digest[:_SHORT]}` and this gate report alone"


def _figures(manifest: Manifest) -> dict[str, str]:
    cosine, speed = manifest.validation.cosine_similarity_vs_fp32, manifest.performance
    return {
        "cosine to the teacher": f"{cosine.mean:.4f} ({cosine.ci[0]:.4f} to {cosine.ci[1]:.4f})",
        "nDCG@10": _optional(manifest.validation.ndcg_at_10),
        "latency p50, p95": f"{speed.latency_p50_ms:.2f}, {speed.latency_p95_ms:.2f} ms",
        "throughput": f"{speed.throughput_qps:.0f} texts/s",
        "size": f"{sum(entry.size for entry in manifest.files.values()) / 1e6:.1f} MB",
        "an index built with the teacher": "can stay" if manifest.compatibility == "drop-in" else "must be rebuilt",
        "judged on": manifest.validation.test_dataset,
        "measured on": speed.hardware,
    }


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _shorten(text: str) -> str:
    return re.sub(r"[0-9a-f]{64}", lambda digest: f"{digest[0][:_SHORT]}…", text)


def _optional(number: float | None) -> str:
    return "not measured" if number is None else f"{number:.4f}"


def _read_production(case: Case) -> Manifest | None:
    """Production's manifest; one that cannot be read is no reason to keep an approver from deciding."""
    if case.replaces is None:
        return None
    try:
        return read_stored(case.store, case.model, case.replaces)
    except RegistryError:
        return None
