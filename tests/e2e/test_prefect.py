"""The flow as a deployment: a real Prefect server, a real worker process, the commands of the README."""

import sys

import httpx
import pytest

from tests.e2e.conftest import Project
from tests.servers import PrefectServer, run_process

pytestmark = pytest.mark.e2e


def test_deployment_completes_on_a_real_server_and_worker(project: Project, prefect_server: PrefectServer) -> None:
    env = project.env | {"PREFECT_API_URL": prefect_server.api_url}
    served = Project(project.folder, env)
    prefect = [sys.executable, "-m", "prefect"]
    for command in (["work-pool", "create", "thor", "--type", "process"], ["deploy", "--all"]):
        done = served.run(*prefect, "--no-prompt", *command)
        assert done.returncode == 0, done.stdout + done.stderr
    with run_process([*prefect, "worker", "start", "--pool", "thor"], env):
        done = served.run(*prefect, "deployment", "run", "optimize/minilm", "--watch", timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    deployed = {"deployments": {"name": {"any_": ["minilm"]}}}
    runs = httpx.post(f"{prefect_server.api_url}/flow_runs/filter", json=deployed, trust_env=False).json()
    assert [run["state_type"] for run in runs] == ["COMPLETED"]
    artifacts = httpx.post(f"{prefect_server.api_url}/artifacts/filter", json={}, trust_env=False).json()
    kinds = {(artifact["type"], artifact["key"]) for artifact in artifacts}
    assert {("table", "optimize-results"), ("markdown", "optimize-verdicts")} <= kinds
    assert ("progress", "benchmark") in kinds
