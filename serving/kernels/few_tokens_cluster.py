"""A whole encoder of MiniLM's sizes for few tokens as one cluster of programs: see few_tokens_cluster.cu.

Hopper and later have clusters: programs that read and write each other's shared memory. `few_tokens` is the twin for
every other GPU and size.
"""

import ctypes

import torch
from torch import Tensor

from serving.kernels.compiled import CudaKernel, TensorMap
from serving.kernels.few_tokens import MAX_TOKENS, Stacked

_HIDDEN, _HEADS, _INNER = 384, 12, 1536
_HEAD, _SHARE = _HIDDEN // _HEADS, _INNER // _HEADS  # columns of a program's head, and of its intermediate
_BOX_ROWS, _BOX_COLUMNS = 32, 64  # that the copy engine cuts out of a matrix at a time
_THREADS = 17 * 32
_SHARED_BYTES = 227 * 1024  # of a program: all that there is
_HAS_CLUSTERS = (9, 0)
_POOLINGS = ("mean", "cls", "lasttoken")


class _Input(ctypes.Structure):
    """`Input` of the kernel."""

    _fields_ = [
        *((name, TensorMap) for name in ("query", "output", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("ids", "starts", "ends", "offsets", "words", "positions", "norms")),
        *((name, ctypes.c_void_p) for name in ("biases", "out")),
        *((name, ctypes.c_int) for name in ("num_tokens", "num_rows", "num_layers")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
        ("rest", ctypes.c_char * 36),  # tensor maps make the kernel's struct a multiple of 64 bytes
    ]  # fmt: skip


class FewTokensCluster:
    """The kernel on the weights of the others. Runs may overlap: nothing is written but `out`."""

    def __init__(self, weights: Stacked, eps: float, pooling: str, normalize: bool) -> None:
        """See `fits` for what it can take. Raises CompileFailed where the GPU or its compiler refuses."""
        self._tables = weights.words, weights.positions, weights.norms, pack_biases(weights)
        self._matrices = weights.qkv_weight, weights.out_weight, weights.up_weight, weights.down_weight
        self._layers, self._eps = len(weights.up_weight), eps
        device = weights.words.device
        self._kernels = {
            rows: CudaKernel(
                "few_tokens_cluster", make_macros(rows, pooling, normalize), device, _THREADS, _SHARED_BYTES, _HEADS
            )
            for rows in (16, MAX_TOKENS)
        }
        self._maps = [TensorMap.of(each.flatten(0, 1), _BOX_ROWS, _BOX_COLUMNS) for each in self._matrices]

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
        tensors = (ids, starts, ends, offsets, *self._tables, out)
        argument = _Input(
            *self._maps, *(each.data_ptr() for each in tensors),
            len(ids), len(out), self._layers, self._eps, 1.4426950408889634 / _HEAD**0.5,
        )  # fmt: skip
        self._kernels[16 if len(ids) <= 16 else MAX_TOKENS].launch(argument, _HEADS)


def make_macros(rows: int, pooling: str, normalize: bool) -> dict[str, int]:
    """What the kernel is compiled with for up to `rows` tokens."""
    numbers = {"POOLING": _POOLINGS.index(pooling), "NORMALIZE": int(normalize)}
    return {"ROWS": rows, "HEADS": _HEADS, "SHARED": _SHARED_BYTES, **numbers}


def pack_biases(weights: Stacked) -> Tensor:
    """The biases as each program reads them: float16 [layers, programs, 288]."""
    layers = len(weights.up_weight)

    def of_each(bias: Tensor, width: int) -> Tensor:
        return bias.reshape(layers, _HEADS, width)

    qkv = weights.qkv_bias.reshape(layers, 3, _HEADS, _HEAD).transpose(1, 2).reshape(layers, _HEADS, 3 * _HEAD)
    output, down = of_each(weights.out_bias, _HEAD), of_each(weights.down_bias, _HEAD)
    return torch.cat((qkv, output, of_each(weights.up_bias, _SHARE), down), dim=2)
