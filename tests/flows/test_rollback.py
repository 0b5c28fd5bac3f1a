"""Rollback, status and log: what on-call types, with nothing but a registry in reach."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.config import PromoteConfig, Settings
from flows.rollback import roll_back
from registry.errors import RollbackRefused
from registry.events import Refused
from registry.ledger import read_ledger
from registry.moves import move_channel
from registry.store import FolderStore
from tasks.production.delivery import WorkerConfig
from tasks.production.notify import WebhookConfig
from tests.published import publish_bundle
from tests.servers import free_port
from tests.webhooks import run_receiver

RUNNER = CliRunner(env={"COLUMNS": "250", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderStore:
    """The default registry of a working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("THORFORGE_REGISTRY", str(tmp_path / "registry"))
    return FolderStore(tmp_path / "registry")


@pytest.fixture
def digests(store: FolderStore, tmp_path: Path) -> tuple[str, str]:
    """Two bundles, of which the second replaced the first."""
    first, second = (publish_bundle(store, tmp_path / str(seed), seed=seed) for seed in (0, 1))
    move_channel(store, "tiny", "production", first, None, moved_by="ada")
    move_channel(store, "tiny", "production", second, first, moved_by="grace")
    return first, second


def test_rollback_moves_production_and_says_so(digests: tuple[str, str]) -> None:
    done = RUNNER.invoke(app, ["rollback", "--by", "oncall", "--reason", "errors doubled"])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"production of tiny is {digests[0]} again, after ")
    assert "thorforge reconcile --repair" in done.stderr
    status = RUNNER.invoke(app, ["status"])
    assert f"tiny production: {digests[0]}" in status.stdout
    assert f"replaced {digests[1]}" in status.stdout
    assert "rolled back" in status.stdout
    assert "errors doubled (MLflow's aliases are left to thorforge reconcile)" in status.stdout
    (document,) = json.loads(RUNNER.invoke(app, ["status", "--json"]).stdout)
    assert (document["digest"], document["by"], document["kind"]) == (digests[0], "oncall", "rollback")


def test_rollback_to_a_digest_that_was_never_there_is_refused_on_record(
    store: FolderStore, digests: tuple[str, str], tmp_path: Path
) -> None:
    never = publish_bundle(store, tmp_path / "never", seed=2)
    with pytest.raises(RollbackRefused, match=f"never held {never}"):
        roll_back(Settings(), "tiny", never, "oncall")
    newest = next(read_ledger(store, "tiny"))
    assert isinstance(newest.event, Refused)
    assert (newest.event.action, newest.event.asked_by) == ("rollback", "oncall")


def test_rollback_reports_a_worker_that_does_not_prove_it(digests: tuple[str, str]) -> None:
    with run_receiver() as receiver:
        rules = PromoteConfig(
            workers=(WorkerConfig(url=f"http://127.0.0.1:{free_port()}"),), webhooks=(WebhookConfig(url=receiver.url),)
        )
        outcome = roll_back(Settings(promote=rules), "tiny", None, "oncall")
    assert (outcome.digest, outcome.left, outcome.move) == (*digests, 3)
    assert outcome.proofs == ()
    assert "ConnectError" in outcome.faults[0]
    assert [message["event"] for message in receiver.messages] == ["rollback.done"]


def test_rollback_needs_neither_prefect_nor_mlflow(digests: tuple[str, str]) -> None:
    """In a process where neither can be imported: they may be down, or not there at all."""
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('prefect', 'mlflow', 'torch')))\n"
        "from flows.cli import app\n"
        "for command in (['rollback', '--by', 'oncall'], ['status'], ['log']):\n"
        "    app(command, standalone_mode=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"production of tiny is {digests[0]} again" in done.stdout
    assert "rollback production #3" in done.stdout


def test_log_tells_who_did_what(digests: tuple[str, str]) -> None:
    shown = RUNNER.invoke(app, ["log"]).stdout.splitlines()
    assert [line.split()[0] for line in shown[1:]] == ["2", "1"]
    assert "set production #2" in shown[1]
    assert "grace" in shown[1]
    (newest,) = json.loads(RUNNER.invoke(app, ["log", "--limit", "1", "--json"]).stdout)
    assert newest["event"]["bundle"] == digests[1]


def test_status_of_nothing_says_so(store: FolderStore) -> None:
    assert "nothing of any model is in production" in RUNNER.invoke(app, ["status"]).stderr
    told = RUNNER.invoke(app, ["log"]).stderr.replace("│", "")
    assert "holds 0 models: run thorforge optimize" in " ".join(told.split())


@pytest.mark.parametrize("command", [["log"], ["promote", "0123abcd"], ["rollback", "--by", "oncall"]])
def test_model_that_the_registry_does_not_hold_is_named_with_those_it_does(
    digests: tuple[str, str], command: list[str]
) -> None:
    outcome = RUNNER.invoke(app, [*command, "--model", "tyni"])
    assert outcome.exit_code == 2
    assert "holds no model tyni: give --model, one of tiny" in " ".join(outcome.stderr.replace("│", "").split())
