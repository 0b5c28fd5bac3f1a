"""rollback: production back to what it was, with nothing but the registry and the workers: no Prefect, no MLflow."""

import time

from pydantic import BaseModel, ConfigDict

from flows.config import Settings, open_registry
from registry import promotion
from registry.errors import RegistryError, RollbackRefused
from registry.ledger import as_move
from tasks.errors import TaskError
from tasks.production.delivery import Proof, prove
from tasks.production.notify import notify

ALIASES_LEFT = "MLflow's aliases are left to thorforge reconcile"


class Rollback(BaseModel):
    """Where production points now, what it left, how long the move took, and what each worker proved or failed at."""

    model_config = ConfigDict(frozen=True)

    model: str
    digest: str
    left: str
    move: int
    seconds: float
    proofs: tuple[Proof, ...]
    faults: tuple[str, ...]


def roll_back(settings: Settings, model: str, to: str | None, asked_by: str, reason: str = "") -> Rollback:
    """Point production at the bundle it had before, or at `to`, which it once had; then have the workers prove it.

    The channel moves first and stays moved: a worker that does not answer is a fault to report, no reason to return to
    what was left. Raises RollbackRefused and what the registry raises, each recorded.
    """
    started = time.monotonic()
    store = open_registry(settings)
    before = promotion.status(store, model)
    if before is None:
        raise RollbackRefused(f"production of {model} was never set in {store}: there is nothing to roll back")
    entry = promotion.rollback(
        store,
        model,
        to,
        asked_by=asked_by,
        expected=before.channel.digest,
        reason=f"{reason or 'no reason given'} ({ALIASES_LEFT})",
    )
    seconds = time.monotonic() - started
    move = as_move(entry)
    if (digest := move.bundle) is None:
        raise RollbackRefused(f"a promotion of {model} that failed was undone just now: production points nowhere")
    proofs, faults = [], []
    for worker in settings.promote.workers:
        try:
            proofs.append(prove(worker, store, model, digest, asked_by))
        except (TaskError, RegistryError) as error:
            faults.append(f"{type(error).__name__}: {error}")
    document = {"model": model, "bundle": digest, "left": move.replaced, "requested_by": asked_by}
    notify(settings.promote.webhooks, "rollback.done", {**document, "reason": reason, "faults": faults})
    return Rollback(
        model=model,
        digest=digest,
        left=move.replaced or "",
        move=move.number,
        seconds=seconds,
        proofs=tuple(proofs),
        faults=tuple(faults),
    )
