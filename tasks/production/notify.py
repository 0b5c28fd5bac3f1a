"""Notify: tell webhooks about approvals that wait, promotions and rollbacks; signed, retried, never in the way."""

import hashlib
import hmac
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args
from uuid import uuid4

import httpx
from pydantic import BaseModel, ConfigDict, Field

Event = Literal["approval.waiting", "promotion.refused", "promotion.done", "promotion.undone", "rollback.done"]
EVENTS: tuple[Event, ...] = get_args(Event)
SIGNATURE_HEADER = "x-thorforge-signature"

_FIRST_WAIT_SECONDS = 0.5
_log = logging.getLogger("thorforge.notify")


class WebhookConfig(BaseModel):
    """A URL that is told about promotions by an HTTP POST of JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field(pattern=r"^https?://", description="where to post; may hold a secret, so only its host is logged")
    secret_file: Path | None = Field(
        default=None,
        description="file that holds the key of the HMAC-SHA256 signature; None: unsigned",
    )
    events: tuple[Event, ...] = Field(default=EVENTS, description="which events it gets")
    attempts: int = Field(default=3, ge=1, le=10, description="how often a post is tried before it is given up")
    timeout_seconds: float = Field(default=3, gt=0, le=60, description="how long one attempt may take")


def notify(
    webhooks: Sequence[WebhookConfig],
    event: Event,
    document: Mapping[str, object],
    sleep: Callable[[float], object] = time.sleep,
) -> int:
    """Post `event` to every webhook that wants it; returns how many could not be reached. Never raises.

    The body is JSON of `event`, `id`, `time` and `document`; each attempt doubles the wait before it.
    """
    message = {"event": event, "id": str(uuid4()), "time": int(time.time()), **document}
    body = json.dumps(message, allow_nan=False, default=str).encode()
    return sum(not _post(webhook, event, body, sleep) for webhook in webhooks if event in webhook.events)


def notify_refused(webhooks: Sequence[WebhookConfig], model: str, bundle: str, requested_by: str, reason: str) -> int:
    """Post that a promotion of `bundle` was refused, as `notify` does: who asked for it, and why not."""
    document = {"model": model, "bundle": bundle, "requested_by": requested_by, "reason": reason}
    return notify(webhooks, "promotion.refused", document)


def sign(secret: bytes, timestamp: int, body: bytes) -> str:
    """`t=<unix time>,v1=<hex HMAC-SHA256 of "<unix time>.<body>">`: a receiver refuses old times and other bodies."""
    mac = hmac.new(secret, f"{timestamp}.".encode() + body, hashlib.sha256)
    return f"t={timestamp},v1={mac.hexdigest()}"


def _post(webhook: WebhookConfig, event: Event, body: bytes, sleep: Callable[[float], object]) -> bool:
    host, fault = httpx.URL(webhook.url).host, ""
    for attempt in range(webhook.attempts):
        if attempt:
            sleep(_FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
        try:
            headers = {"content-type": "application/json", **_signature(webhook, body)}
            reply = httpx.post(
                webhook.url, content=body, headers=headers, timeout=webhook.timeout_seconds, trust_env=False
            )
        except (httpx.HTTPError, OSError) as error:  # OSError: its secret cannot be read
            fault = type(error).__name__
            continue
        if reply.is_success:
            return True
        fault = f"status {reply.status_code}"
        if not (reply.is_server_error or reply.status_code == httpx.codes.TOO_MANY_REQUESTS):
            break
    _log.warning("notification not delivered event=%s host=%s attempts=%d reason=%s", event, host, attempt + 1, fault)
    return False


def _signature(webhook: WebhookConfig, body: bytes) -> dict[str, str]:
    if webhook.secret_file is None:
        return {}
    return {SIGNATURE_HEADER: sign(webhook.secret_file.read_bytes().strip(), int(time.time()), body)}
