"""From two candidates to production and back, with every server real: what the trail says and the vectors prove."""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page, expect, sync_playwright
from playwright.sync_api import TimeoutError as PlaywrightTimeout

from tests.e2e.promotion import ADMIN_TOKEN, MODEL, Stage, run_stage, wait_until
from tests.webhooks import Receiver, run_receiver
from tests.worker import run_worker

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

_PAGE_MILLISECONDS, _CLICK_MILLISECONDS = 60_000, 20_000
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
        """The page says so when Prefect's SQLite was locked, and keeps what was typed.

        Whether the answer arrived is for the server to say: on a busy machine the dialog stays a while, or goes just
        before it is clicked again.
        """
        with suppress(PlaywrightTimeout):
            dialog.get_by_role("button", name="Submit").click(timeout=_CLICK_MILLISECONDS)
            dialog.wait_for(state="hidden", timeout=_CLICK_MILLISECONDS)
        return None if stage.state(run)["name"] == "Suspended" else True

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
    first = ["screening", "gate", "refusal", "refusal", "approval", "move", "proof"]
    assert kinds == [*first, "screening", "gate", "approval", "move", "proof", "rollback", "proof"]
    assert [event["bundle"] for event in events if event["kind"] == "screening"] == [story.first, story.second]
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


def test_answer_that_comes_too_late_and_none_at_all_end_the_run_on_record(story: Story) -> None:
    stage = story.stage
    stage.let_approvals_last(hours := 0.002)
    late, unanswered = (stage.start_promotion(story.second) for _ in range(2))
    for run in (late, unanswered):
        asked_at = datetime.fromisoformat(stage.wait_for(run, "Suspended")["timestamp"])
        too_late = asked_at + timedelta(hours=hours, seconds=1)
        wait_until(lambda end=too_late: datetime.now(UTC) > end or None)
    stage.thorforge("approve", late["name"], "--yes", "--by", "ada")
    assert "ApprovalExpired: ada answered after the 0.002 hours" in stage.wait_for(late, "Failed")["message"]
    stage.wait_for(stage.start("reconcile/aliases"), "Completed")
    state = stage.state(unanswered)
    assert state["name"] == "Failed"
    assert "ApprovalExpired: nobody answered after the 0.002 hours" in state["message"]
    stage.let_approvals_last(72)
    refusals = [event for event in stage.ledger() if event["kind"] == "refusal"][-2:]
    assert [event["error"] for event in refusals] == ["ApprovalExpired"] * 2
    assert [event["reason"].split(" after ")[0] for event in refusals] == ["ada answered", "nobody answered"]
    assert [message["event"] for message in story.webhook.messages[-2:]] == ["promotion.refused"] * 2
    assert stage.served_digest() == story.first


def test_rollback_and_reconcile_run_as_deployments(story: Story) -> None:
    from mlflow import MlflowClient

    stage, wanted = story.stage, {"champion": story.second, "previous": story.first}
    run = stage.start("rollback/production", requested_by="oncall", to=story.second[:12], reason="a test")
    stage.wait_for(run, "Completed")
    assert stage.served_digest() == story.second
    assert stage.aliases() == wanted
    moved, proved = stage.ledger()[-2:]
    assert (moved["kind"], moved["bundle"], moved["moved_by"]) == ("rollback", story.second, "oncall")
    assert (proved["kind"], proved["bundle"]) == ("proof", story.second)
    assert story.webhook.messages[-1]["event"] == "rollback.done"
    MlflowClient(stage.mlflow).delete_registered_model_alias(MODEL, "champion")
    stage.wait_for(stage.start("reconcile/aliases"), "Completed")
    assert stage.aliases() == wanted
