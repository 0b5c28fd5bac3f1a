"""Ways to damage a bundle on disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILES = ("golden.npz", "model.onnx", "tokenizer.json")


def flip_byte(path: Path, position: int = -1) -> None:
    """Change one bit of the byte at `position`."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest's JSON in place, past every check."""
    path = bundle / "manifest.json"
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
