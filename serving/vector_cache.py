"""Vectors of texts seen before, by the exact token ids. Bounded in bytes; the text least recently asked for leaves."""

from collections import OrderedDict
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from serving.tokenizer import Ids

Vector = NDArray[np.float32]

_KEY_BYTES = 16
# What the dictionary, the key and the array object take beside the vector's own bytes.
_ENTRY_BYTES = 300


class VectorCache:
    """Lives on one thread and belongs to one version of a model: another version's vectors are other vectors."""

    def __init__(self, max_bytes: int) -> None:
        """At most `max_bytes` are kept; 0 keeps nothing."""
        self._vectors: OrderedDict[bytes, Vector] = OrderedDict()
        self.max_bytes = max_bytes
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._vectors)

    def get(self, ids: Ids) -> Vector | None:
        """The vector [D] of these ids, which must not be written to, or None."""
        key = _key(ids)
        vector = self._vectors.get(key)
        if vector is not None:
            self._vectors.move_to_end(key)
        return vector

    def put(self, ids: Ids, vector: Vector) -> None:
        """Keep a copy of `vector` [D]: the original may be a row of a whole batch."""
        size = vector.nbytes + _ENTRY_BYTES
        if size > self.max_bytes:
            return
        key = _key(ids)
        if key not in self._vectors:
            self.num_bytes += size
        self._vectors[key] = vector.copy()
        self._vectors.move_to_end(key)
        while self.num_bytes > self.max_bytes:
            _, dropped = self._vectors.popitem(last=False)
            self.num_bytes -= dropped.nbytes + _ENTRY_BYTES


def _key(ids: Ids) -> bytes:
    return blake2b(ids.tobytes(), digest_size=_KEY_BYTES).digest()
