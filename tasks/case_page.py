"""The page an approver decides on: verdict, checks, what changes in production, and how to answer. Markdown."""

from collections.abc import Sequence

from registry.approval import Approval, ApprovalPolicy
from registry.client import read_stored
from registry.errors import RegistryError
from registry.gate import GateRecord
from registry.manifest import Manifest
from tasks.promotion import Case

_NONE = "nothing yet"


def describe_case(
    case: Case, policy: ApprovalPolicy, approvals: Sequence[Approval], note: str, report_url: str | None
) -> str:
    """Everything needed for a yes or a no, shortest first. `note` says why the last answer did not count."""
    manifest = case.manifest
    given = ", ".join(approval.approver for approval in approvals) or "nobody yet"
    allowed = ", ".join(policy.approvers) or "anybody who gives a name"
    report = f"[HTML report with plots]({report_url})" if report_url else "none on a server: see the run's artifacts"
    parts = [
        f"## Promote {manifest.model_name} {manifest.version}?",
        f"> **The last answer did not count.** {note}" if note else "",
        f"**The gate says {case.gate.verdict}**: {case.gate.reason}. {_consequence(case.gate)}",
        _compare(manifest, _read_production(case), case),
        "### What was checked",
        _checks(case.gate),
        "### Who decides",
        f"- asked for by **{case.requested_by}**: {case.reason or 'no reason given'}",
        f"- approvals: {len(approvals)} of {policy.required} ({given}); may approve: {allowed}",
        *([f"- not {case.requested_by}, who started this"] if policy.refuse_requester else []),
        f"- a decision counts for {policy.valid_hours:g} hours, for this bundle and this gate report alone",
        f"- report: {report}",
        f"- bundle `{case.digest}`",
        f"- gate report `{case.gate.digest}`",
    ]
    return "\n\n".join(part for part in parts if part).replace("\n\n- ", "\n- ")


def _consequence(gate: GateRecord) -> str:
    if gate.verdict == "caution":
        return "A yes takes an override: tick *Approve in spite of a caution* and give the reason."
    return "A no ends this run and changes nothing."


def _checks(gate: GateRecord) -> str:
    rows = [f"| {result.metric} | **{result.verdict}** | {result.reason} |" for result in gate.results]
    return "\n".join(["| check | verdict | measured, with its 95 % interval |", "|---|---|---|", *rows])


def _compare(candidate: Manifest, production: Manifest | None, case: Case) -> str:
    """Candidate and production side by side, each as its own run measured it."""
    rows = ["| | this bundle | in production now |", "|---|---|---|"]
    rows.append(f"| version | {candidate.version} | {production.version if production else case.replaces or _NONE} |")
    new, old = _figures(candidate), _figures(production) if production else {}
    rows += [f"| {name} | {value} | {old.get(name, '-')} |" for name, value in new.items()]
    return "\n".join(rows)


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
