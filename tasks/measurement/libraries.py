"""The libraries of this environment: named in every report and row, and part of the keys of the cache."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

# Libraries whose version changes what a task makes.
LIBRARIES = (
    "thorforge", "torch", "transformers", "sentence-transformers", "tokenizers", "onnx", "onnxruntime", "openvino",
    "nncf", "numpy",
)  # fmt: skip


@cache
def library_versions() -> dict[str, str]:
    """Version of every library that shapes a result; one that is not installed is left out."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
