"""The cuda engine's weights as values of E4M3, rounded so that a layer's output changes least (GPTQ).

Rounding each weight to the nearest value costs three times what rounding the inputs does: its errors are the same for
every token, so a text's mean does not even them out. Here the error of a column goes into the columns after it, as far
as the inputs that texts give make it good again.
"""

from collections.abc import Iterable, Iterator, Sequence
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

T = TypeVar("T")

_DAMPING = 0.01  # of the mean of the diagonal: inputs that hardly vary would take every error
_LATER = 64  # columns after which errors go into all the columns that follow
_MOST_TOKENS = 32_768  # of the texts: inputs of a wide layer are 3,072 numbers
_LARGEST = torch.finfo(torch.float16).max  # of what the engine's file holds


def round_weights(weights: Weights, config: BertConfig, texts: Sequence[Ids]) -> Weights:
    """Every linear layer's weight so that what the engine makes of it is E4M3 already, rounded for `texts`.

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


def measure_products(weights: Weights, config: BertConfig, rows: Iterable[Ids]) -> list[list[Tensor]]:
    """By layer and LINEARS the mean [K, K] of x xᵀ over the tokens' inputs x of `fold_norm`'s weight.

    Where a norm is in the weight they also have a mean, of 1: who rounds for that leaves the rows of a weight centred,
    as they have to be where a kernel multiplies states with the mean that they still have.
    """
    norms = find_norms(weights.layers)
    sizes = config.hidden, config.hidden, config.hidden, config.intermediate
    products = [[torch.zeros(size, size) for size in sizes] for _ in range(config.layers)]
    tokens = 0

    def see(layer: int, linear: int, x: Tensor) -> Tensor:
        own = undo_norm(x, norms[layer][linear])
        products[layer][linear].addmm_(own.T, own)
        return x

    for row in rows:
        encode(weights, config, Packed.of_rows([row]), see)
        tokens += len(row)
    return [
        [product / tokens + (0.0 if norm is None else 1.0) for product, norm in zip(*layer, strict=True)]
        for layer in zip(products, norms, strict=True)
    ]


def round_columns(weight: Tensor, products: Tensor) -> Tensor:
    """`weight` [N, K] in values of E4M3 with one scale, for inputs whose mean of x xᵀ is `products` [K, K].

    The largest value stays, by which the engine finds the scale again.
    """
    _, scale = quantize_weight(weight)
    top, top_column = divmod(int(weight.abs().argmax()), weight.shape[1])
    order = products.diagonal().argsort(descending=True)
    spread = _spread_errors(products[order][:, order])
    left = weight[:, order]
    for first in range(0, left.shape[1], _LATER):
        last = min(first + _LATER, left.shape[1])
        errors = torch.empty(len(left), last - first)
        for column in range(first, last):
            own = left[:, column]
            rounded = quantize_tensor(own, scale).float() * scale
            if int(order[column]) == top_column:
                rounded[top] = weight[top, top_column].sign() * E4M3_MAX * scale
            error = errors[:, column - first] = (own - rounded) / spread[column, column]
            left[:, column + 1 : last] -= error[:, None] * spread[column, column + 1 : last]
            left[:, column] = rounded
        left[:, last:] -= errors @ spread[first:last, last:]
    result = torch.empty_like(left)
    result[:, order] = left
    return result


def _spread_errors(products: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped inverse: how the error of a column is made good by the columns after it."""
    damped = products.double()
    damped = damped + torch.eye(len(damped)) * (_DAMPING * damped.diagonal().mean() + 1e-12)
    return torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).float()


def _round_layer(layer: Layer, norms: Sequence[Norm | None], products: Sequence[Tensor]) -> Layer:
    changed = {}
    for matrix, bias, norm, product in zip(MATRICES, BIASES, norms, products, strict=True):
        weight = getattr(layer, matrix)
        rounded = round_columns(fold_norm(weight, getattr(layer, bias), norm)[0], product)
        changed[matrix], changed[bias] = _unfold(rounded, weight, getattr(layer, bias), norm)
    return replace(layer, **changed)


def _unfold(rounded: Tensor, weight: Tensor, bias: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """The weight and bias of which `fold_norm` makes `rounded`, and the bias that it makes of the own `weight`."""
    if norm is None:
        return rounded, bias
    scale, shift = norm
    own = torch.where(scale == 0, weight, rounded / scale).clamp(-_LARGEST, _LARGEST)
    return own, bias + (weight - own) @ shift


def _take(texts: Sequence[Ids]) -> Sequence[Ids]:
    """Every so many of the texts, so that they have about _MOST_TOKENS."""
    return texts[:: max(1, round(sum(map(len, texts)) / _MOST_TOKENS))]


def _report(each: Iterable[T], advance: Advance) -> Iterator[T]:
    for one in each:
        yield one
        advance(1)
