"""The cuda engine's weights as values of E4M3, rounded so that a layer's output changes least (GPTQ).

Rounding each weight to the nearest value costs three times what rounding the inputs does: its errors are the same for
every token, so a text's mean does not even them out. Here the error of a column goes into the columns after it, as far
as the inputs that texts give make it good again.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import TypeVar

import torch
from torch import Tensor

from serving.engines.bert import BertConfig, Layer, Packed, Weights, encode
from serving.engines.e4m3 import BIASES, MATRICES, Norm, find_norms, fold_norm, quantize_weight, undo_norm
from serving.kernels.reference import E4M3_MAX, quantize_tensor
from serving.tokenizer import Ids
from tasks.progress import Advance, progress
from tasks.quantization.gptq import round_rows
from tasks.quantization.trellis import Floats

T = TypeVar("T")

_MOST_TOKENS = 32_768  # of the texts: inputs of a wide layer are 3,072 numbers
_LEAST_SCALE = 1e-3  # of a norm, as a part of its largest


def round_weights(weights: Weights, config: BertConfig, texts: Sequence[Ids]) -> Weights:
    """Linear layers' weights, but of what `config` leaves in float16, so that what the engine makes of them is E4M3
    already, rounded for `texts`, of which there is one at least.

    The engine has the norm before a layer in its weight: that is rounded, and divided by the norm's scale again.
    """
    taken = _take(texts)
    with progress("round to E4M3", len(taken) + len(weights.layers)) as advance:
        products = measure_products(weights, config, _report(taken, advance))
        layers = zip(weights.layers, find_norms(weights.layers), products, strict=True)
        return replace(weights, layers=tuple(_round_layer(*each) for each in _report(layers, advance)))


def choose_weights(weights: Weights, rounded: Weights, config: BertConfig) -> Weights:
    """The linear layers of `rounded`, but those that `config` leaves in float16 of `weights`."""
    layers = []
    for own, other, chosen in zip(weights.layers, rounded.layers, config.rounded, strict=True):
        names = [name for pair in compress(zip(MATRICES, BIASES, strict=True), chosen) for name in pair]
        layers.append(replace(own, **{name: getattr(other, name) for name in names}))
    return replace(weights, layers=tuple(layers))


def measure_products(weights: Weights, config: BertConfig, rows: Iterable[Ids]) -> list[dict[int, Tensor]]:
    """Of each layer, by number in LINEARS, the mean [K, K] of x xᵀ over the tokens' inputs x of `fold_norm`'s weight.

    Where a norm is in the weight they also have a mean, of 1: who rounds for that leaves the rows of a weight centred,
    as they have to be where a kernel multiplies states with the mean that they still have.
    """
    norms = find_norms(weights.layers)
    sizes = config.hidden, config.hidden, config.hidden, config.intermediate
    products = [
        {linear: torch.zeros(size, size) for linear, size in enumerate(sizes) if rounded[linear]}
        for rounded in config.rounded
    ]
    tokens = 0

    def see(layer: int, linear: int, x: Tensor) -> Tensor:
        if linear in products[layer]:
            own = undo_norm(x, norms[layer][linear])
            products[layer][linear].addmm_(own.T, own)
        return x

    for row in rows:
        encode(weights, config, Packed.of_rows([row]), see)
        tokens += len(row)
    for own, before in zip(products, norms, strict=True):
        for linear, product in own.items():
            product.div_(tokens).add_(0.0 if before[linear] is None else 1.0)
    return products


def round_columns(weight: Tensor, products: Tensor) -> Tensor:
    """`weight` [N, K] in values of E4M3 with one scale, for inputs whose mean of x xᵀ is `products` [K, K].

    The largest value stays, by which the engine finds the scale again.
    """
    _, scale = quantize_weight(weight)
    top, top_column = divmod(int(weight.abs().argmax()), weight.shape[1])
    order = products.diagonal().argsort(descending=True)

    def round_row(row: int, own: Floats) -> Floats:
        rounded = quantize_tensor(torch.from_numpy(own), scale).float() * scale
        if int(order[row]) == top_column:
            rounded[top] = weight[top, top_column].sign() * E4M3_MAX * scale
        return rounded.numpy()

    rounded = round_rows(weight.T[order].numpy(), products[order][:, order].double().numpy(), round_row)
    return torch.from_numpy(rounded)[order.argsort()].T.contiguous()


def _round_layer(layer: Layer, norms: Sequence[Norm | None], products: Mapping[int, Tensor]) -> Layer:
    changed = {}
    for linear, product in products.items():
        matrix, bias = MATRICES[linear], BIASES[linear]
        own = getattr(layer, matrix), getattr(layer, bias)
        rounded = round_columns(fold_norm(*own, norms[linear])[0], product)
        changed[matrix], changed[bias] = _unfold(rounded, *own, norms[linear])
    return replace(layer, **changed)


def _unfold(rounded: Tensor, weight: Tensor, bias: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """Weight and bias as the file has them: `fold_norm` makes `rounded` of one, of the other what it made of `weight`.

    Where the scale is next to nothing a column stays as it was: its share of a rounding error, divided by that, would
    be large, and the bias that makes up for it larger.
    """
    if norm is None:
        return rounded.half().float(), bias
    scale, shift = norm
    is_least = scale.abs() <= _LEAST_SCALE * scale.abs().max()
    own = torch.where(is_least, weight, rounded / scale).half().float()
    return own, (bias + (weight - own) @ shift).half().float()


def _take(texts: Sequence[Ids]) -> Sequence[Ids]:
    """Every so many of the texts, so that they have about _MOST_TOKENS."""
    return texts[:: max(1, round(sum(map(len, texts)) / _MOST_TOKENS))]


def _report(each: Iterable[T], advance: Advance) -> Iterator[T]:
    for one in each:
        yield one
        advance(1)
