"""`thorforge promote`, `approve`, `reject`, `rollback`, `status`, `log`, `reconcile`: production and its trail."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from flows.environment import make_state_folder
from registry.approval import Approval, Decision
from registry.events import Collected, Decided, Event, Judged, Moved, Proved, Refused, Screened
from registry.keys import user_name
from registry.ledger import read_ledger
from registry.promotion import Status, status
from registry.store import Store

app = typer.Typer()

SHORT = 12
_Model = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="the model; not needed where the registry holds only one")
]
_By = Annotated[str | None, typer.Option("--by", metavar="NAME", help="your name, by default your user name")]
_Reason = Annotated[str, typer.Option(help="why; recorded")]
_Json = Annotated[bool, typer.Option("--json", help="print one JSON document")]
_Run = Annotated[str | None, typer.Argument(metavar="RUN", help="the promotion's run, by name or id; none: list them")]


@app.command()
def promote(
    digest: Annotated[str, typer.Argument(help="the bundle: a digest or its first 8 or more hex digits")],
    model: _Model = None,
    reason: _Reason = "",
    by: _By = None,
    as_json: _Json = False,
) -> None:
    """Put a published bundle into production: gate, approval, channel, MLflow aliases, proof on the running workers.

    It waits until somebody approves it, with `thorforge approve` in another terminal or in Prefect's pages. A promotion
    that fails after the move is undone. Rules: [promote] in thorforge.toml.

    Example: thorforge promote 3f2a9c01 --reason "half the latency"
    """
    make_state_folder()
    name = _find_model(model)
    from flows.local_run import local_run  # noqa: PLC0415  --help and completion stay fast
    from flows.promote import promote as promote_flow  # noqa: PLC0415  likewise

    with local_run():
        outcome = promote_flow(name, digest, by or user_name(), reason)
    if as_json:
        typer.echo(outcome.model_dump_json())
        return
    typer.echo(f"production of {outcome.model} is {outcome.version}, digest {outcome.digest}")
    typer.echo(f"replaced {outcome.replaced or 'nothing'}; approved by {', '.join(outcome.approvers)}")
    for proof in outcome.proofs:
        typer.echo(str(proof))


@app.command()
def approve(
    run: _Run = None,
    reason: _Reason = "",
    override: Annotated[
        bool, typer.Option("--override", help="approve in spite of the gate's caution; needs --reason")
    ] = False,
    by: _By = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not show the page and ask first")] = False,
) -> None:
    """Say yes to a promotion that waits, after reading what the gate says of it. Without RUN: list those that wait.

    The yes is of the bundle and the gate report shown, and of nothing else. Who may approve: [promote.approval].

    Example: thorforge approve amber-falcon --reason "numbers checked"
    """
    _answer(run, "approve", by, reason, override, is_sure=yes)


@app.command()
def reject(run: _Run = None, reason: _Reason = "", by: _By = None) -> None:
    """Say no to a promotion that waits: it ends, and production stays as it is. Without RUN: list those that wait.

    Example: thorforge reject amber-falcon --reason "wrong corpus"
    """
    _answer(run, "reject", by, reason, override=False, is_sure=True)


@app.command()
def rollback(
    to: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="a bundle production had before; by default the last one")
    ] = None,
    model: _Model = None,
    reason: _Reason = "",
    by: _By = None,
    as_json: _Json = False,
) -> None:
    """Put production back to what it was. Needs neither Prefect nor MLflow, nor an approval: the bundle had one.

    Then every worker of [promote] must prove that it serves that bundle. Exit status 4: production is back, but a
    worker did not prove it. MLflow's aliases are left to `thorforge reconcile --repair`.

    Example: thorforge rollback --reason "errors doubled"
    """
    from flows.config import load_settings  # noqa: PLC0415
    from flows.rollback import ALIASES_LEFT, roll_back  # noqa: PLC0415

    outcome = roll_back(load_settings(), _find_model(model), to, by or user_name(), reason)
    if as_json:
        typer.echo(outcome.model_dump_json())
    else:
        typer.echo(f"production of {outcome.model} is {outcome.digest} again, after {outcome.seconds:.2f} s")
        for line in (*map(str, outcome.proofs), *(f"not proved: {fault}" for fault in outcome.faults)):
            typer.echo(line)
        typer.echo(f"{ALIASES_LEFT} --repair", err=True)
    if outcome.faults:
        raise typer.Exit(4)


@app.command("status")
def show_status(model: _Model = None, as_json: _Json = False) -> None:
    """Say what is in production, since when, by whom, who approved it and what it replaced.

    Example: thorforge status
    """
    store = _open_store()
    found = [
        (name, channel, now)
        for name in ([model] if model else store.list_models())
        for channel in ("production", "canary")
        if (now := status(store, name, channel))
    ]
    if as_json:
        typer.echo(json.dumps([_status_document(name, channel, now) for name, channel, now in found], indent=2))
        return
    for name, channel, now in found:
        typer.echo(_describe_status(name, channel, now))
    if not found:
        typer.echo(f"nothing of {model or 'any model'} is in production in {store}", err=True)


@app.command()
def log(
    model: _Model = None,
    limit: Annotated[int, typer.Option(min=1, help="how many entries, newest first")] = 20,
    as_json: _Json = False,
) -> None:
    """Print the ledger: gates, approvals, refusals, moves and rollbacks, newest first.

    Example: thorforge log --limit 50
    """
    entries = list(read_ledger(_open_store(), _find_model(model), limit))
    if as_json:
        typer.echo(json.dumps([entry.model_dump(mode="json") for entry in entries], indent=2))
        return
    table = Table("entry", "when (UTC)", "what", "bundle", "who", "why", box=None, pad_edge=False)
    for entry in entries:
        kind, bundle, who, why = _describe_event(entry.event)
        table.add_row(str(entry.sequence), f"{entry.recorded_at:%Y-%m-%d %H:%M:%S}", kind, bundle[:SHORT], who, why)
    _print(table)


@app.command()
def reconcile(
    model: _Model = None,
    repair: Annotated[bool, typer.Option("--repair", help="make MLflow's aliases agree with the registry")] = False,
    as_json: _Json = False,
) -> None:
    """Show where MLflow's aliases differ from the registry's channels. The registry is the truth.

    Exit status: 0 they agree, or were repaired; 5 they differ.

    Example: thorforge reconcile --repair
    """
    from flows.config import load_settings, open_registry  # noqa: PLC0415
    from flows.reconcile import find_drift  # noqa: PLC0415
    from flows.reconcile import repair as repair_drift  # noqa: PLC0415

    settings = load_settings()
    drift = find_drift(settings, [model] if model else open_registry(settings).list_models())
    if repair:
        repair_drift(settings, drift)
    if as_json:
        typer.echo(json.dumps([found.model_dump() for found in drift]))
    else:
        for found in drift:
            done = ": repaired" if repair else ""
            typer.echo(
                f"{found.model} {found.alias} is {found.mlflow or 'not set'}, "
                f"the registry says {found.registry or 'not set'}{done}"
            )
        if not drift:
            typer.echo("MLflow and the registry agree")
    if drift and not repair:
        raise typer.Exit(5)


def _answer(run: str | None, decision: Decision, by: str | None, reason: str, override: bool, is_sure: bool) -> None:
    make_state_folder()
    from flows.answer import answer, find_waiting, list_waiting  # noqa: PLC0415
    from flows.config import load_settings  # noqa: PLC0415

    if run is None:
        if not (promotions := list_waiting()):
            typer.echo("no promotion waits here: it is asked of the same state folder, or PREFECT_API_URL, as promote")
            return
        table = Table("run", "model", "bundle", "asked for by", box=None, pad_edge=False)
        for one in promotions:
            table.add_row(one.name, one.model, one.bundle[:SHORT], one.requested_by)
        _print(table)
        return
    waiting = find_waiting(run)
    if not is_sure:
        Console().print(Markdown(waiting.page))
        if not typer.confirm(f"{decision} {waiting.bundle[:SHORT]} as {by or user_name()}?"):
            raise typer.Exit(1)
    answer(load_settings(), waiting, by or user_name(), decision, reason, override)
    typer.echo(f"{waiting.name} has your answer: {decision} {waiting.bundle}")


def _open_store() -> Store:
    from flows.config import load_settings, open_registry  # noqa: PLC0415

    return open_registry(load_settings())


def _find_model(model: str | None) -> str:
    """The model asked for, or the only one; the registry must hold it: a typing error must not begin a ledger."""
    store = _open_store()
    models = store.list_models()
    wanted = models if model is None else [model]
    if len(wanted) == 1 and wanted[0] in models:
        return wanted[0]
    held = f"{len(models)} models" if model is None else f"no model {model}"
    known = ", ".join(models)
    advice = f"give --model, one of {known}" if models else "run thorforge optimize, or set THORFORGE_REGISTRY"
    raise typer.BadParameter(f"{store} holds {held}: {advice}")


def _status_document(name: str, channel: str, now: Status) -> dict[str, object]:
    move = now.move
    return {
        "model": name,
        "channel": channel,
        "digest": now.channel.digest,
        "replaced": now.channel.previous,
        "move": now.channel.sequence,
        "since": now.channel.moved_at.isoformat(),
        "by": now.channel.moved_by,
        "kind": move.kind if move else None,
        "reason": move.reason if move else None,
        "approvers": [approval.approver for approval in move.approvals] if move else [],
        "is_finished": now.is_finished,
    }


def _describe_status(name: str, channel: str, now: Status) -> str:
    record, move = now.channel, now.move
    how = {"move": "promoted", "rollback": "rolled back", "set": "set by hand"}[move.kind] if move else "moved"
    lines = [
        f"{name} {channel}: {record.digest}",
        f"  {how} {record.moved_at:%Y-%m-%d %H:%M:%S} UTC by {record.moved_by} (move {record.sequence})",
        f"  replaced {record.previous or 'nothing'}",
    ]
    if move and move.approvals:
        lines.append(f"  approved by {', '.join(_describe_approval(approval) for approval in move.approvals)}")
    if move and move.reason:
        lines.append(f"  reason: {move.reason}")
    if not now.is_finished:
        lines.append("  a further move is recorded and not carried out yet: promote or roll back again to finish it")
    return "\n".join(lines)


def _describe_approval(approval: Approval) -> str:
    kind = {"approval": "", "override": " (override)", "policy": " (automatic policy)"}[approval.kind]
    return f"{approval.approver}{kind}{f': {approval.reason}' if approval.reason else ''}"


def _describe_event(event: Event) -> tuple[str, str, str, str]:
    """What happened, to which bundle, by whom, and why."""
    match event:
        case Judged():
            row = f"gate {event.report.verdict}", event.bundle, "-", event.report.reason
        case Screened(candidates=candidates):
            verdicts = ", ".join(f"{one.variant} {one.report.verdict}" for one in candidates)
            row = "screening", event.bundle or "none", event.screened_by, verdicts
        case Decided(approval=approval):
            kind = {"approval": approval.decision, "override": "override", "policy": "policy"}[approval.kind]
            row = kind, approval.bundle, approval.approver, approval.reason
        case Refused():
            row = f"refused {event.action}", event.bundle, event.asked_by, f"{event.error}: {event.reason}"
        case Moved():
            row = f"{event.kind} {event.channel} #{event.number}", event.bundle or "none", event.moved_by, event.reason
        case Proved():
            row = "proof", event.bundle, event.asked_by, f"{event.worker} embeds at cosine {event.live_mean:.4f}"
        case Collected():
            row = "collection", f"{len(event.bundles)} bundles", event.collected_by, ""
    return row


def _print(table: Table) -> None:
    # Into a file or a pipe every row is one line, however long.
    console = Console(markup=False, highlight=False, emoji=False)
    console.print(table) if console.is_terminal else Console(width=10_000, markup=False, highlight=False).print(table)
