"""A whole encoder of MiniLM's sizes for few tokens as one cluster of programs: see few_tokens_cluster.cu.

Hopper and later have clusters: programs that read and write each other's shared memory. `few_tokens` is the twin for
every other GPU and size.
"""

import ctypes

import torch
from torch import Tensor

from serving.kernels.compiled import CudaKernel
from serving.kernels.few_tokens import MAX_TOKENS, Stacked

_HIDDEN, _HEADS, _INNER = 384, 12, 1536
_HEAD, _SHARE = _HIDDEN // _HEADS, _INNER // _HEADS  # columns of a program's head, and of its intermediate
_UNIT = 48 * 256  # halves of a fill of the ring: 48 fragments of 16 x 16
_THREADS = 17 * 32
_SHARED_BYTES = 227 * 1024  # of a program: all that there is
_HAS_CLUSTERS = (9, 0)
_POOLINGS = ("mean", "cls", "lasttoken")


class _Input(ctypes.Structure):
    """`Input` of the kernel."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("ids", "starts", "ends", "offsets", "words", "positions", "norm")),
        *((name, ctypes.c_void_p) for name in ("weights", "vectors", "out")),
        *((name, ctypes.c_int) for name in ("num_tokens", "num_rows", "num_layers")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
    ]  # fmt: skip


class FewTokensCluster:
    """The kernel with its packed weights. Runs may overlap: nothing is written but `out`."""

    def __init__(self, weights: Stacked, eps: float, pooling: str, normalize: bool) -> None:
        """See `fits` for what it can take. Raises CompileFailed where the GPU or its compiler refuses."""
        self._tables = weights.words, weights.positions, weights.norms[0].contiguous()
        self._weights, self._vectors = pack_weights(weights), pack_vectors(weights)
        self._layers, self._eps = len(weights.up_weight), eps
        device = weights.words.device
        self._kernels = {
            rows: CudaKernel(
                "few_tokens_cluster", make_macros(rows, pooling, normalize), device, _THREADS, _SHARED_BYTES, _HEADS
            )
            for rows in (16, MAX_TOKENS)
        }

    @staticmethod
    def fits(hidden: int, heads: int, intermediate: int, device: torch.device) -> bool:
        """Whether the model has the kernel's sizes, and the GPU clusters and their shared memory."""
        if (hidden, heads, intermediate) != (_HIDDEN, _HEADS, _INNER) or device.type != "cuda":
            return False
        properties = torch.cuda.get_device_properties(device)
        has_clusters = (properties.major, properties.minor) >= _HAS_CLUSTERS
        return has_clusters and properties.shared_memory_per_block_optin >= _SHARED_BYTES

    def run(self, ids: Tensor, starts: Tensor, ends: Tensor, offsets: Tensor, out: Tensor) -> None:
        """Vectors, float32 [B, H], of a packed batch of up to MAX_TOKENS tokens into `out`."""
        tensors = (ids, starts, ends, offsets, *self._tables, self._weights, self._vectors, out)
        argument = _Input(
            *(each.data_ptr() for each in tensors),
            len(ids), len(out), self._layers, self._eps, 1.4426950408889634 / _HEAD**0.5,
        )  # fmt: skip
        self._kernels[16 if len(ids) <= 16 else MAX_TOKENS].launch(argument, _HEADS)


def make_macros(rows: int, pooling: str, normalize: bool) -> dict[str, int]:
    """What the kernel is compiled with for up to `rows` tokens."""
    numbers = {"POOLING": _POOLINGS.index(pooling), "NORMALIZE": int(normalize)}
    return {"ROWS": rows, "HEADS": _HEADS, "SHARED": _SHARED_BYTES, **numbers}


def pack_weights(weights: Stacked) -> Tensor:
    """The matrices as fragments in the order in which each program uses them: float16 [layers, programs, 12, _UNIT]."""
    packed = torch.empty(len(weights.up_weight), _HEADS, 12, _UNIT, dtype=torch.float16, device=weights.words.device)
    for layer, programs in enumerate(packed):  # in place: all at once would hold the weights a third time
        for program, units in enumerate(programs):
            units.copy_(_pack_layer(weights, layer, program))
    return packed


def _pack_layer(weights: Stacked, layer: int, program: int) -> Tensor:
    head, share = slice(program * _HEAD, (program + 1) * _HEAD), slice(program * _SHARE, (program + 1) * _SHARE)
    qkv = weights.qkv_weight[layer].view(3, _HIDDEN, _HIDDEN)[:, head].reshape(3 * _HEAD, _HIDDEN)
    # [tiles down, steps across, 256], told apart as the kernel's methods do, in the order of unit, warp, step and tile.
    query = _fragments(qkv).view(3, 2, 2, 3, 4, -1).permute(3, 2, 0, 4, 1, 5)  # pair, tile, half, unit, step
    output = _fragments(weights.out_weight[layer][head]).view(2, 4, 6, -1).permute(1, 2, 0, 3)  # tile, quarter, step
    up = _fragments(weights.up_weight[layer][share]).view(4, 2, 2, 4, 3, -1).permute(3, 2, 0, 4, 1, 5)
    down = (
        _fragments(weights.down_weight[layer][:, share]).view(12, 2, 4, 2, -1).permute(2, 0, 3, 1, 4)
    )  # to, tile, unit
    return torch.cat([each.reshape(-1, _UNIT) for each in (query, output, up, down)])


def _fragments(matrix: Tensor) -> Tensor:
    """[N, K] as [N / 16, K / 16, 256]: the order in which the lanes of a warp hold the first operand of m16n8k16."""
    rows, columns = matrix.shape
    # row = 16 tile + 8 below + lane / 4; column = 16 step + 8 right + 2 (lane % 4) + odd
    split = matrix.reshape(rows // 16, 2, 8, columns // 16, 2, 4, 2)
    return split.permute(0, 3, 2, 5, 4, 1, 6).reshape(rows // 16, columns // 16, 256)


def pack_vectors(weights: Stacked) -> Tensor:
    """Biases and norms as each program reads them: float16 [layers, programs, 1824]."""
    layers = len(weights.up_weight)

    def of_each(vector: Tensor, width: int) -> Tensor:
        return vector.reshape(layers, _HEADS, width)

    qkv = weights.qkv_bias.reshape(layers, 3, _HEADS, _HEAD).transpose(1, 2).reshape(layers, _HEADS, 3 * _HEAD)
    norms = weights.norms[1:].reshape(layers, 1, 4 * _HIDDEN).expand(layers, _HEADS, 4 * _HIDDEN)
    output, down = of_each(weights.out_bias, _HEAD), of_each(weights.down_bias, _HEAD)
    return torch.cat((qkv, output, of_each(weights.up_bias, _SHARE), down, norms), dim=2).contiguous()
