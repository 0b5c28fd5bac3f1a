"""The benchmark's command line, and where it finds a bundle when none is named."""

import os
from pathlib import Path

import pytest

from benchmarks.bench_serving import CASES, find_newest_bundle, make_plan, parse_arguments
from benchmarks.cases import make_arrivals
from benchmarks.servers import ServerFailed
from registry.client import push
from registry.manifest import digest_of
from registry.store import FolderStore, default_registry
from tests.bundles import make_bundle

ISSUE_CASES = {
    "closed-1",
    "closed-8",
    "closed-32",
    "closed-128",
    "open-80",
    "batch-32",
    "overload-3x",
    "swap",
    "overhead",
}


def test_plan_is_the_whole_benchmark_unless_asked_otherwise() -> None:
    plan = make_plan(parse_arguments([]))
    assert plan.cases == set(CASES) >= ISSUE_CASES
    assert (plan.overload_seconds, plan.num_swaps) == (60, 10)
    quick = make_plan(parse_arguments(["--quick", "--cases", "closed-1", "--soak", "9"]))
    assert quick.cases == {"closed-1"}
    assert quick.rounds == 1
    assert quick.num_soak_requests == 9


def test_worker_may_have_cores_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert make_plan(parse_arguments(["--server-cores", "1-2"])).server_cores == {1, 2}
    assert make_plan(parse_arguments(["--server-cores", "3"])).server_cores == {3}
    for cores in ("0-3", "4", "2-1", "many"):
        with pytest.raises(SystemExit):
            parse_arguments(["--server-cores", cores])
        assert repr(cores) in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--peer", "nobody"], ["--cases", "closed-2"], ["--rounds", "x"]])
def test_command_line_that_asks_for_what_is_not_there_is_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(argv)


def test_newest_bundle_of_the_registry_is_served(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ServerFailed, match="run make demo"):
        find_newest_bundle()
    make_bundle(tmp_path / "tiny")
    digest = push(tmp_path / "tiny", FolderStore(default_registry()))
    folder = find_newest_bundle()
    assert folder.is_relative_to(home)
    assert digest_of(folder) == digest


def test_arrivals_are_never_none_at_all() -> None:
    assert make_arrivals("poisson", 0.001, 0.01, seed=0) == [0.0]
    assert make_arrivals("constant", 4, 1, seed=0) == [0, 0.25, 0.5, 0.75]
