"""The encoder's forward pass on the kernels, in float16 or E4M3, inside a workspace that is allocated once."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from serving.engines.bert import BertConfig, Layer, Packed, Weights
from serving.engines.cuda_attention import Attention
from serving.engines.cuda_folded import FoldedLayers, States, move
from serving.engines.cuda_linears import Linear, load_linears
from serving.engines.e4m3 import MATRICES
from serving.kernels import gemm_wide
from serving.kernels.add_norm import add_norm
from serving.kernels.compiled import CompileFailed
from serving.kernels.embed_norm import embed_norm
from serving.kernels.few_tokens import MAX_TOKENS, FewTokens, Stacked
from serving.kernels.few_tokens_cluster import FewTokensCluster
from serving.kernels.gemm import MANY_ROWS, add_product, count_hopper_processors, is_hopper, linear
from serving.kernels.pool import pool

_HALF = torch.float16
_E4M3 = torch.float8_e4m3fn
_log = logging.getLogger(__name__)
_BIASES = "qkv_bias", "out_bias", "up_bias", "down_bias"
_MAX_FOLDED = 512  # of the hidden size without `gemm_wide`: at 768 the GEMMs lose as much as the layer norms took


class Encoder:
    """Weights and workspace on one device; a run reads nothing that is not there. One run at a time.

    The workspace holds the hidden states and one wide area, where queries, keys, values and their context lie until
    the intermediate takes their place, and the vectors that of everything: bytes a token are 2H + 8H or 2H + 2I,
    whichever is more. A counter a row, of `pool`, lies behind it.
    """

    _least_folded = MANY_ROWS  # tokens of a run that takes the folded layers

    def __init__(self, weights: Weights, config: BertConfig, device: torch.device, max_tokens: int, max_rows: int):
        """Raises torch.OutOfMemoryError when weights and workspace do not fit."""
        self.config, self.max_tokens, self.max_rows = config, max_tokens, max_rows
        self._words, self._positions = (each.to(device, _HALF) for each in (weights.words, weights.positions))
        self._biases = _load_stacks(weights.layers, _BIASES, device)
        self._norms = _stack_norms(weights).to(device, _HALF)
        self._norm = self._norms[0, 0], self._norms[0, 1]
        self._layers = [_view_vectors(number, self._biases, self._norms) for number in range(config.layers)]
        self._load_matrices(weights, device)
        self._make_workspace(device)
        self._few = self._make_few()
        self._attention = self._make_attention(device)
        self._folded = self._make_folded(weights)

    @property
    def long_length(self) -> int | None:
        """Tokens that one attends to, on average, from which a run `is_long`; none where that changes nothing."""
        return self._attention.long_length

    def run(self, batch: Packed, is_long: bool = False) -> Tensor:
        """Float32 [B, H] of a packed batch, in memory that the next run overwrites; `is_long` only chooses kernels."""
        tokens, config = len(batch.ids), self.config
        out = self._out[: len(batch.offsets) - 1]
        if self._few is not None and tokens <= MAX_TOKENS:
            self._few.run(batch.ids, batch.starts, batch.ends, batch.offsets, out)
            return out
        x = self._hidden[: tokens * config.hidden].view(tokens, config.hidden)
        self._embed(batch, x)
        norm, up = None, False  # the last layer norm goes up
        if self._folded is not None and tokens >= self._least_folded:
            norm, up = self._folded.run(batch, self._states(x), self._carve, is_long)
        else:
            for number in range(config.layers):
                self._run_layer(number, batch, x, is_long)
        pool(x, batch.offsets, config.pooling, config.normalize, out, self._pooled, norm, up)
        return out

    def _load_matrices(self, weights: Weights, device: torch.device) -> None:
        self._stacks = _load_stacks(weights.layers, MATRICES, device)
        self._matrices = list(zip(*self._stacks, strict=True))

    def _make_workspace(self, device: torch.device) -> None:
        """In one piece: what is taken from the GPU's memory is rounded up, by as much as a megabyte."""
        hidden = self.config.hidden
        states, out = 2 * hidden * self.max_tokens, 4 * hidden * self.max_rows
        end = states + max(out, self.max_tokens * self._wide_bytes())
        workspace = torch.zeros(end + 4 * self.max_rows, dtype=torch.uint8, device=device)
        self._hidden, self._wide = workspace[:states].view(_HALF), workspace[states:end]
        self._out = self._wide[:out].view(torch.float32).view(self.max_rows, hidden)
        self._pooled = workspace[end:].view(torch.int32)

    def _make_few(self) -> FewTokens | FewTokensCluster | None:
        """The kernel for few tokens, where there is one that can take the model; it shares the matrices."""
        config = self.config
        sizes = config.hidden, config.heads, config.intermediate
        if not FewTokens.fits(*sizes):
            return None
        interleaved = (each for pair in zip(self._stacks, self._biases, strict=True) for each in pair)
        stacked = Stacked(self._words, self._positions, self._norms, *interleaved)
        if FewTokensCluster.fits(*sizes, self._words.device):
            try:
                return FewTokensCluster(stacked, config.eps, config.pooling, config.normalize)
            except CompileFailed as error:
                _log.warning("few tokens run on the kernel without clusters reason=%s", error)
        return FewTokens(stacked, config.heads, config.eps, config.pooling, config.normalize)

    def _make_attention(self, device: torch.device) -> Attention:
        return Attention(self.config, device, {_HALF}, is_steady=False)

    def _make_folded(self, weights: Weights) -> FoldedLayers | None:
        """The layers for many tokens, on the GPUs that have their GEMM."""
        hidden, device = self.config.hidden, self._words.device
        is_narrow = hidden <= _MAX_FOLDED and hidden % 128 == 0
        if not is_narrow and all(gemm_wide.fits(matrix, device) for matrix in self._matrices[0]):
            self._least_folded = gemm_wide.least_rows(hidden, count_hopper_processors(device))
        elif not is_narrow:
            return None
        if self.max_tokens < self._least_folded or not is_hopper(device):
            return None
        linears = [[Linear(matrix) for matrix in matrices] for matrices in self._matrices]
        return FoldedLayers(weights, self.config, linears, self._attention, device, self.max_tokens)

    def _states(self, x: Tensor) -> States:
        return States(x)

    def _wide_bytes(self) -> int:
        """Of a token's part of the wide area."""
        return 2 * max(4 * self.config.hidden, self.config.intermediate)

    def _embed(self, batch: Packed, x: Tensor) -> None:
        embed_norm(batch.ids, batch.starts, self._words, self._positions, *self._norm, self.config.eps, x)

    def _run_layer(self, number: int, batch: Packed, x: Tensor, is_long: bool) -> None:
        config, layer, tokens = self.config, self._layers[number], len(x)
        qkv_weight, out_weight, up_weight, down_weight = self._matrices[number]
        qkv = self._carve(0, tokens, 3 * config.hidden, _HALF)
        context = self._carve(tokens * 6 * config.hidden, tokens, config.hidden, _HALF)
        inner = self._carve(0, tokens, config.intermediate, _HALF)
        linear(x, qkv_weight, layer.qkv_bias, qkv)
        self._attention.run(qkv, batch, context, None, is_long)
        add_product(context, out_weight, x)
        add_norm(x, None, layer.out_bias, layer.out_norm_weight, layer.out_norm_bias, config.eps, x)
        linear(x, up_weight, layer.up_bias, inner, gelu=True)
        add_product(inner, down_weight, x)
        add_norm(x, None, layer.down_bias, layer.down_norm_weight, layer.down_norm_bias, config.eps, x)

    def _carve(self, first_byte: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A [rows, columns] piece of the wide area."""
        size = rows * columns * dtype.itemsize
        return self._wide[first_byte : first_byte + size].view(dtype).view(rows, columns)


class Fp8Encoder(Encoder):
    """The linear layers in E4M3 but those of `config.float16`; everything between them in float16 and float32.

    Whoever produces an input of an E4M3 layer quantises it in the same pass. The inputs of the query and up
    projections, before scale and shift of their norm, which the layer has in it, take a scale a row; context and
    intermediate, whose rows no one program sees whole, a calibrated one.
    On Hopper the layers are folded, for any number of tokens: E4M3 magnifies the last bit, so a text has the same
    vector alone and in a batch only if the same arithmetic runs.
    """

    _least_folded = 1
    _linears: list[list[Linear]]

    def __init__(self, weights: Weights, config: BertConfig, device: torch.device, max_tokens: int, max_rows: int):
        """Raises torch.OutOfMemoryError. Every layer must have been calibrated."""
        super().__init__(weights, config, device, max_tokens, max_rows)
        self._narrow = torch.zeros(max_tokens * config.hidden, dtype=_E4M3, device=device)
        self._row_scales = torch.zeros(max_tokens, dtype=torch.float32, device=device)

    def _make_few(self) -> None:
        return None

    def _make_attention(self, device: torch.device) -> Attention:
        contexts = {output.dtype for _, output, *_ in self._linears}
        return Attention(self.config, device, contexts, is_steady=True)

    def _make_folded(self, weights: Weights) -> FoldedLayers | None:
        device, is_calibrated = self._words.device, all(layer.state_amax is not None for layer in weights.layers)
        if self.config.hidden % 128 or not is_calibrated or not is_hopper(device):
            self._linears = [[move(each, device) for each in linears] for linears in self._linears]
            return None
        folded = FoldedLayers(weights, self.config, self._linears, self._attention, device, self.max_tokens)
        self._linears = [self._linears[0][:1]]  # of which the embeddings ask what it reads
        return folded

    def _states(self, x: Tensor) -> States:
        return States(x, self._narrow[: x.numel()].view(x.shape), self._row_scales[: len(x)])

    def _load_matrices(self, weights: Weights, device: torch.device) -> None:
        """On the CPU: folded layers keep few as they are, and what both took would be the start's peak."""
        cpu, float16 = torch.device("cpu"), self.config.float16
        self._linears = load_linears(weights.layers, float16, cpu)

    def _wide_bytes(self) -> int:
        attending = max((6 + output.dtype.itemsize) * self.config.hidden for _, output, _, _ in self._linears)
        return max(attending, *(down.dtype.itemsize * self.config.intermediate for *_, down in self._linears))

    def _embed(self, batch: Packed, x: Tensor) -> None:
        operand = self._operand(self._linears[0][0], x)
        embed_norm(batch.ids, batch.starts, self._words, self._positions, *self._norm, self.config.eps, x, *operand)

    def _operand(self, reader: Linear, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `reader` takes of the states x, and its scales: quantised ones a row, or x itself and none."""
        if reader.dtype == _HALF:
            return x, None
        return self._narrow[: x.numel()].view(x.shape), self._row_scales[: len(x)]

    def _run_layer(self, number: int, batch: Packed, x: Tensor, is_long: bool) -> None:
        config, layer, tokens = self.config, self._layers[number], len(x)
        query, output, up, down = self._linears[number]
        follower = self._linears[number + 1][0] if number + 1 < config.layers else None
        qkv = self._carve(0, tokens, 3 * config.hidden, _HALF)
        context = self._carve(tokens * 6 * config.hidden, tokens, config.hidden, output.dtype)
        inner = self._carve(0, tokens, config.intermediate, down.dtype)
        narrow, scales = self._operand(query, x)
        bias = layer.qkv_bias if query.bias is None else query.bias
        linear(narrow, query.weight, bias, qkv, False, scales, query.weight_scale, is_steady=True)
        self._attention.run(qkv, batch, context, output.x_factor, is_long)
        add_product(context, output.weight, x, output.x_scale, output.weight_scale, is_steady=True)
        narrow, scales = self._operand(up, x)
        add_norm(x, None, layer.out_bias, layer.out_norm_weight, layer.out_norm_bias, config.eps, x, narrow, scales)
        bias = layer.up_bias if up.bias is None else up.bias
        linear(narrow, up.weight, bias, inner, True, scales, up.weight_scale, down.x_factor, is_steady=True)
        add_product(inner, down.weight, x, down.x_scale, down.weight_scale, is_steady=True)
        narrow, scales = self._operand(follower, x) if follower else (x, None)
        add_norm(x, None, layer.down_bias, layer.down_norm_weight, layer.down_norm_bias, config.eps, x, narrow, scales)


def _load_stacks(layers: Sequence[Layer], names: Sequence[str], device: torch.device) -> list[Tensor]:
    """What all layers have of each of those names, in float16 on the device: [L, ...].

    One behind the other in one piece, as the workspace is and for the same reason.
    """
    stacks = [torch.stack([getattr(layer, name).half() for layer in layers]) for name in names]
    parts = torch.cat([stack.flatten() for stack in stacks]).to(device).split([stack.numel() for stack in stacks])
    return [part.view(stack.shape) for part, stack in zip(parts, stacks, strict=True)]


def _stack_norms(weights: Weights) -> Tensor:
    """Scale and shift of the embeddings' norm and of the two of each layer: [1 + 2L, 2, H]."""
    norms = [(weights.norm_weight, weights.norm_bias)]
    for layer in weights.layers:
        norms += (layer.out_norm_weight, layer.out_norm_bias), (layer.down_norm_weight, layer.down_norm_bias)
    return torch.stack([torch.stack(norm) for norm in norms])


def _view_vectors(number: int, biases: Sequence[Tensor], norms: Tensor) -> Layer:
    """A layer's vectors out of the stacks; its matrices are kept in the form their kernels take, elsewhere."""
    vectors = {name: bias[number] for name, bias in zip(_BIASES, biases, strict=True)}
    for name, norm in zip(("out_norm", "down_norm"), norms[1 + 2 * number : 3 + 2 * number], strict=True):
        vectors |= {f"{name}_weight": norm[0], f"{name}_bias": norm[1]}
    empty = torch.empty(0)
    return Layer(**vectors, **{name: empty for name in Layer.__slots__ if name not in vectors})
