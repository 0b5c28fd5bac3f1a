"""`thorforge promote` on live workers that prove a bundle, or cannot; and killed before every step, then run again."""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from registry.client import push, verify_stored
from registry.fsck import check_registry
from registry.ledger import as_move, read_ledger, read_moves
from registry.promotion import status
from registry.store import FolderStore
from tests.bundles import make_bundle
from tests.e2e.conftest import Project, make_project
from tests.published import publish_bundle
from tests.servers import free_port, run_prefect_server
from tests.worker import RunningWorker, run_worker

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

TOKEN = "an-admin-token-of-a-test"
STEPS = ("find_report", "collect_approvals", "find_served", "move", "mirror_aliases", "verify", "summarize")
# The promotion of argv[2:], in a process that dies when it comes to the step argv[1].
DIES = """
import os, signal, sys
from flows.environment import make_state_folder, prepare_environment
prepare_environment()
make_state_folder()
import flows.promote
setattr(flows.promote, sys.argv[1], lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
from flows.local_run import local_run
with local_run():
    flows.promote.promote("tiny", sys.argv[2], "linus")
"""


@dataclass(frozen=True)
class Site:
    """A registry in a folder with its bundles, and two workers: one is told what to serve, one follows its channel."""

    project: Project
    store: FolderStore
    start: str
    bad: str
    told: RunningWorker
    follower: RunningWorker | None = None

    def thorforge(self, *arguments: str, status: int = 0) -> str:
        """Run the command line; its standard output, or its error where `status` is not 0."""
        done = self.project.run(sys.executable, "-c", "from flows.cli import main; main()", *arguments)
        assert done.returncode == status, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout if status == 0 else done.stderr

    def promote(self, digest: str, status: int = 0) -> str:
        return self.thorforge("promote", digest, "--model", "tiny", "--by", "linus", status=status)

    def publish(self, seed: int, champion: str | None, is_opposite: bool = False) -> str:
        """One more bundle, measured beside `champion`."""
        folder = self.project.working_folder / f"{seed}{champion}{is_opposite}"
        return publish_bundle(self.store, folder, seed=seed, champion=champion, is_opposite=is_opposite)

    def served(self) -> list[str]:
        """What each worker says it serves."""
        return [served_by(worker) for worker in (self.told, self.follower) if worker]

    def production(self) -> str | None:
        now = status(self.store, "tiny")
        return now.channel.digest if now else None

    def events(self, limit: int) -> list[Any]:
        """The newest events of the ledger, oldest of them first."""
        return [entry.event for entry in read_ledger(self.store, "tiny", limit)][::-1]


def served_by(worker: RunningWorker) -> str:
    models = httpx.get(f"{worker.base_url}/api/v1/models", trust_env=False).json()["models"]
    (digest,) = (model["digest"] for model in models if model["weight"] > 0)
    return str(digest)


def write_settings(project: Project, *workers: dict[str, object]) -> None:
    """`thorforge.toml`: nobody has to be asked, the workers have to prove it."""
    folder = project.working_folder
    lines = ["[optimize]", f"registry = {json.dumps(str(folder / 'registry'))}", "[promote.approval]"]
    lines.append('automatic = "lab"')
    for worker in workers:
        lines += ["[[promote.workers]]", *(f"{key} = {json.dumps(value)}" for key, value in worker.items())]
    (folder / "thorforge.toml").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Before anything was ever promoted; the worker serves a bundle that it was started with."""
    folder = tmp_path_factory.mktemp("site")
    (folder / ".thorforge" / "prefect").mkdir(parents=True)
    base = make_project(folder / ".thorforge")
    store, root, token = FolderStore(folder / "registry"), folder / "bundles", folder / "token"
    make_bundle(folder / "start", seed=9)
    start = push(folder / "start", store)
    bad = publish_bundle(store, folder / "bad", seed=8, is_opposite=True)
    token.write_text(f"{TOKEN}\n")
    root.mkdir()
    options = ["--models-root", str(root), "--security-admin-tokens-file", str(token)]
    with run_prefect_server(base.env, free_port()) as server, run_worker(folder / "start", *options) as told:
        project = Project(base.folder, base.env | {"PREFECT_API_URL": server.api_url}, folder)
        write_settings(project, told_settings(told.base_url, folder))
        yield Site(project, store, start, bad, told)


def told_settings(url: str, folder: Path) -> dict[str, object]:
    return {"url": url, "root": str(folder / "bundles"), "admin_token_file": str(folder / "token")}


@pytest.fixture(scope="module")
def first_failed(site: Site) -> str:
    """What the first promotion said, whose bundle no worker can prove."""
    return site.promote(site.bad, status=1)


@pytest.fixture(scope="module")
def followed(site: Site, first_failed: str) -> Iterator[tuple[Site, str]]:
    """A good bundle in production, and a second worker, asked first, that follows the channel."""
    folder = site.project.working_folder
    good = site.publish(1, None)
    site.promote(good)
    channel = folder / "registry" / "channels" / "tiny" / "production.json"
    with ExitStack() as stack:
        follower = stack.enter_context(run_worker(channel, "--models-watch-seconds", "0.2"))
        write_settings(site.project, {"url": follower.base_url}, told_settings(site.told.base_url, folder))
        yield replace(site, follower=follower), good


def test_first_promotion_that_fails_leaves_everything_as_it_was(site: Site, first_failed: str) -> None:
    assert "production points nowhere again" in first_failed
    assert (site.production(), site.served()) == (None, [site.start])
    kinds = ["gate", "approval", "move", "refusal", "rollback", "proof"]
    events = site.events(6)
    assert [event.kind for event in events] == kinds
    assert (events[3].action, events[3].error, events[3].bundle) == ("verify", "VerificationFailed", site.bad)
    assert (events[4].bundle, events[4].replaced, events[5].bundle) == (None, site.bad, site.start)
    assert "MLflow and the registry agree" in site.thorforge("reconcile", "--model", "tiny")
    assert (
        "nothing of tiny is in production"
        in site.project.run(
            sys.executable, "-c", "from flows.cli import main; main()", "status", "--model", "tiny"
        ).stderr
    )


def test_worker_that_follows_its_channel_proves_what_it_took_over(followed: tuple[Site, str]) -> None:
    site, good = followed
    assert site.served() == [good, good]
    better = site.publish(2, good)
    said = site.promote(better)
    assert said.count("golden set 1.0000") == 2
    assert (site.production(), site.served()) == (better, [better, better])
    assert [event.kind for event in site.events(3)] == ["move", "proof", "proof"]
    back = site.thorforge("rollback", "--model", "tiny", "--by", "oncall")
    assert back.count("golden set 1.0000") == 2
    assert (site.production(), site.served()) == (good, [good, good])
    assert [event.kind for event in site.events(3)] == ["rollback", "proof", "proof"]


def test_bundle_that_a_following_worker_cannot_prove_is_put_back(followed: tuple[Site, str]) -> None:
    site, good = followed
    said = site.promote(site.publish(3, good, is_opposite=True), status=1)
    assert f"production is {good} again" in said
    assert f"{site.follower.base_url if site.follower else ''} validates" in said
    assert (site.production(), site.served()) == (good, [good, good])
    assert [event.kind for event in site.events(5)] == ["move", "refusal", "rollback", "proof", "proof"]


def test_worker_that_is_gone_undoes_the_promotion_for_the_others(followed: tuple[Site, str]) -> None:
    site, good = followed
    folder, dead = site.project.working_folder, f"http://127.0.0.1:{free_port()}"
    write_settings(site.project, told_settings(site.told.base_url, folder), {"url": dead})
    try:
        said = site.promote(site.publish(4, good), status=1)
    finally:
        assert site.follower is not None
        write_settings(site.project, {"url": site.follower.base_url}, told_settings(site.told.base_url, folder))
    assert "ConnectError" in said
    assert (site.production(), served_by(site.told)) == (good, good)
    assert [event.kind for event in site.events(6)] == ["move", "proof", "refusal", "rollback", "proof", "refusal"]


@pytest.mark.parametrize("step", STEPS)
def test_promoter_killed_before_a_step_is_run_again_and_moves_once(followed: tuple[Site, str], step: str) -> None:
    site, good = followed
    digest = site.publish(10 + STEPS.index(step), good)
    num_moves = len(list(read_moves(site.store, "tiny", "production")))
    killed = site.project.run(sys.executable, "-c", DIES, step, digest)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    pointed = site.production()
    assert pointed in (good, digest)
    assert verify_stored(site.store, "tiny", str(pointed))
    site.promote(digest)
    moves = [as_move(entry) for entry in read_moves(site.store, "tiny", "production")]
    assert (len(moves), moves[0].bundle, moves[0].replaced) == (num_moves + 1, digest, good)
    assert (site.production(), site.served()) == (digest, [digest, digest])
    assert "agree" in site.thorforge("reconcile", "--model", "tiny")
    site.thorforge("rollback", "--model", "tiny", "--by", "oncall")
    site.thorforge("reconcile", "--model", "tiny", "--repair")
    assert list(check_registry(site.store)) == []
