"""promote: from a published bundle to production, with a trail. This file reads top to bottom as the procedure."""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect import flow
from prefect.logging import get_run_logger
from pydantic import BaseModel, ConfigDict

from flows.approval import collect_approvals
from flows.config import PromoteConfig, load_settings, open_registry
from registry.errors import RegistryError
from registry.promotion import status
from serving.telemetry import disable_telemetry
from tasks.errors import TaskError
from tasks.production.delivery import Proof
from tasks.production.notify import Event, notify, notify_refused
from tasks.production.promotion import Case, find_report, find_served, mirror_aliases, move, open_case, put_back, verify


class Promotion(BaseModel):
    """What is in production now, what it replaced, who approved it, and each worker's proof that it serves it."""

    model_config = ConfigDict(frozen=True)

    model: str
    version: str
    digest: str
    replaced: str | None
    approvers: tuple[str, ...]
    proofs: tuple[Proof, ...]


@flow(name="promote")
def promote(model: str, digest: str, requested_by: str, reason: str = "") -> Promotion:
    """Put a published bundle into production: gate, approval, channel, aliases, proof on the workers; or undo it all.

    The rules stand in `thorforge.toml` of the working folder, out of reach of whoever starts the run.

    Args:
        model: the model's name in the registry
        digest: the bundle: a digest, or its first 8 or more hex digits
        requested_by: your name; recorded, and where so configured it may not approve
        reason: why it should be promoted; recorded, and shown to the approvers
    """
    disable_telemetry()
    settings = load_settings()
    rules, store, tracking_uri = settings.promote, open_registry(settings), settings.optimize.tracking_uri
    with refusals_told(rules, model, digest, requested_by):
        served: dict[str, str] = {}
        case = open_case(store, model, digest, settings.optimize.gate.for_model(model), requested_by, reason)
        if not case.is_in_production:
            page = find_report(case, tracking_uri)
            approvals = collect_approvals(case, rules.approval, page, lambda: tell(rules, case, "approval.waiting"))
            served = find_served(rules.workers, model)
            move(case, approvals, rules.approval)
    try:
        mirror_aliases(tracking_uri, store, model)
        proofs = [verify(worker, case) for worker in rules.workers]
    except (TaskError, RegistryError, OSError) as error:
        outcome = put_back(case, rules.workers, served, tracking_uri, str(error))
        tell(rules, case, "promotion.undone", f"{error}; {outcome}")
        raise type(error)(f"{error}; {outcome}") from None
    tell(rules, case, "promotion.done")
    return summarize(case, proofs)


@contextmanager
def refusals_told(rules: PromoteConfig, model: str, digest: str, requested_by: str) -> Iterator[None]:
    """Tell the webhooks of what the block refuses, then let it pass on."""
    try:
        yield
    except (RegistryError, TaskError) as error:
        reason = f"{type(error).__name__}: {error}"
        notify_refused(rules.webhooks, model, digest, requested_by, reason)
        raise


def tell(rules: PromoteConfig, case: Case, event: Event, outcome: str = "") -> None:
    """Tell the webhooks; one that cannot be reached is logged and counted, and nothing waits for it."""
    document = {
        "model": case.model,
        "bundle": case.digest,
        "version": case.manifest.version,
        "gate": case.gate.digest,
        "verdict": case.gate.verdict,
        "replaces": case.replaces,
        "requested_by": case.requested_by,
        "reason": outcome or case.reason,
    }
    if num_failed := notify(rules.webhooks, event, document):
        get_run_logger().warning("%d of %d webhooks were not told of %s", num_failed, len(rules.webhooks), event)


def summarize(case: Case, proofs: list[Proof]) -> Promotion:
    """What the run came to, as the registry has it."""
    production = status(case.store, case.model)
    assert production is not None, "it was just promoted"
    approvals = production.move.approvals if production.move else ()
    return Promotion(
        model=case.model,
        version=case.manifest.version,
        digest=case.digest,
        replaced=production.channel.previous,
        approvers=tuple(approval.approver for approval in approvals),
        proofs=tuple(proofs),
    )
