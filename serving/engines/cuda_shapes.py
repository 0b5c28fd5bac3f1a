"""Which shapes the cuda engine captures graphs for: a run is filled up to the next one. Pure."""

from dataclasses import dataclass

_LEAST_TOKENS = 16  # of a graph, and what smaller ones differ by
_STEPS = 16  # graphs an octave: a run computes 3 % more tokens than it has, on average
_LONG_TOKENS = 4096  # of a run, from which long texts have graphs


@dataclass(frozen=True, slots=True)
class Shape:
    """What a graph was captured for: tokens, rows (empty ones included), and kernels for long texts or for short."""

    tokens: int
    rows: int
    long: bool


def round_tokens(tokens: int) -> int:
    """The tokens a run of so many is filled up to."""
    step = max(_LEAST_TOKENS, 2 ** ((tokens - 1).bit_length() - 1) // _STEPS) if tokens > 1 else _LEAST_TOKENS
    return -(-tokens // step) * step


def make_shape(tokens: int, max_rows: int, is_long: bool) -> Shape:
    """The shape of a run of `tokens`: as many rows as there could be, kernels for long texts only if it is large."""
    return Shape(tokens, min(tokens, max_rows), is_long and tokens >= _LONG_TOKENS)


def list_shapes(max_tokens: int, max_rows: int, has_long: bool) -> list[Shape]:
    """Every shape a run of up to `max_tokens` may have, the largest first; long ones if runs may be."""
    sizes: list[int] = []
    tokens = 1
    while not sizes or sizes[-1] < max_tokens:
        sizes.append(min(round_tokens(tokens), max_tokens))
        tokens = sizes[-1] + 1
    kinds = (True, False) if has_long else (False,)
    shapes = {make_shape(size, max_rows, is_long): None for size in reversed(sizes) for is_long in kinds}
    return list(shapes)
