import hashlib
import hmac
import logging
from pathlib import Path

import pytest

from tasks.production.notify import SIGNATURE_HEADER, WebhookConfig, notify, notify_refused, sign
from tests.servers import free_port
from tests.webhooks import run_receiver


def no_wait(seconds: float) -> None:
    """Retries without their pauses."""


def test_notify_posts_what_happened_with_a_signature(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret\n")
    with run_receiver() as receiver:
        webhook = WebhookConfig(url=receiver.url, secret_file=secret)
        assert notify([webhook], "promotion.done", {"model": "tiny", "bundle": "a" * 64}) == 0
    (message,), (headers,), (body,) = receiver.messages, receiver.headers, receiver.bodies
    assert (message["event"], message["model"], message["bundle"]) == ("promotion.done", "tiny", "a" * 64)
    time, mac = (part.partition("=")[2] for part in headers[SIGNATURE_HEADER].split(","))
    assert mac == hmac.new(b"s3cret", f"{time}.".encode() + body, hashlib.sha256).hexdigest()
    assert headers[SIGNATURE_HEADER] == sign(b"s3cret", int(time), body)


def test_notify_tries_a_server_error_again_and_no_refusal() -> None:
    with run_receiver(500, 503) as receiver:
        waits: list[float] = []
        assert notify([WebhookConfig(url=receiver.url)], "rollback.done", {}, waits.append) == 0
    assert len(receiver.bodies) == 3
    assert len({message["id"] for message in receiver.messages}) == 1
    assert waits == [0.5, 1.0]
    with run_receiver(404) as receiver:
        assert notify([WebhookConfig(url=receiver.url)], "rollback.done", {}, no_wait) == 1
    assert len(receiver.bodies) == 1


def test_notify_counts_a_dead_webhook_and_keeps_its_secret_out_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    dead = WebhookConfig(url=f"http://127.0.0.1:{free_port()}/token-in-the-path", attempts=2)
    unsigned = dead.model_copy(update={"secret_file": Path("/nowhere/secret"), "attempts": 1})
    with caplog.at_level(logging.WARNING, logger="thorforge.notify"), run_receiver() as receiver:
        hooks = [dead, unsigned, WebhookConfig(url=receiver.url)]
        assert notify(hooks, "promotion.undone", {"model": "tiny"}, no_wait) == 2
    assert len(receiver.bodies) == 1
    assert "event=promotion.undone host=127.0.0.1 attempts=2 reason=ConnectError" in caplog.text
    assert "token-in-the-path" not in caplog.text


def test_notify_sends_only_the_events_asked_for() -> None:
    with run_receiver() as receiver:
        webhook = WebhookConfig(url=receiver.url, events=("approval.waiting",))
        assert notify([webhook], "promotion.done", {}) == 0
        assert notify([webhook], "approval.waiting", {}) == 0
    assert [message["event"] for message in receiver.messages] == ["approval.waiting"]


def test_notify_of_a_refusal_says_who_asked_for_what_and_why_not() -> None:
    with run_receiver() as receiver:
        assert notify_refused([WebhookConfig(url=receiver.url)], "tiny", "a" * 64, "ada", "too late") == 0
    told = {"event": "promotion.refused", "model": "tiny", "bundle": "a" * 64, "requested_by": "ada"}
    assert receiver.messages[0].items() >= (told | {"reason": "too late"}).items()
