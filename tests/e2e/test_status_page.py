"""The worker's own pages in a real browser: they show live figures and load nothing from elsewhere."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect, sync_playwright

from registry.manifest import read_manifest
from tests.bundles import make_bundle
from tests.worker import RunningWorker, run_worker

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

KEY, TOKEN = "key-of-a-client", "token-of-an-admin"


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningWorker]:
    """A worker on the tiny bundle that has answered some requests."""
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    make_bundle(folder)
    with run_worker(folder) as running:
        for count in (1, 1, 1, 3, 20, 100):
            httpx.post(f"{running.base_url}/api/v1/embed", json={"texts": ["red cat"] * count}, trust_env=False)
        yield running


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningWorker]:
    """A worker with keys that shares one model's requests out between two versions, nine to one."""
    folder = tmp_path_factory.mktemp("bundles")
    for seed in range(2):
        make_bundle(folder / f"v{seed}", seed=seed)
    weights = {
        "tiny": dict(zip((read_manifest(folder / f"v{seed}").version for seed in range(2)), (90, 10), strict=True))
    }
    env = {"AKIDB_EMBEDDING_SECURITY_API_KEYS": KEY, "AKIDB_EMBEDDING_SECURITY_ADMIN_TOKENS": TOKEN}
    env["AKIDB_EMBEDDING_TRAFFIC_WEIGHTS"] = json.dumps(weights)
    with run_worker(folder / "v0", "--bundle", str(folder / "v1"), env=env) as running:
        yield running


def versions(worker: RunningWorker) -> tuple[str, str]:
    """The two versions served, the one with the greater weight first."""
    headers = {"authorization": f"Bearer {KEY}"}
    models = httpx.get(f"{worker.base_url}/api/v1/models", headers=headers, trust_env=False).json()["models"]
    first, second = sorted(models, key=lambda model: -model["weight"])
    return first["version"], second["version"]


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page of headless Chromium that fails the test on any message of the console."""
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        opened = browser.new_page(viewport={"width": 1200, "height": 1100}, color_scheme=request.param)
        said: list[str] = []
        opened.on("console", lambda message: said.append(message.text))
        opened.on("pageerror", lambda error: said.append(str(error)))
        yield opened
        browser.close()
    assert [line for line in said if not line.startswith("Failed to load resource")] == []  # a 400 that was meant


def test_status_page_shows_what_is_served_and_compares_texts(
    page: Page, worker: RunningWorker, tmp_path_factory: pytest.TempPathFactory
) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(worker.base_url)
    expect(page.get_by_role("status")).to_have_text("ready")
    model = httpx.get(f"{worker.base_url}/api/v1/models", trust_env=False).json()["models"][0]
    expect(page.get_by_role("cell", name=model["version"], exact=True)).to_be_visible()
    expect(page.get_by_role("cell", name="100 %")).to_be_visible()
    expect(page.locator(".tile", has_text="Latency p50").locator("b")).to_contain_text("ms")
    expect(page.locator("#batches i").first).to_be_visible()
    page.get_by_label("Text 1").fill("red cat")
    page.get_by_label("Text 2").fill("red cat")
    page.get_by_role("button", name="Embed and compare").click()
    expect(page.get_by_role("cell", name="1.0000", exact=True).last).to_be_visible()
    expect(page.locator("#rate polyline")).to_have_attribute("points", re.compile(r"\d"), timeout=10_000)
    assert all(url.startswith((worker.base_url, "data:")) for url in asked)
    page.screenshot(path=tmp_path_factory.mktemp("screens") / "status.png", full_page=True)
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_status_page_says_what_is_wrong(page: Page, worker: RunningWorker) -> None:
    page.goto(worker.base_url)
    expect(page.get_by_role("status")).to_have_text("ready")
    page.get_by_label("Text 2").fill("a" * 1_000_001)
    page.get_by_role("button", name="Embed and compare").click()
    expect(page.get_by_text("text 1 has 1000001 characters, limit 1000000")).to_be_visible()


def test_documentation_page_sends_every_example(page: Page, worker: RunningWorker, tmp_path: Path) -> None:
    page.goto(f"{worker.base_url}/docs")
    paths = httpx.get(f"{worker.base_url}/openapi.json", trust_env=False).json()["paths"]
    expect(page.locator("details")).to_have_count(sum(map(len, paths.values())))
    view = page.locator("details").first
    names = view.locator("option").all_text_contents()
    assert len(names) > 1
    for name in names:
        view.locator("select").select_option(name)
        view.get_by_role("button", name="Send").click()
        expect(view.locator("pre").first).to_contain_text("200 OK")
        view.locator("pre").first.evaluate("node => { node.textContent = '' }")
    page.screenshot(path=tmp_path / "docs.png")


def test_documentation_page_sends_the_admin_token_it_is_given(page: Page, shared: RunningWorker) -> None:
    page.goto(f"{shared.base_url}/docs")
    view = page.locator("details", has=page.get_by_text("/api/v1/admin/traffic", exact=True))
    view.locator("summary").click()
    view.get_by_role("button", name="Send").click()
    expect(view.locator("pre").first).to_contain_text("401")
    page.get_by_label("API key or admin token").fill(TOKEN)
    major, minor = versions(shared)
    body = {"model": "tiny", "weights": {major: 90, minor: 10}}
    view.locator("textarea").fill(json.dumps(body))
    view.get_by_role("button", name="Send").click()
    expect(view.locator("pre").first).to_contain_text("200 OK")


def test_status_page_shares_weights_out_and_compares_only_what_is_served(
    page: Page, shared: RunningWorker, tmp_path: Path
) -> None:
    major, minor = versions(shared)
    wrong = {"authorization": f"Bearer {KEY}", "x-model-version": minor}
    body = {"text": "red", "dimensions": 10_000}
    httpx.post(f"{shared.base_url}/api/v1/embed", json=body, headers=wrong, trust_env=False)
    page.goto(shared.base_url)
    expect(page.get_by_role("status")).to_contain_text("wants an API key")
    page.get_by_label("API key").fill(KEY)
    expect(page.get_by_role("row", name=major)).to_contain_text("90 %")
    expect(page.get_by_role("row", name=minor)).to_contain_text("10 %")
    expect(page.get_by_role("row", name=minor)).to_contain_text("invalid request")
    expect(page.get_by_role("row", name=major)).not_to_contain_text("invalid request")
    listed = httpx.get(f"{shared.base_url}/api/v1/models", headers={"authorization": f"Bearer {KEY}"}, trust_env=False)
    document = listed.json()
    draining = {"weight": 0, "state": "draining", "ready": False, "default": False}
    long = {"version": "int8-openvino-f90db384ea29", "engine": "openvino 2026.4.1 + onnxruntime 1.31.1"}
    document["models"].append(document["models"][0] | draining | long)  # a real one drains too briefly to be looked at
    page.route("**/api/v1/models", lambda route: route.fulfill(json=document))
    expect(page.get_by_role("row", name="int8-openvino-f90db384ea29")).to_contain_text("draining")
    assert page.locator("#version-a option").all_text_contents() == [f"tiny · {name}" for name in (major, minor)]
    page.screenshot(path=tmp_path / "status.png", full_page=True)
    table = page.locator("#models")
    assert table.evaluate("node => node.scrollWidth <= node.parentElement.clientWidth")  # nothing is cut off
