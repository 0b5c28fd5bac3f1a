"""The fewest bytes and floating-point operations that each part of an engine run takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from serving.engines.bert import BertConfig, name_linear
from tasks.measurement.trace import Kind

Compute = Literal["f32", "f16", "f8"]
# Linear layers of a layer in the order they run, queries, keys and values as one; `block` is up and down in one kernel.
Linear = Literal["query", "output", "up", "down", "block"]
_LINEARS: tuple[Linear, ...] = ("query", "output", "up", "down")


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes, and operations, of which `narrow_flops` are products of E4M3."""

    num_bytes: float = 0.0
    flops: float = 0.0
    narrow_flops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.num_bytes + other.num_bytes, self.flops + other.flops, self.narrow_flops + other.narrow_flops)

    def __mul__(self, factor: float) -> "Work":
        return Work(self.num_bytes * factor, self.flops * factor, self.narrow_flops * factor)


@dataclass(frozen=True, slots=True)
class RunWork:
    """Of one run: each kind, of norms that each takes; and the linear layers of every layer."""

    kinds: Mapping[Kind, Work]
    linears: Sequence[Mapping[Linear, Work]] = ()


def count_work(config: BertConfig, lengths: Sequence[int], compute: Compute = "f16") -> RunWork:
    """The work of one run over texts of so many tokens; states, queries and what is not E4M3 take two bytes, in f32
    four."""
    size = 4 if compute == "f32" else 2
    tokens, hidden, layers = sum(lengths), config.hidden, config.layers
    states = size * tokens * hidden
    linears = [_count_linears(config, number, tokens, compute) for number in range(layers)]
    products = sum((own[linear] for own in linears for linear in _LINEARS), Work())
    attention = Work(layers * 4 * states, layers * 4 * hidden * sum(length * length for length in lengths))
    weights = layers * (4 * hidden * hidden + 2 * hidden * config.intermediate) * size
    kinds: dict[Kind, Work] = {
        "embedding": Work(states + size * hidden * min(tokens, config.vocabulary), 8 * tokens * hidden),
        "products": products,
        "attention": attention,
        "norms": Work(2 * states, 8 * tokens * hidden),
        "pooling": Work(states + 4 * len(lengths) * hidden, tokens * hidden),
        "whole encoder": Work(weights, products.flops + attention.flops),
    }
    return RunWork(kinds, linears)


def _count_linears(config: BertConfig, number: int, tokens: int, compute: Compute) -> dict[Linear, Work]:
    """Those of layer `number`; states are written once, the copy in E4M3 that some readers take is not counted."""
    hidden, inner, size = config.hidden, config.intermediate, 4 if compute == "f32" else 2
    widths = (hidden, 3 * hidden), (hidden, hidden), (hidden, inner), (inner, hidden)
    narrow = [compute == "f8" and name_linear(number, place) not in config.float16 for place in range(4)]
    read = [1 if is_narrow else size for is_narrow in narrow]  # bytes of what goes in, and of the weights
    added = size if compute == "f32" else 2 * size  # a kernel also reads what it adds to; torch adds by itself
    written = size, added, read[3], added
    counted: dict[Linear, Work] = {}
    for place, ((columns, rows), linear) in enumerate(zip(widths, _LINEARS, strict=True)):
        flops = 2 * tokens * columns * rows
        num_bytes = read[place] * columns * (rows + tokens) + written[place] * rows * tokens
        counted[linear] = Work(num_bytes, flops, flops if narrow[place] else 0)
    saved = Work(-2 * read[3] * inner * tokens)  # the intermediate is neither written nor read
    counted["block"] = counted["up"] + counted["down"] + saved
    return counted
