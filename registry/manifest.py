"""The manifest: what a bundle is, how it was made, how good it is and which bytes belong to it."""

import base64
import fcntl
import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from registry.errors import (
    BundleIncomplete,
    DigestMismatch,
    ManifestInvalid,
    RegistryError,
    SignatureInvalid,
    SignatureMissing,
)

__all__ = [
    "MANIFEST_NAME", "SIGNATURE_NAME", "BundleIncomplete", "Compatibility", "Cosine", "DigestMismatch", "EngineEntry",
    "FileEntry", "Lineage", "Manifest", "ManifestInvalid", "Performance", "Profile", "Quantization", "RegistryError",
    "SignatureInvalid", "SignatureMissing", "Validation", "check_signature", "describe_validation", "digest_of",
    "hash_file", "hash_stream", "hold_bundle", "is_digest", "is_name", "list_files", "parse_manifest",
    "payload_checksum", "read_manifest", "read_signature", "scan_files", "verify_bundle", "write_manifest",
]  # fmt: skip

MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "manifest.sig"
"""The one file of a bundle that no manifest lists: an Ed25519 signature over `manifest.json`, in base64."""
_CHUNK_BYTES = 1 << 20

Runtime = Literal["avx512", "onnxruntime", "openvino", "tensorrt", "cuda"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int4"]
Pooling = Literal["mean", "cls", "lasttoken"]
Compatibility = Literal["drop-in", "reindex"]


def is_name(text: str) -> bool:
    """Whether `text` may be a folder and a metric label: letters, digits, dot, dash and underscore."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", text) is not None


def is_digest(text: str) -> bool:
    """Whether `text` is a SHA-256 in the one spelling we use: 64 lower-case hex digits."""
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None


def _safe_name(name: str) -> str:
    """A model, variant or version name is a folder and a metric label."""
    if not is_name(name):
        raise ValueError(f"{name!r} is not a name: use 1 to 128 letters, digits, '.', '_' or '-'")
    return name


def _safe_path(name: str) -> str:
    """A file of a bundle stays inside it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ValueError(f"{name!r} leaves the bundle: use a plain relative path such as 'reports/quality.json'")
    # "", "." and "a//b" name no file of their own; control characters and lone surrogates break terminals and JSON.
    if not path.parts or str(path) != name or not name.isprintable():
        raise ValueError(f"{name!r} is not a file name: use a plain relative path such as 'reports/quality.json'")
    return name


SafeName = Annotated[str, AfterValidator(_safe_name)]
SafePath = Annotated[str, AfterValidator(_safe_path)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class FileEntry(_Part):
    """One file of the bundle: SHA-256 in hex and size in bytes."""

    sha256: Sha256
    size: int = Field(ge=0)


class Profile(_Part):
    """A TensorRT optimisation profile: batch min-opt-max, lengths to `max_length`."""

    name: Literal["low_latency", "balanced", "high_throughput"]
    min_batch: int
    opt_batch: int
    max_batch: int
    max_length: int = 512


class EngineEntry(_Part):
    """One way to run the bundle. `compute` is the arithmetic the engine is told to use outside quantised layers."""

    runtime: Runtime
    file: SafePath
    sha256: Sha256
    size: int = Field(ge=0)
    compute: Literal["f32", "bf16", "f16", "f8"] = "f32"
    sm: str | None = None
    trt_version: str | None = None
    profiles: tuple[Profile, ...] = ()


class Quantization(_Part):
    """How weights or activations were quantised; `accuracy_loss` is 1 - cosine mean against fp32."""

    method: str
    calibration_dataset: str | None
    calibration_digest: str | None
    calibration_size: int = Field(ge=0)
    accuracy_loss: float


class Performance(_Part):
    """Measured on `hardware` with the engine class the worker runs; latency at batch 1, throughput at `batch_size`."""

    latency_p50_ms: float
    latency_p95_ms: float
    latency_p99_ms: float
    throughput_qps: float
    gpu_memory_mb: float | None
    peak_memory_mb: float
    batch_size: int
    hardware: str


class Cosine(_Part):
    """Cosine similarity to the fp32 teacher over the evaluation texts; `ci` is the 95 % interval of the mean."""

    mean: float
    p1: float
    min: float
    ci: tuple[float, float]


class Validation(_Part):
    """Quality on the evaluation part; what the corpus cannot measure is null, never guessed."""

    cosine_similarity_vs_fp32: Cosine
    overlap_at_10: float | None
    recall_at_k: float | None
    ndcg_at_10: float | None
    cross_recall_at_10: float | None
    cross_ndcg_at_10: float | None
    sts_spearman: float | None
    test_dataset: str


class Lineage(_Part):
    """Where the bundle comes from: digests of what it was made of, the recipe, and the run that made it."""

    parents: dict[str, str]
    recipe: dict[str, str]
    git_commit: str | None
    mlflow_run_id: str | None
    versions: dict[str, str]


class Manifest(_Part):
    """The whole manifest. A bundle's digest is the SHA-256 of its manifest file, and the manifest names every file."""

    schema_version: Literal[1] = 1
    model_name: SafeName
    model_id: str
    variant: SafeName
    version: SafeName
    dimension: int = Field(ge=1)
    max_seq_length: int = Field(ge=1)
    pooling: Pooling
    normalize: bool
    prompts: dict[str, str]
    precision: Precision
    compatibility: Compatibility
    quantization: Quantization | None
    performance: Performance
    validation: Validation
    lineage: Lineage
    engines: tuple[EngineEntry, ...] = Field(min_length=1)
    files: dict[SafePath, FileEntry]
    created_at: AwareDatetime
    checksum: Sha256

    @model_validator(mode="after")
    def _files_agree(self) -> "Manifest":
        for name in (MANIFEST_NAME, SIGNATURE_NAME):
            if name in self.files:
                raise ValueError(f"{name} cannot be listed under files")
        for engine in self.engines:
            entry = self.files.get(engine.file)
            if entry is None or (entry.sha256, entry.size) != (engine.sha256, engine.size):
                raise ValueError(f"engine file {engine.file!r} is not listed under files with the same digest and size")
        if self.checksum != payload_checksum(self.files):
            raise ValueError("checksum is not the digest of the files table")
        return self


def describe_validation(error: ValidationError) -> str:
    """One line per fault with the key's path and the value's fault, without echoing whole inputs."""
    faults = ((".".join(map(str, e["loc"])) or "document", e) for e in error.errors())
    return "; ".join(f"{key}: {'unknown key' if e['type'] == 'extra_forbidden' else e['msg']}" for key, e in faults)


def hash_stream(stream: IO[bytes]) -> FileEntry:
    """Hash what is left of a binary stream in bounded memory."""
    digest, size = hashlib.sha256(), 0
    while chunk := stream.read(_CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
    return FileEntry(sha256=digest.hexdigest(), size=size)


def hash_file(path: Path) -> FileEntry:
    """Hash one file in bounded memory."""
    with path.open("rb") as stream:
        return hash_stream(stream)


def list_files(bundle: Path) -> list[str]:
    """Name every file below `bundle`, the manifest too, in order.

    Raises BundleIncomplete for a link, whose target is not the bundle's, and for a pipe, socket or device.
    """
    names = []
    for path in sorted(bundle.rglob("*")):
        name = path.relative_to(bundle).as_posix()
        if path.is_symlink():
            raise BundleIncomplete(f"{name} in {bundle} is a symbolic link: a bundle holds plain files only")
        if path.is_dir():
            continue
        if not path.is_file():
            raise BundleIncomplete(f"{name} in {bundle} is a special file: a bundle holds plain files only")
        names.append(name)
    return names


def scan_files(bundle: Path) -> dict[str, FileEntry]:
    """Hash every file below `bundle` but manifest and signature. Raises BundleIncomplete for a link or special file."""
    names = (name for name in list_files(bundle) if name not in (MANIFEST_NAME, SIGNATURE_NAME))
    return {name: hash_file(bundle / name) for name in names}


def payload_checksum(files: dict[str, FileEntry]) -> str:
    """SHA-256 over the files table: equal payloads have equal checksums whenever they were made."""
    table = {name: [entry.sha256, entry.size] for name, entry in files.items()}
    return hashlib.sha256(json.dumps(table, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_manifest(bundle: Path, manifest: Manifest) -> str:
    """Write `manifest.json` in its one canonical form and return the bundle's digest (hex SHA-256)."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (bundle / MANIFEST_NAME).write_text(text, encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of(bundle: Path) -> str:
    """The bundle's digest: SHA-256 of its manifest file as it lies there. Raises ManifestInvalid."""
    return hashlib.sha256(_manifest_bytes(bundle)).hexdigest()


def read_manifest(bundle: Path) -> Manifest:
    """Read and validate the manifest of a bundle folder. Raises ManifestInvalid; does not hash the files."""
    return parse_manifest(_manifest_bytes(bundle), str(bundle / MANIFEST_NAME))


def parse_manifest(data: bytes, source: str) -> Manifest:
    """Validate a manifest's bytes; `source` says in the ManifestInvalid it may raise where they came from."""
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        raise ManifestInvalid(f"{source}: {describe_validation(error)}") from None


def verify_bundle(bundle: Path, digest: str | None = None, public_keys: Path | None = None) -> Manifest:
    """Check that a folder is exactly the bundle its manifest (and `digest`, when given) names, then return it.

    With `public_keys` one of that file's keys must have signed it. Raises ManifestInvalid, DigestMismatch (names the
    file, both digests), BundleIncomplete (missing or extra file), SignatureMissing or SignatureInvalid.
    """
    # One read serves the digest and the contents: a manifest exchanged in between cannot borrow the other's name.
    data = _manifest_bytes(bundle)
    actual = hashlib.sha256(data).hexdigest()
    if digest is not None and actual != digest:
        raise DigestMismatch(f"{bundle / MANIFEST_NAME} has digest {actual}, expected {digest}")
    manifest = parse_manifest(data, str(bundle / MANIFEST_NAME))
    if public_keys is not None:
        check_signature(data, read_signature(bundle), public_keys, str(bundle))
    found = scan_files(bundle)
    missing, extra = manifest.files.keys() - found.keys(), found.keys() - manifest.files.keys()
    if missing or extra:
        raise BundleIncomplete(f"{bundle}: missing {sorted(missing)}, not in the manifest {sorted(extra)}")
    for name, entry in manifest.files.items():
        if found[name] != entry:
            raise DigestMismatch(
                f"{name} in {bundle} has digest {found[name].sha256}, the manifest says {entry.sha256}"
            )
    return manifest


def hold_bundle(bundle: Path) -> int:
    """A shared lock on the manifest, until the descriptor is closed: meanwhile no cache evicts the bundle.

    Raises ManifestInvalid.
    """
    try:
        descriptor = os.open(bundle / MANIFEST_NAME, os.O_RDONLY)
    except OSError:
        raise _no_bundle(bundle) from None
    with suppress(OSError):  # a file system without locks: there an evictor gets none either, and evicts nothing
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def read_signature(bundle: Path) -> bytes | None:
    """The signature that lies in a bundle's folder, or None."""
    path = bundle / SIGNATURE_NAME
    return path.read_bytes() if path.is_file() and not path.is_symlink() else None


def check_signature(manifest: bytes, signature: bytes | None, public_keys: Path, source: str) -> None:
    """Check that one of the keys in the PEM file `public_keys` signed the bytes of a manifest (needs `cryptography`).

    `source` says in the error what was checked. Raises SignatureMissing (None), SignatureInvalid.
    """
    if signature is None:
        raise SignatureMissing(f"{source} is not signed, and {public_keys} asks for a signature")
    try:
        raw = base64.b64decode(signature.strip(), validate=True)
    except ValueError:
        raise SignatureInvalid(f"the signature of {source} is not base64") from None
    if not any(_is_signed_by(key, raw, manifest) for key in _read_public_keys(public_keys)):
        raise SignatureInvalid(
            f"the signature of {source} was made by no key of {public_keys}, or for another manifest"
        )


def _is_signed_by(key: Any, signature: bytes, data: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415  an extra of the worker's

    try:
        key.verify(signature, data)
    except InvalidSignature:
        return False
    return True


def _read_public_keys(path: Path) -> list[Any]:
    """Every Ed25519 key of a PEM file: while keys are exchanged there are two. Raises SignatureInvalid."""
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415
        from cryptography.hazmat.primitives.serialization import load_pem_public_key  # noqa: PLC0415
    except ImportError:
        raise SignatureInvalid(f"{path} asks for signatures: checking them takes pip install cryptography") from None
    try:
        blocks = re.findall(rb"-----BEGIN [^-]+-----.*?-----END [^-]+-----", path.read_bytes(), re.DOTALL)
        keys = [load_pem_public_key(block) for block in blocks]
    except (OSError, ValueError) as error:
        raise SignatureInvalid(f"{path} cannot be read as public keys in PEM: {error}") from None
    if not keys or not all(isinstance(key, Ed25519PublicKey) for key in keys):
        raise SignatureInvalid(f"{path} holds {len(keys)} public keys, and all must be Ed25519 in PEM")
    return keys


def _no_bundle(path: Path) -> ManifestInvalid:
    why = "" if path.is_dir() else ", for it is no folder" if path.exists() else ", for it does not exist"
    return ManifestInvalid(f"{path} holds no {MANIFEST_NAME}{why}: give the folder of a bundle")


def _manifest_bytes(bundle: Path) -> bytes:
    try:
        return (bundle / MANIFEST_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise _no_bundle(bundle) from None
