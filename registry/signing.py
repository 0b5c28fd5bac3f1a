"""Signing: Ed25519 keys and signatures over manifests."""

import base64
import os
from pathlib import Path

from registry.errors import SignatureInvalid

__all__ = ["make_keys", "sign"]


def sign(manifest: bytes, private_key: Path) -> bytes:
    """The content of a bundle's `manifest.sig`. Raises SignatureInvalid for a file that is no Ed25519 key in PEM."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

    try:
        key = load_pem_private_key(private_key.read_bytes(), password=None)
    except (OSError, TypeError, ValueError) as error:
        raise SignatureInvalid(f"{private_key} cannot be read as a private key in PEM: {error}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureInvalid(f"{private_key} is no Ed25519 key")
    return base64.b64encode(key.sign(manifest)) + b"\n"


def make_keys(private_key: Path, public_key: Path) -> None:
    """Write a new pair of keys in PEM, the private one readable by its owner alone. Raises FileExistsError."""
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415

    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    shown = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for path, data, mode in ((private_key, secret, 0o600), (public_key, shown, 0o644)):
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
            stream.write(data)
