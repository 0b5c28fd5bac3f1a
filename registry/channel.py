"""Channels: named pointers to digests, moved by compare-and-swap so that nobody overwrites what they have not seen."""

from datetime import UTC, datetime
from typing import Literal, get_args

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from registry.errors import BundleNotFound, ChannelMoved, ChannelNotFound, RecordInvalid, ReferenceInvalid
from registry.manifest import SafeName, Sha256, describe_validation
from registry.store import Store, check_model_name

__all__ = ["CHANNELS", "ChannelName", "ChannelRecord", "move_channel", "read_channel", "read_channels"]

ChannelName = Literal["production", "canary"]
CHANNELS: tuple[str, ...] = get_args(ChannelName)


class ChannelRecord(BaseModel):
    """Where a channel points, where it pointed before (None at first), and who moved it when.

    `sequence` counts the moves from 1, so two records of one channel are never equal.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: SafeName
    channel: ChannelName
    digest: Sha256
    previous: Sha256 | None
    sequence: int = Field(ge=1)
    moved_at: AwareDatetime
    moved_by: str = Field(min_length=1, max_length=256)


def read_channel(store: Store, model: str, channel: str) -> ChannelRecord:
    """Read where a channel points. Raises ReferenceInvalid, ChannelNotFound (never set) or RecordInvalid."""
    record, _ = _read(store, model, channel)
    if record is None:
        raise ChannelNotFound(f"channel {channel} of {model} was never set in {store}")
    return record


def read_channels(store: Store, model: str) -> list[ChannelRecord]:
    """The records of a model's channels that were set."""
    records = (_read(store, model, channel)[0] for channel in CHANNELS)
    return [record for record in records if record is not None]


def move_channel(
    store: Store, model: str, channel: str, digest: str, expected: str | None, *, moved_by: str
) -> ChannelRecord:
    """Point a channel at `digest` if it still points at `expected` (None: was never set), and return the new record.

    Moving a channel to where it already points changes nothing: `previous` stays the bundle to roll back to.
    Raises ChannelMoved (names where it points now), BundleNotFound (the store lacks `digest`), ReferenceInvalid,
    RecordInvalid or StoreFull.
    """
    current, data = _read(store, model, channel)
    if digest not in store.list_digests(model):
        raise BundleNotFound(f"channel {channel} cannot move to {digest}: {store} holds no such bundle of {model}")
    if (current.digest if current else None) != expected:
        raise _moved(current, model, channel, expected)
    if current is not None and current.digest == digest:
        return current
    record = _next_record(current, model, channel, digest, moved_by)
    if store.swap_record(_key(model, channel), data, (record.model_dump_json(indent=2) + "\n").encode()):
        return record
    raise _moved(_read(store, model, channel)[0], model, channel, expected)


def _next_record(current: ChannelRecord | None, model: str, channel: str, digest: str, moved_by: str) -> ChannelRecord:
    try:
        return ChannelRecord.model_validate(
            {
                "model": model,
                "channel": channel,
                "digest": digest,
                "previous": current.digest if current else None,
                "sequence": current.sequence + 1 if current else 1,
                "moved_at": datetime.now(UTC),
                "moved_by": moved_by,
            }
        )
    except ValidationError as error:
        raise RecordInvalid(f"channel {channel} of {model}: {describe_validation(error)}") from None


def _read(store: Store, model: str, channel: str) -> tuple[ChannelRecord | None, bytes | None]:
    data = store.read_record(_key(model, channel))
    if data is None:
        return None, None
    try:
        return ChannelRecord.model_validate_json(data), data
    except ValidationError as error:
        raise RecordInvalid(f"channel {channel} of {model} in {store}: {describe_validation(error)}") from None


def _key(model: str, channel: str) -> str:
    if channel not in CHANNELS:
        raise ReferenceInvalid(f"{channel!r} is not a channel: use one of {', '.join(CHANNELS)}")
    check_model_name(model)
    return f"channels/{model}/{channel}.json"


def _moved(current: ChannelRecord | None, model: str, channel: str, expected: str | None) -> ChannelMoved:
    now = f"points at {current.digest} (move {current.sequence} by {current.moved_by})" if current else "was never set"
    return ChannelMoved(f"channel {channel} of {model} {now}, expected {expected or 'that it was never set'}")
