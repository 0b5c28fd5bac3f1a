import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import TrackingFailed
from tasks.publish import Published
from tasks.reporting.plots import plot_pareto
from tasks.select import choose
from tasks.tracking import ModelAliases, Tracker, candidate_metrics, default_tracking_uri, track_run
from tests.forge import Forge
from tests.servers import free_port

# The tables of MLflow and of Prefect's server use what SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

NAMES = {"fp32-onnx", "int8-dynamic", "int8-static", "int8-openvino", "bf16-openvino"}
PREFIXES = {"quality", "speed", "size", "cost"}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One SQLite database for the module, because making its tables takes seconds; each test has its own experiment."""
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"


@pytest.fixture
def uri(database: Path) -> str:
    return f"sqlite:///{database}"


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def runs(uri: str, experiment: str) -> list[Any]:
    found = client(uri).get_experiment_by_name(experiment)
    return list(client(uri).search_runs([found.experiment_id], order_by=["attributes.start_time ASC"]))


def status(uri: str, run_id: str) -> str:
    return str(client(uri).get_run(run_id).info.status)


def test_tracking_parent_and_children_share_their_keys(uri: str, forge: Forge, tmp_path: Path) -> None:
    winner = choose(forge.study.judged)
    assert winner is not None
    (tmp_path / "report.html").write_text("<html></html>")
    with track_run(uri, "keys", {"model": "tiny", "corpus": "c"}) as tracker:
        for judged in forge.study.judged:
            tracker.log_candidate(judged, "c")
        tracker.log_parent(winner, {row.name: row.gate.verdict for row in forge.study.judged}, {})
        tracker.log_figure(plot_pareto(forge.study), "pareto.png")
        tracker.log_file(tmp_path / "report.html")
    found = runs(uri, "keys")
    parent = next(run for run in found if run.info.run_id == tracker.run_id)
    children = [run for run in found if run is not parent]
    assert {run.info.run_name for run in children} == NAMES
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {tracker.run_id}
    keys = set(parent.data.metrics)
    assert {key.partition(".")[0] for key in keys} == PREFIXES
    assert all(set(run.data.metrics) == keys for run in children)
    assert len({frozenset(run.data.params) for run in children}) == 1
    assert {run.info.status for run in found} == {"FINISHED"}
    assert parent.data.tags["chosen"] == winner.name
    assert parent.data.metrics["speed.p50_ms"] == winner.speed.latency_ms(50)
    files = {file.path for file in client(uri).list_artifacts(tracker.run_id)}
    assert files == {"pareto.png", "report.html"}
    assert {file.path for file in client(uri).list_artifacts(children[0].info.run_id)} == {
        "gate.json",
        "quality.json",
        "speed.json",
    }


def test_tracking_metrics_cover_cost_and_intervals(forge: Forge) -> None:
    judged = forge.study.find("fp32-onnx")
    metrics = candidate_metrics(judged)
    assert metrics["cost.node_seconds_per_million_texts"] == pytest.approx(1e6 / judged.speed.throughput_per_s)
    assert metrics["size.disk_mb"] == judged.candidate.disk_bytes / 1e6
    assert metrics["quality.cosine_mean.bad_end"] <= metrics["quality.cosine_mean"]
    assert metrics["quality.ndcg_at_10_loss.bad_end"] >= metrics["quality.ndcg_at_10_loss"]


def test_tracking_of_a_run_nobody_passed_names_none(uri: str, forge: Forge) -> None:
    with track_run(uri, "none", {}) as tracker:
        tracker.log_parent(None, {"fp32-onnx": "fail"}, {"fp16-tensorrt": "no GPU" + "!" * 9000})
    tags = client(uri).get_run(tracker.run_id).data.tags
    assert (tags["chosen"], tags["verdict.fp32-onnx"]) == ("none", "fail")
    assert tags["not_built.fp16-tensorrt"].startswith("no GPU!")


@pytest.mark.parametrize(
    ("error", "expected"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")]
)
def test_tracking_says_how_a_run_ended(error: type[BaseException], expected: str, uri: str) -> None:
    opened: list[Tracker] = []

    def crash() -> None:
        with track_run(uri, "ends", {}) as tracker:
            opened.append(tracker)
            assert status(uri, tracker.run_id) == "RUNNING"
            raise error

    with pytest.raises(error):
        crash()
    assert status(uri, opened[0].run_id) == expected


KILLED = """
import sys
from tasks.tracking import track_run
with track_run(sys.argv[1], "killed", {}) as tracker:
    print(tracker.run_id, flush=True)
    sys.stdin.read()
"""


def test_tracking_closes_the_run_of_a_killed_process_and_no_other(uri: str) -> None:
    command = [sys.executable, "-c", KILLED, uri]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        dead = process.stdout.readline().strip()
        with track_run(uri, "killed", {}) as alive:
            assert status(uri, dead) == "RUNNING"
            os.kill(process.pid, signal.SIGKILL)
            process.wait(30)
            with track_run(uri, "killed", {}):
                assert status(uri, dead) == "KILLED"
                assert status(uri, alive.run_id) == "RUNNING"


def test_tracking_leaves_runs_of_other_hosts_and_tools_alone(uri: str) -> None:
    with track_run(uri, "others", {}) as tracker:
        experiment = client(uri).get_run(tracker.run_id).info.experiment_id
        tags = ({"thorforge.process": "elsewhere 1 0.00"}, {})
        others = [client(uri).create_run(experiment, tags=tag).info.run_id for tag in tags]
        with track_run(uri, "others", {}):
            assert [status(uri, run) for run in others] == ["RUNNING", "RUNNING"]


def test_tracking_registers_a_digest_once(uri: str, forge: Forge) -> None:
    judged = forge.study.judged[0]
    published = [Published(name="tiny", variant=judged.name, version="v", digest=digest * 64) for digest in "ab"]
    with track_run(uri, "register", {}) as tracker:
        versions = [tracker.register(p, judged) for p in (published[0], published[0], published[1])]
    assert versions[0] == versions[1] != versions[2]
    version = client(uri).get_model_version("tiny", versions[0])
    assert version.tags["digest"] == "a" * 64
    assert version.tags["verdict"] == judged.gate.verdict
    assert (version.tags["approver"], version.source) == ("none yet", f"thorforge://registry/tiny/{'a' * 64}")


def test_tracking_aliases_name_digests_and_register_what_is_unknown(uri: str) -> None:
    first, second = "c" * 64, "d" * 64
    aliases = ModelAliases(uri, "aliased")
    assert aliases.read() == {}
    aliases.write({"champion": first, "previous": None}, {"approver": "ada"})
    assert aliases.read() == {"champion": first}
    aliases.write({"champion": second, "previous": first, "candidate": second})
    assert aliases.read() == {"champion": second, "previous": first, "candidate": second}
    aliases.write({"candidate": None})
    assert aliases.read() == {"champion": second, "previous": first}
    assert len(client(uri).search_model_versions("name = 'aliased'")) == 2
    assert client(uri).get_model_version_by_alias("aliased", "previous").tags["approver"] == "ada"


def test_tracking_aliases_show_a_version_without_a_digest(uri: str) -> None:
    client(uri).create_registered_model("by-hand")
    client(uri).create_model_version("by-hand", "s3://somewhere/else")
    client(uri).set_registered_model_alias("by-hand", "champion", "1")
    assert ModelAliases(uri, "by-hand").read() == {"champion": "version 1"}


def test_tracking_names_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingFailed, match=r"MLflow.*refused"):
        ModelAliases(f"http://127.0.0.1:{free_port()}", "tiny").read()


def test_tracking_run_names_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    port = free_port()
    with (
        pytest.raises(TrackingFailed, match=rf"^MLflow at http://127\.0\.0\.1:{port}: .*refused") as failed,
        track_run(f"http://ada:secret@127.0.0.1:{port}", "optimize", {}),
    ):
        pytest.fail("the work was begun")
    assert "secret" not in str(failed.value)
    assert "\n" not in str(failed.value)


def test_tracking_default_is_sqlite_below_the_state_folder(home: Path) -> None:
    assert default_tracking_uri() == f"sqlite:///{home}/mlflow/mlflow.db"
    assert not home.exists()
