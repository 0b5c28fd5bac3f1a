"""Batch shapes an engine is asked for, and the tokens it computes for them.

One that compiles each shape anew gets few, at a small cost in padding. One that packs its texts computes no padding.
"""

from dataclasses import dataclass

# Lengths are multiples of this at least: at batch 16, 13 tokens take OpenVINO as long as 16.
_LENGTH_STEP = 4
_EXACT_SIZE = 8


@dataclass(frozen=True, slots=True)
class ShapeGrid:
    """Rounds shapes to at most four steps per doubling, or leaves them as they are."""

    max_length: int
    is_coarse: bool
    is_packed: bool = False

    def round_length(self, length: int) -> int:
        """Tokens to pad the longest text of a batch to: a quarter or three more at most, within `max_length`."""
        if not self.is_coarse or length >= self.max_length:
            return length
        step = max(_LENGTH_STEP, 1 << max(0, length.bit_length() - 3))
        return min(self.max_length, -(-length // step) * step)

    def round_size(self, size: int) -> int:
        """Texts to run of `size` that could: the others go next."""
        if not self.is_coarse or size <= _EXACT_SIZE:
            return size
        return size - size % (1 << (size.bit_length() - 3))


EXACT = ShapeGrid(max_length=0, is_coarse=False)
