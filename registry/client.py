"""What people and flows do with a registry: push, pull, resolve, list, verify. Every byte is checked on its way."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from registry.channel import CHANNELS, read_channel, read_channels
from registry.errors import (
    AmbiguousDigest,
    BundleIncomplete,
    BundleNotFound,
    BundleTooLarge,
    DigestMismatch,
    ManifestInvalid,
    ReferenceInvalid,
    RegistryError,
    TargetExists,
)
from registry.keys import user_name
from registry.ledger import recorded_refusals
from registry.manifest import (
    MANIFEST_NAME,
    SIGNATURE_NAME,
    FileEntry,
    Manifest,
    check_signature,
    digest_of,
    hash_stream,
    is_name,
    list_files,
    parse_manifest,
    read_signature,
    verify_bundle,
)
from registry.settings import load_settings
from registry.signing import sign
from registry.staging import Progress, copy_files, make_folder, needs_room, rename_folder, staged_folder
from registry.store import Store

__all__ = [
    "StoredBundle", "check_stored", "list_bundles", "pull", "push", "read_stored", "resolve", "verify_stored",
]  # fmt: skip

MIN_PREFIX = 8
_MAX_SIGNATURE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class StoredBundle:
    """One bundle of a store and the channels that point at it; `manifest` is None where `fault` says why."""

    model: str
    digest: str
    channels: tuple[str, ...]
    manifest: Manifest | None
    fault: str


def push(bundle: Path, store: Store, progress: Progress | None = None) -> str:
    """Verify the folder `bundle`, publish it whole or not at all and return its digest.

    It is signed where a signing key is configured, and must be signed where a public key is (`registry.settings`).
    Pushing what is already there changes nothing; a refusal is recorded in the ledger of the model that it names.
    Raises ManifestInvalid, DigestMismatch, BundleIncomplete, BundleTooLarge, SignatureMissing, SignatureInvalid,
    StoreFull.
    """
    digest = digest_of(bundle)
    with _recorded_refusals(store, bundle, digest):
        check_size(sum((bundle / name).stat().st_size for name in list_files(bundle)), str(bundle))
        contents = verify_bundle(bundle, digest)
        signature = _signature_of(bundle, digest)
        store.put_bundle(bundle, digest, contents, progress)
        if signature is not None:
            store.put_signature(contents.model_name, digest, signature)
    return digest


def pull(store: Store, model: str, reference: str, target: Path, progress: Progress | None = None) -> Manifest:
    """Copy a bundle to the folder `target`, every byte verified, and return its manifest.

    `target` appears whole or not at all; it may be empty or already be this very bundle. Raises TargetExists where it
    holds something else, DigestMismatch or BundleIncomplete where the store's copy is damaged, BundleTooLarge,
    SignatureMissing or SignatureInvalid where a public key is configured, StoreFull, and what `resolve` raises.
    """
    digest = resolve(store, model, reference)
    target = target.resolve()
    if target.exists() and not _is_empty_folder(target):
        return _verify_target(target, digest)
    contents, files = _stored_files(store, model, digest)
    size = sum(entry.size for entry in files.values())
    check_size(size, f"{model} {digest} in {store}")
    with needs_room(target, size):
        make_folder(target.parent)
        with staged_folder(target.parent, "pull") as staged:
            copy_files(files, lambda name: store.open_file(model, digest, name), staged, progress)
            if rename_folder(staged, target):
                return contents
    # Somebody else filled `target` first: with this bundle, or it is refused.
    return _verify_target(target, digest)


def resolve(store: Store, model: str, reference: str) -> str:
    """Turn a channel name, a digest or a digest's first 8 or more hex digits into the digest of a stored bundle.

    Raises ReferenceInvalid, ChannelNotFound, BundleNotFound or AmbiguousDigest (names those it fits).
    """
    if reference in CHANNELS:
        reference = read_channel(store, model, reference).digest
    elif not re.fullmatch(rf"[0-9a-f]{{{MIN_PREFIX},64}}", reference):
        raise ReferenceInvalid(
            f"{reference!r} names no bundle: use {', '.join(CHANNELS)} or {MIN_PREFIX} to 64 hex digits of a digest"
        )
    found = [digest for digest in store.list_digests(model) if digest.startswith(reference)]
    if not found:
        known = store.list_models()
        models = "" if model in known else f", whose models are: {', '.join(known) or 'none yet'}"
        raise BundleNotFound(f"no bundle {reference} of {model} in {store}{models}")
    if len(found) > 1:
        raise AmbiguousDigest(f"{reference} fits {len(found)} bundles of {model}: {', '.join(found)}")
    return found[0]


def read_stored(store: Store, model: str, digest: str) -> Manifest:
    """Read a stored manifest. Raises BundleNotFound, BundleIncomplete, DigestMismatch or ManifestInvalid."""
    return _read_manifest(store, model, digest)[0]


def check_stored(store: Store, model: str, digest: str) -> Manifest:
    """Check that a stored bundle has its manifest and every file of it, without hashing the files.

    Raises BundleNotFound, BundleIncomplete, DigestMismatch or ManifestInvalid.
    """
    return _stored_files(store, model, digest)[0]


def verify_stored(
    store: Store, model: str, digest: str, progress: Progress | None = None, *, needs_signature: bool = True
) -> Manifest:
    """Check every byte of a stored bundle where it lies, and its signature where one is asked for; its manifest.

    Raises BundleNotFound, BundleIncomplete (missing or extra file), DigestMismatch (names the file) or ManifestInvalid.
    """
    contents, files = _stored_files(store, model, digest, needs_signature)
    done, total = 0, sum(entry.size for entry in files.values())
    for name, entry in files.items():
        with store.open_file(model, digest, name) as stream:
            found = hash_stream(stream)
        if found != entry:
            raise DigestMismatch(
                f"{name} of {model} {digest} in {store} has digest {found.sha256}, the manifest says {entry.sha256}"
            )
        done += entry.size
        if progress is not None:
            progress(done, total)
    return contents


def list_bundles(store: Store, model: str | None = None) -> list[StoredBundle]:
    """Every bundle of `model`, or of all models, by model and then oldest first.

    A manifest that cannot be read is listed with its fault: one bad bundle hides no other.
    """
    bundles = []
    for name in store.list_models() if model is None else [model]:
        records = read_channels(store, name)
        for digest in store.list_digests(name):
            channels = tuple(record.channel for record in records if record.digest == digest)
            try:
                bundles.append(StoredBundle(name, digest, channels, read_stored(store, name, digest), ""))
            except RegistryError as error:
                bundles.append(StoredBundle(name, digest, channels, None, str(error)))
    return sorted(bundles, key=_by_age)


def _by_age(bundle: StoredBundle) -> tuple[str, float, str]:
    return bundle.model, bundle.manifest.created_at.timestamp() if bundle.manifest else 0.0, bundle.digest


def _read_manifest(store: Store, model: str, digest: str) -> tuple[Manifest, bytes]:
    """The manifest and its bytes."""
    with store.open_file(model, digest, MANIFEST_NAME) as stream:
        data = stream.read()
    source = f"{MANIFEST_NAME} of {model} {digest} in {store}"
    actual = hashlib.sha256(data).hexdigest()
    if actual != digest:
        raise DigestMismatch(f"{source} has digest {actual}")
    contents = parse_manifest(data, source)
    if contents.model_name != model:
        raise ManifestInvalid(f"{source} is a bundle of {contents.model_name}")
    return contents, data


def _stored_files(
    store: Store, model: str, digest: str, needs_signature: bool = True
) -> tuple[Manifest, dict[str, FileEntry]]:
    """The manifest and every file the bundle has, itself and a signature too; refused where they are not those.

    Where a public key is configured, the signature is checked.
    """
    contents, data = _read_manifest(store, model, digest)
    files = {**contents.files, MANIFEST_NAME: FileEntry(sha256=digest, size=len(data))}
    found, signature = set(store.list_files(model, digest)), None
    if SIGNATURE_NAME in found:
        signature = _read_signature(store, model, digest)
        files[SIGNATURE_NAME] = FileEntry(sha256=hashlib.sha256(signature).hexdigest(), size=len(signature))
    missing, extra = sorted(files.keys() - found), sorted(found - files.keys())
    if missing or extra:
        raise BundleIncomplete(f"{model} {digest} in {store}: missing {missing}, not in the manifest {extra}")
    if needs_signature and (public_keys := load_settings().public_key):
        check_signature(data, signature, public_keys, f"{model} {digest} in {store}")
    return contents, files


def _read_signature(store: Store, model: str, digest: str) -> bytes:
    with store.open_file(model, digest, SIGNATURE_NAME) as stream:
        return stream.read(_MAX_SIGNATURE_BYTES)


def _signature_of(bundle: Path, digest: str) -> bytes | None:
    """The signature that lies in the folder, or a new one where a key is configured; checked where it must be."""
    data = (bundle / MANIFEST_NAME).read_bytes()
    signature, settings = read_signature(bundle), load_settings()
    if signature is None and settings.signing_key is not None:
        signature = sign(data, settings.signing_key)
    if settings.public_key is not None:
        check_signature(data, signature, settings.public_key, str(bundle))
    return signature


def check_size(size: int, source: str) -> None:
    """Raise BundleTooLarge for a bundle over the limit."""
    if size > (limit := load_settings().max_bundle_bytes):
        raise BundleTooLarge(f"{source} has {size} bytes, the limit is {limit} (registry.max_bundle_bytes)")


@contextmanager
def _recorded_refusals(store: Store, bundle: Path, digest: str) -> Iterator[None]:
    """Record what is refused under the model that the manifest names, be the rest of it as wrong as it may."""
    try:
        model = str(json.loads((bundle / MANIFEST_NAME).read_bytes())["model_name"])
    except (OSError, ValueError, KeyError, TypeError):
        model = ""
    if not is_name(model):
        yield
        return
    with recorded_refusals(store, model, "push", digest, user_name(or_number=True)):
        yield


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None


def _verify_target(target: Path, digest: str) -> Manifest:
    try:
        return verify_bundle(target, digest, load_settings().public_key)
    except RegistryError as error:
        raise TargetExists(f"{target} is there and is not bundle {digest}: {error}") from None
