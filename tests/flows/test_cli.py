import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import app, main
from flows.doctor import Finding, examine_node
from flows.optimize import Outcome
from flows.run import print_outcome
from registry.gate import Measurement
from tasks.publish import Origin, assemble_bundle
from tests.forge import Forge
from tests.texts import make_pairs, make_sentences


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture
def sts(tmp_path: Path) -> Path:
    texts = make_sentences(40)
    rows = [f"{i % 6}\t{texts[i]}\t{texts[i + 20]}" for i in range(20)]
    path = tmp_path / "tiny_sts.tsv"
    path.write_text("\n".join(["score\tsentence1\tsentence2", *rows]) + "\n")
    return path


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny_beir"
    (folder / "qrels").mkdir(parents=True)
    pairs = make_pairs(30)
    for name, key in (("corpus", "text"), ("queries", "query")):
        lines = [json.dumps({"_id": f"{name[0]}{i}", "text": pair[key]}) for i, pair in enumerate(pairs)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    qrels = [f"q{i}\tc{i}\t1" for i in range(25)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *qrels]) + "\n")
    return folder


def scores(output: str) -> dict[str, Any]:
    document = json.loads(output.splitlines()[-1])
    return {score["metric"]: score for score in document["scores"]}


def test_cli_help_lists_the_commands(runner: CliRunner) -> None:
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("optimize", "serve", "evaluate", "doctor", "registry"):
        assert command in result.output
    assert "thorforge doctor" in result.output


@pytest.mark.parametrize("command", ["optimize", "evaluate", "profile", "doctor", "registry"])
def test_cli_every_command_explains_itself(command: str, runner: CliRunner) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_cli_doctor_shows_a_table(runner: CliRunner) -> None:
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0
    for subject in ("processor", "python", "disk", "onnxruntime", "openvino", "torch", "mlflow"):
        assert subject in result.output


def test_cli_doctor_prints_one_json_document(runner: CliRunner) -> None:
    result = runner.invoke(app, ["doctor", "--json"])
    findings = {finding["subject"]: finding for finding in json.loads(result.stdout)}
    assert findings["onnxruntime"]["is_present"] is True
    assert all(set(f) == {"subject", "is_present", "detail", "brings", "remedy"} for f in findings.values())
    assert all(f["remedy"] for f in findings.values() if not f["is_present"])
    assert [finding.subject for finding in examine_node()] == list(findings)


def test_cli_doctor_without_a_driver_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("serving.engines._DRIVER_PATHS", ())
    for finding in find_gpu():
        assert (finding.is_present, finding.detail) == (False, "no driver found")
        assert "install the NVIDIA driver" in finding.remedy


@pytest.mark.parametrize("is_present", [True, False])
def test_cli_doctor_asks_the_cuda_engine_wherever_there_is_a_driver(
    is_present: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A Jetson or a slim container has a driver and no nvidia-smi, and the engine runs."""
    answer = {"is_present": is_present, "detail": "NVIDIA Thor, f16", "remedy": "" if is_present else "install gcc"}
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n[ \"$2\" = serving.engines.cuda_node ] && echo '{json.dumps(answer)}'\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("serving.engines._DRIVER_PATHS", (str(python),))
    gpu, engine = find_gpu()
    assert (engine.is_present, engine.detail, engine.remedy) == tuple(answer.values())
    assert (gpu.is_present, gpu.detail) == (False, "a driver, but no nvidia-smi that names the GPU")


def find_gpu() -> list[Finding]:
    """What doctor says about the GPU and about its engine."""
    return [finding for finding in examine_node() if finding.subject in {"NVIDIA GPU", "CUDA engine"}]


@pytest.mark.parametrize(
    ("script", "present", "detail"),
    [
        ("echo 'NVIDIA Thor, 11.0, 580.1, 131072 MiB'", True, "NVIDIA Thor, 11.0"),
        ("exit 9", False, "finds no GPU"),
        ("exit 0", False, "finds no GPU"),
        ("sleep 100", False, "does not answer"),
    ],
)
def test_cli_doctor_asks_the_driver(
    script: str, present: bool, detail: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nexec /bin/{script}\n" if script.startswith("sleep") else f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("flows.doctor._DRIVER_SECONDS", 0.3)
    gpu, _ = find_gpu()
    assert gpu.is_present is present
    assert detail in gpu.detail


def test_cli_evaluate_scores_a_model_as_json_and_as_a_table(
    runner: CliRunner, tiny_teacher: Path, sts: Path, beir: Path
) -> None:
    arguments = ["evaluate", str(tiny_teacher), "--sts", str(sts), "--beir", str(beir)]
    result = runner.invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = scores(result.stdout)
    assert set(found) == {"sts_spearman", "ndcg_at_10", "recall_at_10"}
    assert [found[name]["count"] for name in ("sts_spearman", "ndcg_at_10")] == [20, 25]
    assert all(score["low"] <= score["value"] <= score["high"] for score in found.values())
    table = runner.invoke(app, arguments)
    assert table.exit_code == 0
    for name, score in found.items():
        assert name in table.stdout
        assert f"{score['value']:.2f}" in table.stdout


def test_cli_evaluate_scores_a_bundle_as_its_teacher(
    runner: CliRunner, forge: Forge, tiny_teacher: Path, beir: Path
) -> None:
    origin = Origin(mlflow_run_id=None, git_commit=None)
    bundle = assemble_bundle.fn(forge.study, "fp32-onnx", forge.teacher_embeddings, origin).folder
    both = [runner.invoke(app, ["evaluate", str(s), "--beir", str(beir), "--json"]) for s in (tiny_teacher, bundle)]
    model, own = (scores(result.stdout) for result in both)
    assert json.loads(both[1].stdout)["kind"] == "bundle"
    assert own["ndcg_at_10"]["value"] == pytest.approx(model["ndcg_at_10"]["value"], abs=0.5)


def test_cli_evaluate_without_data_is_a_usage_error(runner: CliRunner, tiny_teacher: Path) -> None:
    result = runner.invoke(app, ["evaluate", str(tiny_teacher)])
    assert result.exit_code == 2
    assert "--sts" in result.output


ERRORS = [
    (["evaluate", "no/such/model", "--sts", "x.tsv"], "error: model 'no/such/model' is no folder"),
    (["evaluate", "http://127.0.0.1:9", "--sts", "x.tsv"], "error: http://127.0.0.1:9 does not answer"),
    (["optimize", "--config", "none.toml"], "error: settings file none.toml does not exist"),
    (["optimize", "--variant", "int4"], "error: the command line: optimize: Value error, 'int4' is no variant"),
    (["profile", "no/such/model", "--compute", "fp8"], "error: compute 'fp8' is unknown: give f16 or f8"),
    (["registry", "list", "../x"], "error: "),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS)
def test_cli_error_is_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["thorforge", *arguments])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGTERM, before)
    captured = capsys.readouterr()
    assert ended.value.code == 1
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_cli_error_is_one_line_in_a_process_of_its_own(tmp_path: Path) -> None:
    code = "import sys; from flows.cli import main; sys.argv[0] = 'thorforge'; main()"
    command = [sys.executable, "-c", code, "evaluate", "nothing", "--sts", "x.tsv"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: model 'nothing' is no folder")


def test_json_of_a_run_with_a_candidate_that_embeds_no_numbers_has_nulls(
    forge: Forge, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, nothing = forge.study.find("fp32-onnx"), Measurement(math.nan, math.nan, math.nan)
    quality = row.quality.model_copy(update={"metrics": row.quality.metrics | {"cosine_mean": nothing}})
    study = forge.study.model_copy(update={"judged": (row.model_copy(update={"quality": quality}),)})
    print_outcome(Outcome(study=study, published=None, report=tmp_path, run_id="0123"), as_json=True)
    candidate = json.loads(capsys.readouterr().out)["candidates"][0]
    assert (candidate["cosine_mean"], candidate["cosine_mean_ci"]) == (None, [None, None])
