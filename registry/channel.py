"""Channels: named pointers to digests. `registry.moves` moves them; this is the record and how it is read."""

import json
from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from registry.errors import ChannelNotFound, RecordInvalid, ReferenceInvalid
from registry.manifest import SafeName, Sha256, describe_validation
from registry.store import Store, check_model_name

__all__ = [
    "CHANNELS", "ChannelName", "ChannelRecord", "EmptiedRecord", "Seen", "read_channel", "read_channels", "see_channel",
    "swap_channel",
]  # fmt: skip

ChannelName = Literal["production", "canary"]
CHANNELS: tuple[str, ...] = get_args(ChannelName)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    model: SafeName
    channel: ChannelName
    previous: Sha256 | None
    sequence: int = Field(ge=1)
    moved_at: AwareDatetime
    moved_by: str = Field(min_length=1, max_length=256)


class ChannelRecord(_Record):
    """Where a channel points, where it pointed before (None at first), and who moved it when.

    `sequence` counts the moves from 1, so two records of one channel are never equal.
    """

    digest: Sha256


class EmptiedRecord(_Record):
    """What lies in the place of a channel that points nowhere again: to every reader it was never set.

    The key is not deleted, because `sequence` has to go on: a mover who was overtaken would find a missing key as it
    was before its own move, and bring that back. So emptying is the same compare-and-swap as any move, on every store.
    """

    digest: None


@dataclass(frozen=True, slots=True)
class Seen:
    """A channel as it was read: its record, None where it points nowhere; its move's number; the bytes, to swap."""

    record: ChannelRecord | None = None
    sequence: int = 0
    data: bytes | None = None


def read_channel(store: Store, model: str, channel: str) -> ChannelRecord:
    """Read where a channel points. Raises ReferenceInvalid, ChannelNotFound (points nowhere) or RecordInvalid."""
    record = see_channel(store, model, channel).record
    if record is None:
        raise ChannelNotFound(f"channel {channel} of {model} was never set in {store}")
    return record


def read_channels(store: Store, model: str) -> list[ChannelRecord]:
    """The records of a model's channels that point somewhere."""
    records = (see_channel(store, model, channel).record for channel in CHANNELS)
    return [record for record in records if record is not None]


def swap_channel(store: Store, record: ChannelRecord | EmptiedRecord, seen: bytes | None) -> bool:
    """Write `record` if the channel still holds the bytes `seen` (None: was never set); False if it does not."""
    return store.swap_record(
        _key(record.model, record.channel), seen, (record.model_dump_json(indent=2) + "\n").encode()
    )


def see_channel(store: Store, model: str, channel: str) -> Seen:
    """A channel with the bytes that `swap_channel` compares. Raises ReferenceInvalid, RecordInvalid."""
    data = store.read_record(_key(model, channel))
    if data is None:
        return Seen()
    try:
        if _is_emptied(data):
            return Seen(None, EmptiedRecord.model_validate_json(data).sequence, data)
        record = ChannelRecord.model_validate_json(data)
    except ValidationError as error:
        raise RecordInvalid(f"channel {channel} of {model} in {store}: {describe_validation(error)}") from None
    return Seen(record, record.sequence, data)


def _is_emptied(data: bytes) -> bool:
    try:
        document = json.loads(data)
    except ValueError:
        return False
    return isinstance(document, dict) and document.get("digest", "") is None


def _key(model: str, channel: str) -> str:
    if channel not in CHANNELS:
        raise ReferenceInvalid(f"{channel!r} is not a channel: use one of {', '.join(CHANNELS)}")
    check_model_name(model)
    return f"channels/{model}/{channel}.json"
