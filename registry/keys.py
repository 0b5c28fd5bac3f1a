"""What may become part of a path, of an object's key or of a record: names, digests, keys."""

import getpass
import os

from registry import manifest
from registry.errors import RecordInvalid, ReferenceInvalid

__all__ = ["check_digest", "check_model_name", "split_record_key", "user_name"]

_NO_RECORDS = ("models", "index")


def check_model_name(model: str) -> None:
    """Refuse, as ReferenceInvalid, what cannot be a model's name before it becomes part of a path."""
    if not manifest.is_name(model):
        raise ReferenceInvalid(f"{model!r} is not a model name: use 1 to 128 letters, digits, '.', '_' or '-'")


def check_digest(digest: str) -> None:
    """Refuse, as ReferenceInvalid, what is no full digest."""
    if not manifest.is_digest(digest):
        raise ReferenceInvalid(f"{digest!r} is not a digest: use 64 hex digits")


def split_record_key(key: str) -> list[str]:
    """The names in the key of a record. Raises ReferenceInvalid for what is none, and where bundles lie."""
    parts = key.split("/")
    if len(parts) < 2 or parts[0] in _NO_RECORDS or not all(map(manifest.is_name, parts)):
        raise ReferenceInvalid(f"{key!r} is not the key of a record: use names joined by '/'")
    return parts


def user_name(or_number: bool = False) -> str:
    """Who runs this process, for records. A user without a name is a number where that will do, else RecordInvalid."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's bare user id has no name
        if or_number:
            return f"uid {os.getuid()}"
        raise RecordInvalid("this user has no name to record: give --by NAME") from None
