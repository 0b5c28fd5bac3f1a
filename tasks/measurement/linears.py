"""Linear layers told apart by their order in a run: their kernels share names.

A layer multiplies for its queries, attends, multiplies for its output, and goes up and down, or does these two in one
kernel.
"""

import re
from collections.abc import Mapping, Sequence

from tasks.measurement.trace import Span
from tasks.measurement.work import Linear

Place = tuple[int, Linear]  # of a layer, counted from 0 in each pass through them
_LAYER = re.compile("(P)A+(P)(?:(P)(P)|(B))")  # products, attention (on the CPU once a text), block
_LINEARS: tuple[Linear, ...] = ("query", "output", "up", "down", "block")
_BLOCK = "feed_forward"
_FOLLOWERS = "splitk", "aten::gelu"  # what finishes the product before it


def place_linears(spans: Sequence[Span], num_layers: int) -> tuple[Mapping[int, Place], str | None]:
    """Which linear layer each product of `spans`, in order of time, belongs to, by its index there.

    The second is why there are none, where the order is not that of passes through `num_layers` layers.
    """
    indices = [number for number, span in enumerate(spans) if span.kind in ("products", "attention")]
    followers = {number for number in indices if any(part in spans[number].name.lower() for part in _FOLLOWERS)}
    leaders = [number for number in indices if number not in followers]
    codes = "".join(_encode(spans[number]) for number in leaders)
    layers = list(_LAYER.finditer(codes))
    if "".join(layer.group() for layer in layers) != codes or len(layers) % num_layers:
        return {}, f"the order of {_count(codes)} does not fit {num_layers} layers"
    placed: dict[int, Place] = {}
    for count, layer in enumerate(layers):
        for group, linear in enumerate(_LINEARS, 1):
            if layer.start(group) >= 0:
                placed[leaders[layer.start(group)]] = count % num_layers, linear
    _add_followers(placed, indices, followers)
    return placed, None


def _encode(span: Span) -> str:
    return "A" if span.kind == "attention" else "B" if _BLOCK in span.name.lower() else "P"


def _count(codes: str) -> str:
    return f"{codes.count('P')} products, {codes.count('A')} attentions and {codes.count('B')} blocks"


def _add_followers(placed: dict[int, Place], indices: Sequence[int], followers: set[int]) -> None:
    """What finishes a product belongs to it; behind anything else it stays a product without a place."""
    before: Place | None = None
    for number in indices:
        if number not in followers:
            before = placed.get(number)
        elif before is not None:
            placed[number] = before
