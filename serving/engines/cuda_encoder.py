"""The encoder's forward pass on the kernels, in float16 or E4M3, inside a workspace that is allocated once."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.engines.bert import BertConfig, Layer, Packed, Weights
from serving.engines.cuda_folded import FoldedLayers
from serving.kernels.add_norm import add_norm
from serving.kernels.attention import attention
from serving.kernels.compiled import CompileFailed
from serving.kernels.embed_norm import embed_norm
from serving.kernels.few_tokens import MAX_TOKENS, FewTokens, Stacked
from serving.kernels.few_tokens_cluster import FewTokensCluster
from serving.kernels.gemm import MANY_ROWS, add_product, is_hopper, linear
from serving.kernels.pool import pool

_HALF = torch.float16
_E4M3 = torch.float8_e4m3fn
_E4M3_MAX = 448.0
_log = logging.getLogger(__name__)
_MAX_FOLDED = 512  # of the hidden size: at 768 the GEMMs lose as much as the layer norms took
_MARGIN = 2.0  # between the largest input calibration saw and the largest E4M3 can hold: its precision is the same


class Encoder:
    """Weights and workspace on one device; a run reads nothing that is not there. One run at a time.

    The workspace holds the hidden states and one wide area, where queries, keys, values and their context lie until
    the intermediate takes their place: bytes a token are 2H + 8H or 2H + 2I, whichever is more.
    """

    def __init__(self, weights: Weights, config: BertConfig, device: torch.device, max_tokens: int, max_rows: int):
        """Raises torch.OutOfMemoryError when weights and workspace do not fit."""
        self.config, self.max_tokens, self.max_rows = config, max_tokens, max_rows
        self._words, self._positions = (each.to(device, _HALF) for each in (weights.words, weights.positions))
        self._norm = weights.norm_weight.to(device, _HALF), weights.norm_bias.to(device, _HALF)
        self._layers = [_move_vectors(layer, device) for layer in weights.layers]
        self._hidden = torch.zeros(max_tokens * config.hidden, dtype=_HALF, device=device)
        self._wide = torch.zeros(max_tokens * self._wide_bytes(config), dtype=torch.uint8, device=device)
        self._out = torch.zeros(max_rows, config.hidden, dtype=torch.float32, device=device)
        self._load_matrices(weights, device)
        self._few = self._make_few()
        self._folded = self._make_folded(weights)

    def run(self, batch: Packed, is_long: bool = False) -> Tensor:
        """Float32 [B, H] of a packed batch, in memory that the next run overwrites; `is_long` only chooses kernels."""
        tokens, config = len(batch.ids), self.config
        out = self._out[: len(batch.offsets) - 1]
        if self._few is not None and tokens <= MAX_TOKENS:
            self._few.run(batch.ids, batch.starts, batch.ends, batch.offsets, out)
            return out
        x = self._hidden[: tokens * config.hidden].view(tokens, config.hidden)
        self._embed(batch, x)
        if self._folded is not None and tokens >= MANY_ROWS:
            self._folded.run(batch, x, self._carve, is_long)
        else:
            for number in range(config.layers):
                self._run_layer(number, batch, x, is_long)
        pool(x, batch.offsets, config.pooling, config.normalize, out)
        return out

    def _load_matrices(self, weights: Weights, device: torch.device) -> None:
        names = ("qkv_weight", "out_weight", "up_weight", "down_weight")
        self._stacks = [
            torch.stack([getattr(each, name).half() for each in weights.layers]).to(device) for name in names
        ]
        self._matrices = list(zip(*self._stacks, strict=True))

    def _make_few(self) -> FewTokens | FewTokensCluster | None:
        """The kernel for few tokens, where there is one that can take the model; `FewTokens` shares the matrices."""
        config = self.config
        sizes = config.hidden, config.heads, config.intermediate
        if not FewTokens.fits(*sizes):
            return None
        layers, (qkv, output, up, down) = self._layers, self._stacks
        norms = [torch.stack(self._norm)]
        for layer in layers:
            norms.append(torch.stack([layer.out_norm_weight, layer.out_norm_bias]))
            norms.append(torch.stack([layer.down_norm_weight, layer.down_norm_bias]))
        biases = [
            torch.stack([getattr(layer, name) for layer in layers])
            for name in ("qkv_bias", "out_bias", "up_bias", "down_bias")
        ]
        interleaved = (each for pair in zip((qkv, output, up, down), biases, strict=True) for each in pair)
        stacked = Stacked(self._words, self._positions, torch.stack(norms), *interleaved)
        if FewTokensCluster.fits(*sizes, self._words.device):
            try:
                return FewTokensCluster(stacked, config.eps, config.pooling, config.normalize)
            except CompileFailed as error:
                _log.warning("few tokens run on the kernel without clusters reason=%s", error)
        return FewTokens(stacked, config.heads, config.eps, config.pooling, config.normalize)

    def _make_folded(self, weights: Weights) -> FoldedLayers | None:
        """The layers for many tokens, on the GPUs that have their GEMM."""
        narrow = self.config.hidden <= _MAX_FOLDED and self.config.hidden % 128 == 0
        if not narrow or self.max_tokens < MANY_ROWS or not is_hopper(self._words.device):
            return None
        _, output, _, down = self._stacks
        return FoldedLayers(weights, self.config, output, down, self.max_tokens)

    @staticmethod
    def _wide_bytes(config: BertConfig) -> int:
        return 2 * max(4 * config.hidden, config.intermediate)

    def _embed(self, batch: Packed, x: Tensor) -> None:
        embed_norm(batch.ids, batch.starts, self._words, self._positions, *self._norm, self.config.eps, x)

    def _run_layer(self, number: int, batch: Packed, x: Tensor, is_long: bool) -> None:
        config, layer, tokens = self.config, self._layers[number], len(x)
        qkv_weight, out_weight, up_weight, down_weight = self._matrices[number]
        qkv = self._carve(0, tokens, 3 * config.hidden, _HALF)
        context = self._carve(tokens * 6 * config.hidden, tokens, config.hidden, _HALF)
        inner = self._carve(0, tokens, config.intermediate, _HALF)
        linear(x, qkv_weight, layer.qkv_bias, qkv)
        attention(qkv, batch.starts, batch.ends, config.heads, context, is_long=is_long)
        add_product(context, out_weight, x)
        add_norm(x, None, layer.out_bias, layer.out_norm_weight, layer.out_norm_bias, config.eps, x)
        linear(x, up_weight, layer.up_bias, inner, gelu=True)
        add_product(inner, down_weight, x)
        add_norm(x, None, layer.down_bias, layer.down_norm_weight, layer.down_norm_bias, config.eps, x)

    def _carve(self, first_byte: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A [rows, columns] piece of the wide area."""
        size = rows * columns * dtype.itemsize
        return self._wide[first_byte : first_byte + size].view(dtype).view(rows, columns)


@dataclass(frozen=True, slots=True)
class _Linear:
    """An E4M3 weight [N, K] and float32 [1] scales: its own, and that of its input with the inverse."""

    weight: Tensor
    weight_scale: Tensor
    x_scale: Tensor
    x_factor: Tensor


class Fp8Encoder(Encoder):
    """The linear layers in E4M3, everything between them in float16 and float32.

    Whoever produces an input of a linear layer quantises it in the same pass. The inputs of the query and up
    projections take a scale a row when `row_scales`, else a calibrated one; context and intermediate, whose rows no
    one program sees whole, always take the calibrated one.
    """

    def __init__(
        self,
        weights: Weights,
        config: BertConfig,
        device: torch.device,
        max_tokens: int,
        max_rows: int,
        row_scales: bool = False,
    ):
        """Raises torch.OutOfMemoryError. Every layer must have been calibrated."""
        super().__init__(weights, config, device, max_tokens, max_rows)
        self._narrow = torch.zeros(max_tokens * config.hidden, dtype=_E4M3, device=device)
        self._row_scales = torch.zeros(max_tokens, dtype=torch.float32, device=device) if row_scales else None

    def _make_few(self) -> None:
        return None

    def _make_folded(self, weights: Weights) -> None:
        return None

    def _load_matrices(self, weights: Weights, device: torch.device) -> None:
        self._linears = [_quantize_layer(layer, device) for layer in weights.layers]

    @staticmethod
    def _wide_bytes(config: BertConfig) -> int:
        return max(7 * config.hidden, config.intermediate)

    def _embed(self, batch: Packed, x: Tensor) -> None:
        narrow, scales = self._target(0, 0, x)
        embed_norm(
            batch.ids, batch.starts, self._words, self._positions, *self._norm, self.config.eps, x, narrow, scales
        )

    def _target(self, number: int, linear_number: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Where the quantised x goes, and its scales, for one of a layer's linears."""
        narrow = self._narrow[: x.numel()].view(x.shape)
        if self._row_scales is not None:
            return narrow, self._row_scales[: len(x)]
        return narrow, self._linears[min(number, self.config.layers - 1)][linear_number].x_scale

    def _run_layer(self, number: int, batch: Packed, x: Tensor, is_long: bool) -> None:
        config, layer, tokens = self.config, self._layers[number], len(x)
        query, output, up, down = self._linears[number]
        qkv = self._carve(0, tokens, 3 * config.hidden, _HALF)
        context = self._carve(tokens * 6 * config.hidden, tokens, config.hidden, _E4M3)
        inner = self._carve(0, tokens, config.intermediate, _E4M3)
        narrow, scales = self._target(number, 0, x)
        linear(narrow, query.weight, layer.qkv_bias, qkv, False, scales, query.weight_scale)
        attention(qkv, batch.starts, batch.ends, config.heads, context, output.x_factor, is_long)
        add_product(context, output.weight, x, output.x_scale, output.weight_scale)
        narrow, scales = self._target(number, 2, x)
        add_norm(x, None, layer.out_bias, layer.out_norm_weight, layer.out_norm_bias, config.eps, x, narrow, scales)
        linear(narrow, up.weight, layer.up_bias, inner, True, scales, up.weight_scale, down.x_factor)
        add_product(inner, down.weight, x, down.x_scale, down.weight_scale)
        narrow, scales = self._target(number + 1, 0, x)
        add_norm(x, None, layer.down_bias, layer.down_norm_weight, layer.down_norm_bias, config.eps, x, narrow, scales)


def _move_vectors(layer: Layer, device: torch.device) -> Layer:
    """The layer with its vectors on the device; its matrices are kept in the form their kernels take, elsewhere."""
    names = [name for name in Layer.__slots__ if name.endswith("_bias") or "norm" in name]
    empty = torch.empty(0)
    moved = {name: getattr(layer, name).to(device, _HALF) for name in names}
    return Layer(**moved, **{name: empty for name in Layer.__slots__ if name not in moved})


def _quantize_layer(layer: Layer, device: torch.device) -> tuple[_Linear, ...]:
    assert layer.amax is not None
    matrices = (layer.qkv_weight, layer.out_weight, layer.up_weight, layer.down_weight)
    return tuple(_quantize(weight, amax, device) for weight, amax in zip(matrices, layer.amax, strict=True))


def _quantize(weight: Tensor, amax: Tensor, device: torch.device) -> _Linear:
    weight_scale = (weight.float().abs().amax() / _E4M3_MAX).clamp(min=1e-12).reshape(1)
    x_scale = (amax * _MARGIN / _E4M3_MAX).clamp(min=1e-12).reshape(1)
    return _Linear(
        weight=(weight.float() / weight_scale).to(_E4M3).to(device),
        weight_scale=weight_scale.to(device),
        x_scale=x_scale.to(device),
        x_factor=(1.0 / x_scale).to(device),
    )
