"""From two candidates to production and back, with every server real: what the trail says and the vectors prove."""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page, expect, sync_playwright
from playwright.sync_api import TimeoutError as PlaywrightTimeout

from tests.e2e.promotion import ADMIN_TOKEN, MODEL, Stage, run_stage, wait_until
from tests.webhooks import Receiver, run_receiver
from tests.worker import run_worker

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

_PAGE_MILLISECONDS = 60_000
TEXT = "The baker repairs lanterns near the harbour."


@dataclass(frozen=True)
class Story:
    """What happened, for the tests below to look at."""

    stage: Stage
    webhook: Receiver
    first: str
    second: str
    vectors: dict[str, np.ndarray]
    served: dict[str, str]
    aliases: dict[str, dict[str, str]]
    screens: Path
    rollback_seconds: float


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        opened = browser.new_page(viewport={"width": 1600, "height": 1800})
        opened.set_default_timeout(_PAGE_MILLISECONDS)
        yield opened
        browser.close()


@pytest.fixture(scope="module")
def story(page: Page, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder, screens = tmp_path_factory.mktemp("promotion"), tmp_path_factory.mktemp("screens")
    with run_receiver() as webhook, run_stage(folder, tiny_teacher, webhook.url) as stage:
        first = stage.optimize("fp32-onnx")
        start = folder / "bundles" / "start"
        stage.thorforge("registry", "pull", "--registry", stage.registry, MODEL, first, str(start))
        options = ["--port", str(stage.worker_port), "--models-root", str(folder / "bundles")]
        tokens = {"AKIDB_EMBEDDING_SECURITY_ADMIN_TOKENS": ADMIN_TOKEN}
        with run_worker(start, *options, env=tokens):
            yield tell_story(stage, webhook, page, screens, first)


def tell_story(stage: Stage, webhook: Receiver, page: Page, screens: Path, first: str) -> Story:
    vectors: dict[str, np.ndarray] = {}
    served: dict[str, str] = {}
    aliases: dict[str, dict[str, str]] = {}

    def look(moment: str) -> None:
        vectors[moment], served[moment], aliases[moment] = stage.embed(TEXT), stage.served_digest(), stage.aliases()

    approve_by_hook_and_command(stage, first)
    look("first promoted")
    second = stage.optimize("int8-dynamic")
    approve_in_the_pages(stage, page, screens, second)
    look("second promoted")
    started = time.monotonic()
    stage.thorforge("rollback", "--model", MODEL, "--by", "oncall", "--reason", "errors doubled")
    seconds = time.monotonic() - started
    vectors["rolled back"], served["rolled back"] = stage.embed(TEXT), stage.served_digest()
    aliases["before reconcile"] = stage.aliases()
    stage.thorforge("reconcile", "--repair")
    look("rolled back")
    return Story(stage, webhook, first, second, vectors, served, aliases, screens, seconds)


def approve_by_hook_and_command(stage: Stage, digest: str) -> None:
    """The first answer is of another bundle, the second by somebody who may not, the third counts."""
    run = stage.start_promotion(digest)
    state = stage.wait_for(run, "Suspended")
    form = {"approver": "ada", "decision": "approve", "reason": "", "override": False, "gate": "0" * 64}
    refused = stage.resume(run, **form, bundle="not a digest")
    assert refused["status"] == "REJECT"
    stage.resume(run, **form, bundle="f" * 64)
    stage.wait_for(run, "Suspended", other_than=state["id"])
    assert run["name"] in stage.thorforge("approve")
    said = stage.thorforge("approve", run["name"], "--yes", "--by", "mallory", status=1)
    assert "mallory may not approve: the approvers are ada, grace" in said
    stage.thorforge("approve", run["name"], "--yes", "--by", "ada", "--reason", "numbers checked")
    stage.wait_for(run, "Completed")


def approve_in_the_pages(stage: Stage, page: Page, screens: Path, digest: str) -> None:
    """As an approver does: open the run, read the page, fill in the form, submit."""
    run = stage.start_promotion(digest)
    stage.wait_for(run, "Suspended")
    page.goto(f"{stage.prefect_ui}/runs/flow-run/{run['id']}")
    page.get_by_role("button", name="Resume").first.click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_text("The gate says pass")).to_be_visible()
    expect(dialog.get_by_role("link", name="The HTML report")).to_have_attribute("href", re.compile(stage.mlflow))
    name, reason = dialog.get_by_role("textbox").nth(0), dialog.get_by_role("textbox").nth(1)
    name.fill("grace")
    reason.fill("read the report")
    dialog.locator(".p-select-button__control").press("ArrowDown")
    page.get_by_text("approve", exact=True).click()
    page.screenshot(path=screens / "form.png")

    def submit() -> bool | None:
        """The page says so when Prefect's SQLite was locked, and keeps what was typed."""
        dialog.get_by_role("button", name="Submit").click()
        with suppress(PlaywrightTimeout):
            dialog.wait_for(state="hidden", timeout=20_000)
            return True
        return None

    wait_until(submit)
    stage.wait_for(run, "Completed")
    page.reload()
    page.screenshot(path=screens / "completed.png")


def test_production_follows_every_decision(story: Story) -> None:
    assert story.served == {
        "first promoted": story.first,
        "second promoted": story.second,
        "rolled back": story.first,
    }
    first, second, back = (story.vectors[name] for name in ("first promoted", "second promoted", "rolled back"))
    assert np.abs(first - second).max() > 1e-4
    assert np.abs(first - back).max() < 1e-6
    assert story.rollback_seconds < 60


def test_aliases_agree_and_drift_is_mended(story: Story) -> None:
    first, second = story.first, story.second
    assert story.aliases["first promoted"] == {"champion": first}
    assert story.aliases["second promoted"] == {"champion": second, "previous": first}
    assert story.aliases["before reconcile"] == {"champion": second, "previous": first}
    assert story.aliases["rolled back"] == {"champion": first, "previous": second}
    assert "agree" in story.stage.thorforge("reconcile")


def test_ledger_tells_the_story(story: Story) -> None:
    events = story.stage.ledger()
    kinds = [event["kind"] for event in events]
    assert kinds == ["gate", "refusal", "refusal", "approval", "move", "gate", "approval", "move", "rollback"]
    assert [event["error"] for event in events if event["kind"] == "refusal"] == ["ApprovalMismatch", "ApproverUnknown"]
    assert [event["approval"]["approver"] for event in events if event["kind"] == "approval"] == ["ada", "grace"]
    assert [event["bundle"] for event in events if event["kind"] in ("move", "rollback")] == [
        story.first,
        story.second,
        story.first,
    ]
    said = story.stage.thorforge("status")
    assert story.first in said
    assert "rolled back" in said
    assert "by oncall" in said


def test_webhook_was_told(story: Story) -> None:
    events = [message["event"] for message in story.webhook.messages]
    assert events == ["approval.waiting", "promotion.done", "approval.waiting", "promotion.done", "rollback.done"]
    assert all("x-thorforge-signature" in headers for headers in story.webhook.headers)


def test_refusals_end_in_an_error_and_a_record(story: Story) -> None:
    stage = story.stage
    run = stage.start_promotion("0123456789abcdef")
    state = stage.wait_for(run, "Failed")
    assert "BundleNotFound" in state["message"]
    event = wait_until(lambda: stage.ledger()[-1])
    assert (event["kind"], event["error"]) == ("refusal", "BundleNotFound")
