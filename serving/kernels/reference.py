"""The plain-PyTorch twin of every kernel: fallback, test oracle and what the kernels are measured against.

Shapes and names are those of the kernels' own modules. Each function computes in the dtype of its inputs, so in
float32 it is the oracle and in float16 it is what plain PyTorch would answer.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

E4M3_MAX = 448.0


def embed_norm(
    ids: Tensor, starts: Tensor, words: Tensor, positions: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Sum of word and position embeddings, layer-normalised: [T, H] of ids and starts [T]."""
    place = torch.arange(len(ids), device=ids.device) - starts
    summed = words[ids.long()] + positions[place.long()]
    return functional.layer_norm(summed, weight.shape, weight, bias, eps)


def attention(qkv: Tensor, starts: Tensor, ends: Tensor, heads: int) -> Tensor:
    """Softmax attention inside each sequence: [T, H] of packed queries, keys and values [T, 3H]."""
    tokens, width = qkv.shape
    query, key, value = (part.reshape(tokens, heads, -1).transpose(0, 1) for part in qkv.split(width // 3, dim=1))
    out = torch.empty(heads, tokens, width // 3 // heads, dtype=qkv.dtype, device=qkv.device)
    for start in torch.unique(starts).tolist():
        rows = slice(start, int(ends[start]))
        out[:, rows] = functional.scaled_dot_product_attention(query[:, rows], key[:, rows], value[:, rows])
    return out.transpose(0, 1).reshape(tokens, width // 3)


def linear(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
    """x @ weight.T + bias, with GELU (erf) when `gelu`: [T, N] of x [T, K] and weight [N, K]."""
    out = functional.linear(x, weight, bias)
    return functional.gelu(out) if gelu else out


def add_norm(x: Tensor, residual: Tensor | None, bias: Tensor, weight: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Layer norm of x + residual + bias, scaled by `weight` and moved by `shift`: [T, H]."""
    summed = x + bias if residual is None else x + residual + bias
    return functional.layer_norm(summed, weight.shape, weight, shift, eps)


def pool(x: Tensor, offsets: Tensor, pooling: str, normalize: bool) -> Tensor:
    """One float32 vector a sequence: [B, H] of tokens [T, H] and offsets [B + 1]; `mean`, `cls` or `lasttoken`."""
    bounds = offsets.tolist()
    rows = [x[a:b].float() for a, b in pairwise(bounds)]
    pick = {"mean": lambda row: row.mean(0), "cls": lambda row: row[0], "lasttoken": lambda row: row[-1]}[pooling]
    vectors = torch.stack([pick(row) for row in rows])
    return functional.normalize(vectors, dim=-1) if normalize else vectors


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 values and float32 scales [T, 1] with x ≈ values x scales; each row's largest value becomes 448."""
    scales = (x.float().abs().amax(dim=1, keepdim=True) / E4M3_MAX).clamp(min=1e-12)
    return (x.float() / scales).to(torch.float8_e4m3fn), scales


def quantize_tensor(x: Tensor, scale: Tensor) -> Tensor:
    """E4M3 values of x / scale, values past the format's range cut to it."""
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
