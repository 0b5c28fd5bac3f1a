"""Rollback and reconcile as flows, for a Prefect server; the commands of the same names need none."""

from datetime import UTC, datetime

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.logging import get_run_logger

from flows.answer import end_unanswered
from flows.config import load_settings, open_registry
from flows.reconcile import Drift, find_drift, repair
from flows.rollback import Rollback, roll_back
from serving.telemetry import disable_telemetry
from tasks.errors import TrackingFailed, VerificationFailed


@flow(name="rollback")
def rollback(model: str, requested_by: str, to: str | None = None, reason: str = "") -> Rollback:
    """Point production back, have the workers prove it, then mend MLflow's aliases.

    Args:
        model: the model's name in the registry
        requested_by: your name; recorded
        to: digest to go back to, or its first 8 or more hex digits; what production had before where absent
        reason: why; recorded
    """
    disable_telemetry()
    settings = load_settings()
    outcome = roll_back(settings, model, to or None, requested_by, reason)
    try:
        repair(settings, find_drift(settings, [model]))
    except TrackingFailed as error:
        get_run_logger().warning("aliases not mended, reconcile does it later: %s", error)
    if outcome.faults:
        raise VerificationFailed(f"production is {outcome.digest}, but {'; '.join(outcome.faults)}")
    return outcome


@flow(name="reconcile")
def reconcile(model: str | None = None, mend: bool = True) -> list[Drift]:
    """Compare MLflow's aliases with the channels of one model, or of all, and mend them.

    It also ends promotions that nobody answered in time.

    Args:
        model: the model's name in the registry; all of them where absent
        mend: make MLflow agree with the registry
    """
    disable_telemetry()
    settings = load_settings()
    drift = find_drift(settings, [model] if model else open_registry(settings).list_models())
    if drift:
        create_table_artifact([found.model_dump() for found in drift], key="alias-drift")
    if mend:
        repair(settings, drift)
    for unanswered in end_unanswered(settings, datetime.now(UTC)):
        get_run_logger().warning("nobody answered %s in time, it is ended", unanswered.name)
    return drift
