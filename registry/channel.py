"""Channels: named pointers to digests. `registry.moves` moves them; this is the record and how it is read."""

from typing import Literal, get_args

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from registry.errors import ChannelNotFound, RecordInvalid, ReferenceInvalid
from registry.manifest import SafeName, Sha256, describe_validation
from registry.store import Store, check_model_name

__all__ = [
    "CHANNELS", "ChannelName", "ChannelRecord", "read_channel", "read_channel_bytes", "read_channels", "swap_channel",
]  # fmt: skip

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
    record, _ = read_channel_bytes(store, model, channel)
    if record is None:
        raise ChannelNotFound(f"channel {channel} of {model} was never set in {store}")
    return record


def read_channels(store: Store, model: str) -> list[ChannelRecord]:
    """The records of a model's channels that were set."""
    records = (read_channel_bytes(store, model, channel)[0] for channel in CHANNELS)
    return [record for record in records if record is not None]


def swap_channel(store: Store, record: ChannelRecord, seen: bytes | None) -> bool:
    """Write `record` if the channel still holds the bytes `seen` (None: was never set); False if it does not."""
    return store.swap_record(
        _key(record.model, record.channel), seen, (record.model_dump_json(indent=2) + "\n").encode()
    )


def read_channel_bytes(store: Store, model: str, channel: str) -> tuple[ChannelRecord | None, bytes | None]:
    """A channel's record with the bytes that `swap_channel` compares; two None where it was never set."""
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
