"""What may become part of a path or an object's key: model names, digests and the keys of records."""

from registry import manifest
from registry.errors import ReferenceInvalid

__all__ = ["check_digest", "check_model_name", "split_record_key"]

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
