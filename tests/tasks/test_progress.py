import logging

import pytest
from prefect import flow, task
from prefect.artifacts import Artifact

from tasks import progress as module
from tasks.progress import progress


def test_progress_outside_prefect_logs_where_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_REPORT_SECONDS", 0.0)
    caplog.set_level(logging.INFO, logger="thorforge")
    with progress("evaluate tiny", 4) as advance:
        advance(1)
        advance(2)
        advance(1)
    messages = [record.getMessage() for record in caplog.records if record.name == "thorforge"]
    assert messages == ["evaluate tiny: 1 of 4 (25 %)", "evaluate tiny: 3 of 4 (75 %)"]


def test_progress_is_quiet_for_short_work(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="thorforge")
    with progress("short", 2) as advance:
        advance(2)
    assert [record for record in caplog.records if record.name == "thorforge"] == []


@task
def work() -> None:
    with progress("Work: part 1!", 10) as advance:
        advance(10)


@flow
def working() -> None:
    work()


@pytest.mark.usefixtures("prefect")
def test_progress_in_a_task_ends_as_a_full_prefect_artifact() -> None:
    working()
    found = Artifact.get(key="work-part-1")
    assert found is not None
    assert (found.type, found.data) == ("progress", 100.0)
