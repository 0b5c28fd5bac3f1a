"""What `reproduce` takes from the record of a run; tests/flows/test_optimize.py makes a run again."""

from pathlib import Path

import pytest

from flows.config import ConfigRejected, OptimizeConfig
from flows.optimize import Outcome
from flows.reproduce import reproduce
from tasks.reporting.record import RunRecord
from tests.forge import Forge

CONFIG = OptimizeConfig(variants=("fp32-onnx", "int8-dynamic"), dask_scheduler="tcp://gone:8786")
RECORD = RunRecord(config=CONFIG.model_dump(mode="json"), versions={}, digests={}, metrics={})


@pytest.fixture
def asked(forge: Forge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[OptimizeConfig]:
    """The settings of every run that was asked for; none is made."""
    asked = list[OptimizeConfig]()

    def run(config: OptimizeConfig, refresh: bool) -> Outcome:
        assert refresh
        asked.append(config)
        return Outcome(study=forge.study, published=None, report=tmp_path / "report.html", run_id="4567")

    monkeypatch.setattr("flows.reproduce.read_document", lambda *_: RECORD.model_dump())
    monkeypatch.setattr("flows.reproduce.run_optimize", run)
    return asked


@pytest.mark.parametrize("name", ["int8-static", "no-such"])  # one that could be made, and one that nobody knows
def test_reproduce_of_a_variant_that_the_run_did_not_make_says_what_it_made(
    name: str, asked: list[OptimizeConfig]
) -> None:
    with pytest.raises(ConfigRejected, match=f"run 0123 made no '{name}', it made fp32-onnx, int8-dynamic"):
        reproduce("0123", None, ("fp32-onnx", name))
    assert asked == []


def test_reproduce_does_not_need_the_scheduler_of_then(asked: list[OptimizeConfig]) -> None:
    reproduce("0123", None)
    reproduce("0123", None, ("fp32-onnx",), dask_scheduler="tcp://here:8786")
    assert [config.dask_scheduler for config in asked] == [None, "tcp://here:8786"]
    assert [config.variants for config in asked] == [CONFIG.variants, ("fp32-onnx",)]
