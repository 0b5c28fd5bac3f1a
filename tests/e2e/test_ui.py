"""What people look at: MLflow's compare view, Prefect's artifacts and the HTML report, in a real browser."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlflow import MlflowClient
from playwright.sync_api import Page, expect, sync_playwright

from tests.e2e.conftest import Project
from tests.servers import PrefectServer, free_port, run_mlflow_server

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

_PAGE_MILLISECONDS = 60_000


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """A page of headless Chromium."""
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        opened = browser.new_page(viewport={"width": 1600, "height": 2400})
        opened.set_default_timeout(_PAGE_MILLISECONDS)
        yield opened
        browser.close()


def test_mlflow_compares_the_candidates(
    page: Page, project: Project, optimized: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    uri = f"sqlite:///{project.folder}/mlflow/mlflow.db"
    with run_mlflow_server(uri, project.env, free_port()) as url:
        client = MlflowClient(url)
        experiment = client.get_experiment_by_name("optimize")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        parent = next(run for run in runs if run.data.tags.get("chosen") == optimized["published"]["name"])
        children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        assert {run.info.run_name for run in children} == {candidate["name"] for candidate in optimized["candidates"]}
        assert len({frozenset(run.data.metrics) for run in [parent, *children]}) == 1
        artifacts = {item.path for item in client.list_artifacts(parent.info.run_id)}
        assert {"pareto.png", "latency_cdf.png", "report.html", "manifest.json"} <= artifacts
        versions = client.search_model_versions(f"name = '{optimized['model']}'")
        assert optimized["published"]["digest"] in {version.tags["digest"] for version in versions}

        selected = json.dumps([run.info.run_id for run in children])
        page.goto(f'{url}/#/compare-runs?runs={selected}&experiments=["{experiment.experiment_id}"]')
        title = f"Comparing {len(children)} Runs from 1 Experiment"
        expect(page.get_by_text(title)).to_be_visible(timeout=_PAGE_MILLISECONDS)
        for name in ("int8-openvino", "bf16-openvino", "quality.cosine_mean"):
            expect(page.get_by_text(name, exact=True).first).to_be_attached(timeout=_PAGE_MILLISECONDS)
        page.screenshot(path=tmp_path_factory.mktemp("screens") / "compare.png")


def test_prefect_shows_results_verdicts_and_progress(
    page: Page, optimized: dict[str, Any], prefect_server: PrefectServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    screens = tmp_path_factory.mktemp("screens")
    named = {"flow_runs": {"name": {"any_": [Path(optimized["report"]).parent.name]}}}
    (run,) = httpx.post(f"{prefect_server.api_url}/flow_runs/filter", json=named, trust_env=False).json()

    open_run_artifact(page, f"{prefect_server.ui_url}/runs/flow-run/{run['id']}", "optimize-results")
    for candidate in optimized["candidates"]:
        row = page.get_by_role("row").filter(has=page.get_by_text(candidate["name"], exact=True))
        expect(row.get_by_text(candidate["verdict"], exact=True)).to_be_visible()
    page.screenshot(path=screens / "results.png")

    open_run_artifact(page, f"{prefect_server.ui_url}/runs/flow-run/{run['id']}", "optimize-verdicts")
    for candidate in optimized["candidates"]:
        expect(page.get_by_role("heading", name=f"{candidate['name']}: {candidate['verdict']}")).to_be_visible()
    expect(page.get_by_text(optimized["published"]["digest"])).to_be_visible()
    page.screenshot(path=screens / "verdicts.png")

    # The run may have taken its steps from the cache: the newest progress of each, of whichever run, is listed here.
    page.goto(f"{prefect_server.ui_url}/artifacts")
    page.get_by_text("benchmark", exact=True).first.click()
    page.get_by_role("link", name=re.compile("^[0-9a-f]{8}$")).first.click()
    expect(page.get_by_text("Progress: 100%")).to_be_visible()
    page.screenshot(path=screens / "progress.png")


def open_run_artifact(page: Page, run_url: str, key: str) -> None:
    """Go to a flow run's page and from there to one of its artifacts, as a person does."""
    page.goto(run_url)
    page.get_by_role("tablist").get_by_text("Artifacts", exact=True).click()
    page.get_by_role("tabpanel").get_by_role("link", name=key).click()


def test_report_reads_without_network_or_script(page: Page, optimized: dict[str, Any]) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    report = Path(optimized["report"]).as_uri()
    page.goto(report)
    assert asked == [report]
    expect(page.get_by_role("heading", name=optimized["model"])).to_be_visible()
    for candidate in optimized["candidates"]:
        expect(page.get_by_role("cell", name=candidate["name"], exact=True)).to_be_visible()
    pictures = [figure.get_attribute("aria-label") for figure in page.locator("figure:has(svg)").all()]
    assert pictures == ["pareto", "latency_cdf", "sensitivity_int8-static", "calibration"]
    box = page.locator("table").bounding_box()
    assert box is not None
    assert box["width"] <= 1600
