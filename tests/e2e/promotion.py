"""Everything a promotion needs, running: Prefect and its worker, MLflow on PostgreSQL, a registry on S3."""

import base64
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.e2e.conftest import ROOT, Project, make_project
from tests.forge import write_corpus
from tests.registry.s3 import CREDENTIALS, s3_server
from tests.servers import free_port, run_mlflow_server, run_postgres, run_prefect_server, run_process

MODEL = "tiny"
APPROVERS = ("ada", "grace")
ADMIN_TOKEN = "an-admin-token-of-a-test"
_WAIT_SECONDS = 240
_POLL_SECONDS = 0.5

# The tiny teacher's weights are random, the machine is busy, and its processor's integers may saturate: what is gated
# here is the trail, not the numbers.
_SETTINGS = """
[optimize]
model = {teacher}
name = "tiny"
corpus = {corpus}
calibration_size = 8
registry = {registry}
tracking_uri = {tracking_uri}
[optimize.gate]
cosine_mean_pass = 0.9
cosine_mean_caution = 0.8
min_engine_cosine = 0.9
max_task_loss = 1.0
max_champion_latency_ratio = 1000.0
max_champion_p95_ratio = 1000.0
max_champion_memory_ratio = 1000.0
max_champion_task_loss = 1.0
min_champion_throughput_ratio = 0.001
[promote.approval]
approvers = ["ada", "grace"]
refuse_requester = true
valid_hours = 72
[[promote.workers]]
url = {worker}
root = {root}
admin_token_file = {token}
[[promote.webhooks]]
url = {webhook}
secret_file = {token}
attempts = 1
"""


@dataclass(frozen=True)
class Stage:
    """The running servers and the working folder that `thorforge` and the Prefect worker share."""

    project: Project
    folder: Path
    prefect_api: str
    prefect_ui: str
    mlflow: str
    registry: str
    worker_port: int

    def thorforge(self, *arguments: str, status: int = 0, timeout: float = 300) -> str:
        """Run the command line in the working folder; its standard output, or its error where `status` is not 0."""
        command = [sys.executable, "-c", "from flows.cli import main; main()", *arguments]
        done = self.project.run(*command, timeout=timeout)
        assert done.returncode == status, (
            f"{arguments}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        )
        return done.stdout if status == 0 else done.stderr

    def optimize(self, variant: str) -> str:
        """Forge and publish one candidate; its digest."""
        document = json.loads(self.thorforge("optimize", "--variant", variant, "--json").splitlines()[-1])
        assert document["published"]["name"] == variant
        return str(document["published"]["digest"])

    def start_promotion(self, digest: str, requested_by: str = "linus") -> dict[str, Any]:
        """A run of `promote`."""
        return self.start("promote/production", digest=digest, requested_by=requested_by, reason="a test")

    def start(self, name: str, **parameters: object) -> dict[str, Any]:
        """Start a deployment on the model, as the pages or a schedule would; the flow run."""
        deployment = self.ask("GET", f"/deployments/name/{name}")
        parameters = {"model": MODEL, **parameters}
        run: dict[str, Any] = self.ask(
            "POST", f"/deployments/{deployment['id']}/create_flow_run", json={"parameters": parameters}
        )
        return run

    def state(self, run: dict[str, Any]) -> dict[str, Any]:
        """What the server says of a run."""
        found: dict[str, Any] = self.ask("GET", f"/flow_runs/{run['id']}")["state"]
        return found

    def let_approvals_last(self, hours: float) -> None:
        """Change the setting for the runs that start from now on."""
        path = self.folder / "thorforge.toml"
        path.write_text(re.sub(r"valid_hours = .*", f"valid_hours = {hours}", path.read_text()))

    def wait_for(self, run: dict[str, Any], *names: str, other_than: str = "") -> dict[str, Any]:
        """The state of the run once it has one of these names; `other_than` is the id of a state that is past."""

        def look() -> dict[str, Any] | None:
            state = self.state(run)
            is_end = state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
            assert state["name"] in names or not is_end, state
            return state if state["name"] in names and state["id"] != other_than else None

        return wait_until(look)

    def resume(self, run: dict[str, Any], **answer: object) -> dict[str, Any]:
        """The HTTP hook: what any program posts to answer."""
        result: dict[str, Any] = self.ask("POST", f"/flow_runs/{run['id']}/resume", json={"run_input": answer})
        return result

    def ask(self, method: str, path: str, **options: Any) -> Any:
        """Prefect's API, which asks to come again while its SQLite is locked."""

        def look() -> httpx.Response | None:
            reply = httpx.request(method, f"{self.prefect_api}{path}", trust_env=False, timeout=60, **options)
            return None if reply.status_code == httpx.codes.SERVICE_UNAVAILABLE else reply

        reply = wait_until(look)
        assert reply.is_success, reply.text
        return reply.json()

    def embed(self, text: str) -> np.ndarray:
        """A vector from the serving worker."""
        body = {"text": text, "encoding_format": "base64"}
        reply = httpx.post(f"http://127.0.0.1:{self.worker_port}/api/v1/embed", json=body, trust_env=False).json()
        return np.frombuffer(base64.b64decode(reply["embedding"]), dtype="<f4")

    def served_digest(self) -> str:
        """What the serving worker says it serves."""
        models = httpx.get(f"http://127.0.0.1:{self.worker_port}/api/v1/models", trust_env=False).json()["models"]
        (digest,) = [str(model["digest"]) for model in models if model["weight"] > 0]
        return digest

    def aliases(self) -> dict[str, str]:
        """MLflow's aliases by digest, as MLflow's own client has them."""
        from mlflow import MlflowClient

        client = MlflowClient(self.mlflow)
        named = client.get_registered_model(MODEL).aliases
        return {alias: client.get_model_version(MODEL, version).tags["digest"] for alias, version in named.items()}

    def ledger(self) -> list[dict[str, Any]]:
        """The events of the ledger, oldest first."""
        entries = json.loads(self.thorforge("log", "--model", MODEL, "--limit", "200", "--json"))
        return [entry["event"] for entry in reversed(entries)]


def wait_until(look: Callable[[], Any]) -> Any:
    """What `look` returns, once that is something."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < deadline:
        if (found := look()) is not None:
            return found
        time.sleep(_POLL_SECONDS)
    raise AssertionError(f"nothing came of it within {_WAIT_SECONDS} s")


@contextmanager
def run_stage(folder: Path, teacher: Path, webhook: str) -> Iterator[Stage]:
    """Start everything but the serving worker, which needs a bundle to start with."""
    state = folder / ".thorforge"
    (state / "prefect").mkdir(parents=True)
    base = make_project(state)
    worker_port = free_port()
    with ExitStack() as stack:
        database = stack.enter_context(run_postgres(free_port()))
        mlflow_env = base.env | {"MLFLOW_SERVER_ALLOWED_HOSTS": "*"}
        artifacts = ["--artifacts-destination", (folder / "mlflow-artifacts").as_uri()]
        mlflow = stack.enter_context(run_mlflow_server(database, mlflow_env, free_port(), *artifacts))
        registry = stack.enter_context(s3_server())
        prefect = stack.enter_context(run_prefect_server(base.env, free_port()))
        env = (
            base.env
            | CREDENTIALS
            | {
                "PREFECT_API_URL": prefect.api_url,
                "PREFECT_WORKER_QUERY_SECONDS": "1",
                "PWD": str(folder),
            }
        )
        settings = {
            "teacher": teacher,
            "corpus": write_corpus(folder / "corpus.jsonl"),
            "registry": registry,
            "tracking_uri": mlflow,
            "worker": f"http://127.0.0.1:{worker_port}",
            "root": folder / "bundles",
            "token": folder / "token",
            "webhook": webhook,
        }
        quoted = {name: json.dumps(str(value)) for name, value in settings.items()}
        (folder / "thorforge.toml").write_text(_SETTINGS.format(**quoted))
        (folder / "token").write_text(ADMIN_TOKEN + "\n")
        (folder / "bundles").mkdir()
        for name in ("flows", "tasks", "serving", "registry", "prefect.yaml"):  # a checkout, with settings of its own
            (folder / name).symlink_to(ROOT / name)
        project = Project(state, env, folder)
        _deploy(project)
        serve = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "thor"]
        stack.enter_context(run_process(serve, env, folder))
        yield Stage(project, folder, prefect.api_url, prefect.ui_url, mlflow, registry, worker_port)


def _deploy(project: Project) -> None:
    for command in (["work-pool", "create", "thor", "--type", "process"], ["deploy", "--all"]):
        done = project.run(sys.executable, "-m", "prefect", "--no-prompt", *command, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
