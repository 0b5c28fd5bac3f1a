"""The layers for many tokens on Hopper: no layer norm runs by itself.

Whoever computes a state writes it as it is, with the sums over its rows that its layer norm needs. Who multiplies it by
a matrix has the norm's scale in the matrix and its shift in the bias, and corrects the product by mean and spread; who
adds it normalises what it adds. The norm behind the last layer is left to the pooling. Each kernel begins with the rows
that the one before it wrote last, which the second cache still has: they go down and up in turns.

The GEMM is `gemm_wide` where that is faster, else `gemm_hopper`; MiniLM's feed-forward block in E4M3 is one kernel.
Where a matrix is E4M3, the state is written in E4M3 as well, by a calibrated scale: a few states reach a hundred times
as far as the others, and their norm, whose mean and spread come from all of them, does not survive a cut. What is
written in E4M3 by `gemm_wide` and `feed_forward` has an order of columns into which the matrices that read it are
brought.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from serving.engines.bert import BertConfig, Layer, Packed, Weights
from serving.engines.cuda_attention import Attention, is_prepared
from serving.engines.cuda_linears import Linear, scale_input
from serving.engines.e4m3 import fold_norm
from serving.kernels import feed_forward, gemm_wide
from serving.kernels.pool import Norm

_HALF = torch.float16
Carve = Callable[[int, int, int, torch.dtype], Tensor]
Reorder = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class States:
    """Where the states [T, H] of a run lie: in float16, and in E4M3 with the embeddings' scales [T], where read so."""

    x: Tensor
    narrow: Tensor | None = None
    scales: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Product:
    """Of a state before its norm: the scaled matrix, the bias with the shift, and the matrix's row sums [N]; none where
    they are 0, as `gemm_wide` and `feed_forward` have it."""

    linear: Linear
    bias: Tensor
    sums: Tensor | None


@dataclass(frozen=True, slots=True)
class _Sum:
    """Added to a state: its norm's scale, and whether `gemm_wide` does it for many rows."""

    linear: Linear
    bias: Tensor
    scale: Tensor
    is_wide: bool


@dataclass(frozen=True, slots=True)
class _Folded:
    """One layer; `block` is up and down in one, and then these two have no matrix."""

    query: _Product
    output: _Sum
    up: _Product
    down: _Sum
    block: feed_forward.Block | None

    @property
    def reorder(self) -> Reorder | None:
        """What brings a weight into the order of the E4M3 that the layer leaves."""
        if self.block is not None:
            return feed_forward.reorder
        return gemm_wide.reorder if self.down.is_wide else None


@dataclass(frozen=True, slots=True)
class _Kernels:
    """Which of the kernels in CUDA C++ are to be had on a device."""

    device: torch.device
    has_wide: bool
    has_block: bool

    def are_wide(self, weight: Tensor) -> bool:
        """Whether `gemm_wide` multiplies by the weight."""
        return self.has_wide and gemm_wide.fits(weight, self.device)

    def are_block(self, up: Linear, down: Linear) -> bool:
        """Whether `feed_forward` takes both at once."""
        return self.has_block and feed_forward.fits(up.weight, down.weight, self.device)


class FoldedLayers:
    """Layers on a workspace of row sums, allocated once."""

    def __init__(
        self,
        weights: Weights,
        config: BertConfig,
        linears: Sequence[Sequence[Linear]],
        attention: Attention,
        device: torch.device,
        max_tokens: int,
    ) -> None:
        """`linears`: the layers' own, on the CPU or `device`. Output, down and what is E4M3 are used as they are, their
        columns perhaps in another order. Layers are folded on the CPU: the device gets what it keeps."""
        self._config, self._attention = config, attention
        kernels = _prepare(linears, device)
        before: tuple[Layer, _Folded] | None = None
        self._layers: list[_Folded] = []
        for layer, own in zip(weights.layers, linears, strict=True):
            self._layers.append(move(_fold(layer, own, before, kernels), device))
            before = layer, self._layers[-1]
        last = weights.layers[-1]
        self._norm = last.down_norm_weight.to(device, _HALF), last.down_norm_bias.to(device, _HALF)
        # Sums of rows with mean 0 and spread 1, of the states after the attention, and of those after the layer.
        self._plain = torch.tensor([0.0, config.hidden], device=device).repeat(max_tokens, 1, 1)
        self._sums = torch.zeros(2, max_tokens * config.hidden // 128, 2, device=device)
        self._programs = torch.cuda.get_device_properties(device).multi_processor_count

    def run(self, batch: Packed, states: States, carve: Carve, is_long: bool) -> tuple[Norm, bool]:
        """Take the normalised embeddings, written downward, through all layers; `carve` gives pieces of the wide area.

        Returns the norm that is still to come, and whether who reads the states is to go upward.
        """
        config, tokens = self._config, len(states.x)
        before, up = self._plain[:tokens], True
        for number, layer in enumerate(self._layers):
            middle = self._take_sums(0, self._goes_wide(layer.output, tokens), tokens)
            after = self._take_sums(1, layer.block is not None or self._goes_wide(layer.down, tokens), tokens)
            follower = self._layers[number + 1].query.linear if number + 1 < config.layers else None
            context = self._attend(layer, batch, states, carve, is_long, None if number == 0 else before, up)
            self._add(context, layer.output, states, (before, middle), layer.up.linear, up)
            if layer.block is not None:
                self._feed_forward(layer.block, states, (middle, after), follower, not up)
                up = not up  # one kernel instead of two
            else:
                inner = carve(0, tokens, config.intermediate, layer.down.linear.dtype)
                self._multiply(layer.up, states, inner, middle, not up, True, layer.down.linear.x_factor)
                self._add(inner, layer.down, states, (middle, after), follower, up)
            before, up = after, not up
        return (after, *self._norm, config.eps), up

    def _take_sums(self, number: int, is_wide: bool, tokens: int) -> Tensor:
        """Where the sums [T, parts, 2] of what is added lie: one for the columns of a tile, or program of a block."""
        parts = self._config.hidden // (gemm_wide.COLUMNS if is_wide else 128)
        return self._sums[number, : tokens * parts].view(tokens, parts, 2)

    def _goes_wide(self, added: _Sum, tokens: int) -> bool:
        """A steady result may not depend on the number of rows."""
        least = 0 if self._attention.is_steady else gemm_wide.least_rows(self._config.hidden, self._programs)
        return added.is_wide and tokens >= least

    def _attend(
        self, layer: _Folded, batch: Packed, states: States, carve: Carve, is_long: bool, sums: Tensor | None, up: bool
    ) -> Tensor:
        config, tokens, output = self._config, len(states.x), layer.output.linear
        qkv = carve(0, tokens, 3 * config.hidden, _HALF)
        context = carve(tokens * 6 * config.hidden, tokens, config.hidden, output.dtype)
        self._multiply(layer.query, states, qkv, sums, up)
        self._attention.run(qkv, batch, context, output.x_factor, is_long, not up)
        return context

    def _multiply(
        self, product: _Product, states: States, out: Tensor, sums: Tensor | None, up: bool, gelu: bool = False,
        out_factor: Tensor | None = None,
    ) -> None:  # fmt: skip
        """A product with the normalised states; without `sums` they are normalised already."""
        own, eps = product.linear, self._config.eps
        x, x_scales = (states.x, None) if own.dtype == _HALF else (states.narrow, states.scales)
        if sums is not None:
            x_scales = own.x_scale
        assert x is not None, "E4M3 states where a layer reads such"
        if product.sums is None:
            known = self._plain[: len(x)] if sums is None else sums
            scales = x_scales, own.weight_scale, out_factor
            gemm_wide.linear(x, own.weight, product.bias, out, self._programs, known, eps, gelu, up, *scales)
            return
        from serving.kernels.gemm_hopper import RowNorm, linear  # noqa: PLC0415  Gluon loads only where it can run

        norm = None if sums is None else RowNorm(sums, product.sums, eps)
        linear(
            x, own.weight, product.bias, out, self._programs, gelu, None, x_scales, own.weight_scale, out_factor, norm,
            is_upward=up,
        )  # fmt: skip

    def _feed_forward(
        self, block: feed_forward.Block, states: States, sums: tuple[Tensor, Tensor], reader: Linear | None, up: bool
    ) -> None:
        """Up, down and their sum with the states."""
        assert states.narrow is not None, "E4M3 states where a layer reads such"
        factor = None if reader is None else reader.x_factor
        before, after = sums
        feed_forward.run(states.x, states.narrow, before, block, after, self._programs, self._config.eps, up, factor)

    def _add(
        self, x: Tensor, added: _Sum, states: States, sums: tuple[Tensor, Tensor], reader: Linear | None, up: bool
    ) -> None:
        """Add a product to the states, which are normalised by their sums on the way and summed anew."""
        own, eps, (before, after) = added.linear, self._config.eps, sums
        copy: dict[str, Any] = {}
        if reader is not None and reader.dtype != _HALF:
            copy = {"copy": states.narrow, "out_factor": reader.x_factor}
        if self._goes_wide(added, len(x)):
            gemm_wide.add(
                x, own.weight, added.bias, states.x, self._programs, before, added.scale, eps, after, up,
                own.x_scale, own.weight_scale, **copy,
            )  # fmt: skip
            return
        from serving.kernels.gemm_hopper import RowNorm, linear  # noqa: PLC0415  Gluon loads only where it can run

        linear(
            x, own.weight, added.bias, states.x, self._programs, residual=states.x, x_scales=own.x_scale,
            weight_scale=own.weight_scale, norm=RowNorm(before, added.scale, eps), out_sums=after, is_upward=up, **copy,
        )  # fmt: skip


def move(value: Any, device: torch.device) -> Any:
    """A tensor, or a dataclass with all of its tensors, on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    return replace(value, **{each.name: move(getattr(value, each.name), device) for each in fields(value)})


def _prepare(linears: Sequence[Sequence[Linear]], device: torch.device) -> _Kernels:
    """Compile what the layers' linears need."""
    forms, blocks = _list_forms(linears, device), _list_blocks(linears, device)
    return _Kernels(
        device,
        is_prepared(partial(gemm_wide.prepare, device, forms), "the GEMM with smaller tiles"),
        is_prepared(partial(feed_forward.prepare, device, blocks), "two GEMMs for each feed-forward block"),
    )


def _list_blocks(linears: Sequence[Sequence[Linear]], device: torch.device) -> set[bool]:
    """What `feed_forward` is compiled for: whether somebody reads its result in E4M3."""
    readers = [*(query.dtype != _HALF for query, *_ in linears[1:]), False]
    return {
        is_read
        for (_, _, up, down), is_read in zip(linears, readers, strict=True)
        if feed_forward.fits(up.weight, down.weight, device)
    }


def _list_forms(linears: Sequence[Sequence[Linear]], device: torch.device) -> set[gemm_wide.Form]:
    """What `gemm_wide` is compiled for: a result is in E4M3, or has a copy that is, where its reader takes E4M3."""
    forms = set()
    for number, (query, output, up, down) in enumerate(linears):
        follower = linears[number + 1][0] if number + 1 < len(linears) else None
        readers = None, up, down, follower
        for place, (own, reader) in enumerate(zip((query, output, up, down), readers, strict=True)):
            if gemm_wide.fits(own.weight, device):
                is_read = reader is not None and reader.dtype != _HALF
                forms.add(gemm_wide.Form.of(own.weight, place % 2 == 1, place == 2, is_read))
    return forms


def _fold(layer: Layer, linears: Sequence[Linear], before: tuple[Layer, _Folded] | None, kernels: _Kernels) -> _Folded:
    """The layer on states whose norm, that of the layer `before`, is still to come; the embeddings were normalised."""
    query, output, up, down = linears
    hidden = len(layer.out_bias)
    if before is None:
        scale, shift = torch.ones(hidden), torch.zeros(hidden)
        product = _Product(query, layer.qkv_bias.half(), None if kernels.are_wide(query.weight) else torch.empty(0))
    else:
        earlier, folded = before
        scale, shift = earlier.down_norm_weight, earlier.down_norm_bias
        state, is_wide = (earlier.state_amax, 1), kernels.are_wide(query.weight)
        product = _fold_product(
            (layer.qkv_weight, layer.qkv_bias), query, (scale, shift), state, folded.reorder, is_wide
        )
    middle = layer.out_norm_weight, layer.out_norm_bias
    first = _fold_sum(output, layer.out_bias, (scale, shift), kernels)
    is_block, is_wide = kernels.are_block(up, down), kernels.are_wide(up.weight)
    state = layer.state_amax, 0
    reorder = gemm_wide.reorder if first.is_wide else None
    inner = _fold_product((layer.up_weight, layer.up_bias), up, middle, state, reorder, is_wide or is_block)
    if is_wide and not is_block and down.dtype != _HALF:
        down = replace(down, weight=gemm_wide.reorder(down.weight))
    last = _fold_sum(down, layer.down_bias, middle, kernels)
    if not is_block:
        return _Folded(product, first, inner, last, None)
    block = _make_block(inner, last)
    inner, last = replace(inner, linear=_forget(inner.linear)), replace(last, linear=_forget(last.linear))
    return _Folded(product, first, inner, last, block)


def _make_block(up: _Product, down: _Sum) -> feed_forward.Block:
    first, second = up.linear, down.linear
    scales = first.x_scale, first.weight_scale, second.x_scale, second.weight_scale, second.x_factor
    known = [each for each in scales if each is not None]
    weights = feed_forward.arrange(first.weight, second.weight)
    return feed_forward.Block(weights, up.bias, down.bias, down.scale.to(_HALF), *known)


def _forget(own: Linear) -> Linear:
    """Without its matrix, which a block has in another order."""
    return replace(own, weight=own.weight.new_empty(0))


def _fold_sum(own: Linear, bias: Tensor, norm: tuple[Tensor, Tensor], kernels: _Kernels) -> _Sum:
    """`norm`: scale and shift of that of the state that is added to."""
    (scale, shift), is_wide = norm, kernels.are_wide(own.weight)
    return _Sum(own, (bias + shift).half(), scale.to(_HALF if is_wide else torch.float32), is_wide)


def _fold_product(
    layer: tuple[Tensor, Tensor], own: Linear, norm: tuple[Tensor, Tensor], state: tuple[Tensor | None, int],
    reorder: Reorder | None, is_centred: bool,
) -> _Product:  # fmt: skip
    """`layer`: weight and bias; `norm`: scale and shift; `state`: the calibrated states that this multiplies, of which
    a norm has one, and whose E4M3 has the order of `reorder`.

    A matrix whose rows are centred takes the mean of a row of states away, as one in E4M3 does, which has the norm in
    it already. The rounding of its values is not centred: the mean, a part of the states like any other, times the sum
    of a row's rounding errors stays, but where the kernel knows the sums.
    """
    if own.bias is None:
        centred, bias = fold_norm(*layer, norm)
        folded, bias = Linear((centred if is_centred else layer[0] * norm[0]).half()), bias.half()
    else:
        amax, number = state
        assert amax is not None, "calibrated"
        x_scale, x_factor = scale_input(amax[number])
        values = own.weight if reorder is None else reorder(own.weight)
        folded, bias = replace(own, weight=values, x_scale=x_scale, x_factor=x_factor), own.bias
    return _Product(folded, bias, None if is_centred else folded.weight.float().sum(1))
