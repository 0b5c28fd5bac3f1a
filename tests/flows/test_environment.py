import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.environment import make_state_folder, prepare_environment

ROOT = Path(__file__).parents[2]
VARIABLES = ("PREFECT_HOME", "PREFECT_SERVER_ANALYTICS_ENABLED", "MLFLOW_DISABLE_TELEMETRY", "ORT_DISABLE_TELEMETRY")

EVERYTHING = """
from flows.environment import make_state_folder, prepare_environment
prepare_environment()
make_state_folder()
import matplotlib.figure, mlflow, nncf, onnxruntime, openvino, prefect, sentence_transformers, torch, transformers
openvino.Core()
import flows.cli, flows.run
from tasks.tracking import default_tracking_uri, track_run
with track_run(default_tracking_uri(), "quiet", {"model": "m"}) as tracker:
    tracker.log_parent(None, {}, {})
"""


def test_environment_keeps_every_library_out_of_the_home_and_the_working_folder(tmp_path: Path, home: Path) -> None:
    own, work = tmp_path / "home", tmp_path / "work"
    own.mkdir()
    work.mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment = {**kept, "HOME": str(own), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", EVERYTHING], check=True, cwd=work, env=environment, timeout=180)
    assert [str(path.relative_to(tmp_path)) for path in (*own.rglob("*"), *work.rglob("*"))] == []
    assert (home / "mlflow" / "mlflow.db").is_file()


@pytest.mark.parametrize("module", ["promote", "answer", "reconcile"])
def test_commands_for_production_start_without_what_only_optimize_needs(module: str, tmp_path: Path) -> None:
    """Each of these takes seconds to import, and somebody waits at a terminal."""
    absent = ("scipy", "matplotlib", "torch", "mlflow", "onnxruntime", "sentence_transformers")
    code = (
        "from flows.environment import prepare_environment\nprepare_environment()\n"
        f"import sys\nimport flows.cli, flows.local_run, flows.{module}\n"
        f"assert not sys.modules.keys() & set({absent}), sys.modules.keys() & set({absent})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment, timeout=180)


def test_environment_leaves_what_is_set(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    for name in VARIABLES[1:]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", "/elsewhere")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    prepare_environment()
    assert os.environ["PREFECT_HOME"] == "/elsewhere"
    assert os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
    make_state_folder()
    assert (home / "prefect").is_dir()
