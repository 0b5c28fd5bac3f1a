"""Promotion's steps: judge a published bundle anew, move production, mirror it in MLflow, prove it on the workers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from registry import promotion
from registry.approval import Approval, ApprovalPolicy
from registry.cache import fetched
from registry.client import resolve
from registry.errors import BundleIncomplete, GateFailed, RegistryError
from registry.events import Judged
from registry.gate import GateLimits, GateRecord, Measurement, default_checks, judge
from registry.ledger import Entry, append_once, as_move, recorded_refusals
from registry.manifest import Manifest, read_manifest
from registry.store import Store
from tasks.errors import TaskError, TrackingFailed, VerificationFailed
from tasks.production.delivery import Proof, WorkerClient, WorkerConfig, cache_folder, prove
from tasks.tracking import Alias, ModelAliases

PRODUCTION = "production"
_NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Case:
    """A bundle that somebody wants in production: what is decided on.

    `replaces` is production's digest when the case was opened, None where it was never set. `is_in_production`: a
    promotion that was killed after the move, which is only to be finished.
    """

    store: Store
    model: str
    digest: str
    manifest: Manifest
    gate: GateRecord
    replaces: str | None
    is_in_production: bool
    requested_by: str
    reason: str


@task(task_run_name="judge", cache_policy=NO_CACHE)
def open_case(
    store: Store, model: str, reference: str, limits: GateLimits, requested_by: str, reason: str = ""
) -> Case:
    """Pull the bundle, every byte verified, and judge what was measured of it under today's limits.

    The verdict is recorded whatever it is. Raises GateFailed, BundleNotFound and what verifying a bundle raises, each
    recorded as a refusal.
    """
    with recorded_refusals(store, model, "promote", reference, requested_by):
        digest = resolve(store, model, reference)
        now = promotion.status(store, model, PRODUCTION)
        replaces = now.channel.digest if now else None
        with fetched(store, model, digest, cache_folder()) as folder:
            manifest = read_manifest(folder)
            gate = judge_published(folder, manifest, limits, None if replaces == digest else replaces)
        case = Case(
            store=store,
            model=model,
            digest=digest,
            manifest=manifest,
            gate=gate,
            replaces=replaces,
            is_in_production=replaces == digest,
            requested_by=requested_by,
            reason=reason,
        )
        if case.is_in_production:
            return case
        append_once(store, model, Judged(bundle=digest, report=case.gate))
        if case.gate.verdict == "fail":
            raise GateFailed(f"bundle {digest} fails the gate: {describe_failures(case.gate)}")
    return case


def judge_published(folder: Path, manifest: Manifest, limits: GateLimits, champion: str | None) -> GateRecord:
    """The gate on a bundle's own reports. Its speed counts beside `champion` only if it was measured beside that one.

    Raises BundleIncomplete where a report is missing or is not one.
    """
    metrics = {name: _measurement(numbers) for name, numbers in _report(folder, "quality")["metrics"].items()}
    results = {result["metric"]: result for result in _report(folder, "gate")["results"]}
    if manifest.lineage.parents.get("champion") == champion:
        metrics |= {name: _measurement(found) for name, found in results.items() if name.endswith("_vs_champion")}
    checks = default_checks(
        limits, with_sts="sts_spearman_loss" in {*results, *metrics}, with_champion=champion is not None
    )
    return judge(metrics, checks)


def describe_failures(gate: GateRecord) -> str:
    """Why a verdict is what it is, check by check."""
    reasons = [result.reason for result in gate.results if result.verdict != "pass"]
    return "; ".join(reasons) or gate.reason


@task(task_run_name="move", cache_policy=NO_CACHE)
def move(case: Case, approvals: Sequence[Approval], policy: ApprovalPolicy) -> Entry:
    """Point production at the bundle, if it still points where the case found it; returns the ledger's entry."""
    return promotion.promote(
        case.store,
        case.model,
        case.digest,
        case.gate,
        approvals,
        policy,
        requested_by=case.requested_by,
        channel=PRODUCTION,
        expected=case.replaces,
        reason=case.reason,
    )


@task(task_run_name="mirror-aliases", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=1)
def mirror_aliases(tracking_uri: str | None, store: Store, model: str) -> None:
    """Make MLflow's aliases say what the registry's channels say. Raises TrackingFailed."""
    ModelAliases(tracking_uri, model).write(wanted_aliases(store, model), _champion_tags(store, model))


def wanted_aliases(store: Store, model: str) -> dict[Alias, str | None]:
    """What the aliases have to be: production is `champion`, what it replaced `previous`, canary `candidate`."""
    production, canary = (promotion.status(store, model, channel) for channel in (PRODUCTION, "canary"))
    return {
        "champion": production.channel.digest if production else None,
        "previous": production.channel.previous if production else None,
        "candidate": canary.channel.digest if canary else None,
    }


@task(task_run_name="verify-{worker.url}", cache_policy=NO_CACHE)
def verify(worker: WorkerConfig, case: Case) -> Proof:
    """Have a worker serve the bundle and prove it by its own answers, on record. Raises VerificationFailed."""
    proof = prove(worker, case.store, case.model, case.digest, case.requested_by)
    get_run_logger().info("%s", proof)
    return proof


def find_served(workers: Sequence[WorkerConfig], model: str) -> dict[str, str]:
    """The digest that each worker serves now, by URL; those that do not answer, or serve several, are left out."""
    found = {}
    for worker in workers:
        try:
            with WorkerClient(worker, worker.name or model) as client:
                served = list(client.read_served())
        except VerificationFailed:
            continue
        if len(served) == 1:
            found[worker.url] = served[0]
    return found


@task(task_run_name="put-back", cache_policy=NO_CACHE)
def put_back(
    case: Case, workers: Sequence[WorkerConfig], served: Mapping[str, str], tracking_uri: str | None, why: str
) -> str:
    """Roll production back to what the move replaced, then workers and aliases; says what came of it.

    After a first promotion production points nowhere again, and the workers get what they `served` before. Every part
    is tried whatever becomes of the others: a promotion that failed must not stop half-way back too. What was in
    production before this run is left there: then nothing is new, and a person decides.
    """
    if case.is_in_production:
        return "it was in production before this run, which changed nothing: thorforge rollback would go back"
    try:
        entry = promotion.rollback(
            case.store,
            case.model,
            asked_by=case.requested_by,
            expected=case.digest,
            reason=f"promotion undone: {why}",
            may_empty=True,
        )
    except (RegistryError, OSError) as error:
        return f"production was not put back: {error}"
    digest = as_move(entry).bundle
    wanted = {worker: digest or served.get(worker.url) for worker in workers}
    faults = [fault for worker, bundle in wanted.items() if (fault := _put_worker_back(case, worker, bundle))]
    try:
        mirror_aliases.fn(tracking_uri, case.store, case.model)
    except TaskError as error:
        faults.append(f"{error} (thorforge reconcile --repair mends the aliases later)")
    return "; ".join([f"production {f'is {digest}' if digest else 'points nowhere'} again", *faults])


def _put_worker_back(case: Case, worker: WorkerConfig, digest: str | None) -> str | None:
    """Have a worker serve `digest` again; what is wrong where it does not."""
    if digest is None:
        return f"{worker.url} is left as it is: what it served before is not known"
    try:
        prove(worker, case.store, case.model, digest, case.requested_by)
    except (TaskError, RegistryError, OSError) as error:
        return str(error)
    return None


def find_report(case: Case, tracking_uri: str | None) -> str | None:
    """The page of the bundle's HTML report in MLflow, or None: an approver can decide without the plots."""
    try:
        return ModelAliases(tracking_uri, case.model).find_report(case.manifest.lineage.mlflow_run_id)
    except TrackingFailed as error:
        get_run_logger().warning("no link to the report: %s", error)
        return None


def _report(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "reports" / f"{name}.json"
    try:
        document: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BundleIncomplete(f"{path} cannot be read: {type(error).__name__}") from None
    return document


def _measurement(numbers: Mapping[str, float | None]) -> Measurement:
    """What a report says; a number it could not write (NaN is null in JSON) is NaN again, which no gate passes."""
    value, low, high = (_NAN if (number := numbers.get(key)) is None else number for key in ("value", "low", "high"))
    return Measurement(value, low, high)


def _champion_tags(store: Store, model: str) -> dict[str, str]:
    """Who let the bundle in production through, and when, as tags of its version."""
    production = promotion.status(store, model, PRODUCTION)
    if production is None or production.move is None:
        return {}
    approvers = ", ".join(approval.approver for approval in production.move.approvals)
    return {
        "approver": approvers or f"none ({production.move.kind})",
        "promoted_by": production.move.moved_by,
        "promoted_at": production.channel.moved_at.isoformat(timespec="seconds"),
    }
