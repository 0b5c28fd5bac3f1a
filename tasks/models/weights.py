"""Weights as safetensors files hold them: checked, counted and looked through without loading the model."""

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, NonNegativeInt, TypeAdapter

from tasks.errors import TeacherRejected

_LAYER = re.compile(r"(^|\.)(layer|layers|h|block)\.\d+\.")
_READ_ELEMENTS = 1 << 22
# bfloat16 is the upper half of float32: all bits of its exponent set is an infinity or not a number.
_BF16_EXPONENT = 0x7F80
_NUMPY_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class Counts(BaseModel):
    """Parameters of a model: all of them, and those of its layers, which leaves out embedding tables and poolers."""

    everything: int
    encoder: int


class _Tensor(BaseModel):
    """What a safetensors header says of one tensor; the offsets are bytes after the header."""

    dtype: str
    shape: tuple[NonNegativeInt, ...]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]

    @property
    def is_float(self) -> bool:
        """Whether it is a parameter, not a table of positions."""
        return self.dtype.startswith(("F", "BF"))


_HEADER = TypeAdapter(dict[str, _Tensor])


def is_of_a_layer(name: str) -> bool:
    """Whether a tensor of that name belongs to a numbered layer, not to the embeddings or a pooler."""
    return _LAYER.search(name) is not None


def count_parameters(path: Path) -> Counts:
    """Parameters of a safetensors file, from its header. Raises TeacherRejected for a file cut short or not of them."""
    _, tensors = _read_header(path)
    sizes = {name: math.prod(tensor.shape) for name, tensor in tensors.items() if tensor.is_float}
    return Counts(
        everything=sum(sizes.values()), encoder=sum(size for name, size in sizes.items() if is_of_a_layer(name))
    )


def check_finite(path: Path) -> None:
    """Raises TeacherRejected with the name of the first tensor that holds a NaN or an infinity."""
    start, tensors = _read_header(path)
    for name, tensor in sorted(tensors.items()):
        kind = _NUMPY_TYPES.get(tensor.dtype)
        count = math.prod(tensor.shape)
        if kind is None or not count:
            continue
        values = np.memmap(path, dtype=kind, mode="r", offset=start + tensor.data_offsets[0], shape=(count,))
        for first in range(0, count, _READ_ELEMENTS):
            part = values[first : first + _READ_ELEMENTS]
            finite = (part & _BF16_EXPONENT) != _BF16_EXPONENT if tensor.dtype == "BF16" else np.isfinite(part)
            if not finite.all():
                place = first + int(np.argmin(finite))
                raise TeacherRejected(f"{path}: tensor {name!r} holds NaN or Inf, first at element {place} of {count}")


def write_weights(path: Path, model: Any) -> None:
    """Write a transformers model's weights without its pooler: it belongs to pre-training and is never run."""
    from safetensors.torch import save_file  # noqa: PLC0415  what only counts need not load torch

    state = {name: value.contiguous() for name, value in model.state_dict().items() if not name.startswith("pooler.")}
    save_file(state, path, metadata={"format": "pt"})


def _read_header(path: Path) -> tuple[int, dict[str, _Tensor]]:
    """Where the data begin, and the tensors by name. Raises TeacherRejected."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= size - 8:
            raise TeacherRejected(f"{path} is truncated: {size} bytes do not hold its header; fetch it again")
        header = stream.read(length)
    try:
        entries = json.loads(header)
        tensors = _HEADER.validate_python({name: entries[name] for name in entries if name != "__metadata__"})
    except (ValueError, TypeError):  # pydantic's ValidationError and Unicode and JSON errors are ValueErrors
        raise TeacherRejected(f"{path} has a header that is not one of safetensors; fetch it again") from None
    needed = 8 + length + max((tensor.data_offsets[1] for tensor in tensors.values()), default=0)
    if needed != size:
        raise TeacherRejected(f"{path} is truncated or padded: {size} bytes, its header needs {needed}; fetch it again")
    return 8 + length, tensors
