"""The baseline of bench_cuda: a BERT encoder in plain torch float16 with SDPA, in its three fastest forms."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import BertConfig, BertModel

MODES = ("eager", "graph", "compile_graph")
Batch = tuple[Tensor, Tensor]


class TorchEncoder:
    """Mean-pooled, normalised sentence vectors of padded batches (ids and mask, int64 [B, T])."""

    def __init__(self, sizes: dict[str, int]) -> None:
        """Random weights: the speed does not depend on them."""
        config = BertConfig(**sizes)
        config._attn_implementation = "sdpa"
        self._model = BertModel(config, add_pooling_layer=False).half().cuda().eval()
        torch._dynamo.config.cache_size_limit = 64  # a compilation for every shape
        self._compiled = torch.compile(self._embed, dynamic=False)

    def modes(self, batches: Sequence[Batch]) -> dict[str, Callable[[], object]]:
        """Each form as a function that runs all batches once; compiled and captured already."""
        for ids, mask in batches:
            self._compiled(ids, mask)
        graphs = [_capture(lambda b=b: self._embed(*b)) for b in batches]
        compiled = [_capture(lambda b=b: self._compiled(*b)) for b in batches]
        return {
            "eager": lambda: [self._embed(*batch) for batch in batches],
            "graph": lambda: [replay() for replay in graphs],
            "compile_graph": lambda: [replay() for replay in compiled],
        }

    def _embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        return normalize((states * weights).sum(1) / weights.sum(1).clamp(min=1), dim=-1)


def compile_ahead(jobs: Sequence[tuple[dict[str, int], list[int]]], vocabulary: int, processes: int) -> None:
    """Compile for padded batches of these lengths in processes beside each other: a later compilation finds the code in
    torch's cache. A job is a model's sizes and a batch's lengths."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile, *zip(*jobs, strict=True), [vocabulary] * len(jobs)))


def _compile(sizes: dict[str, int], lengths: list[int], vocabulary: int) -> None:
    with torch.inference_mode():
        TorchEncoder(sizes)._compiled(*pad(lengths, vocabulary))
        torch.cuda.synchronize()


def pad(lengths: Sequence[int], vocabulary: int) -> Batch:
    """One padded batch of random ids."""
    sizes = torch.tensor(lengths, device="cuda")
    mask = (torch.arange(int(sizes.max()), device="cuda") < sizes[:, None]).long()
    return torch.randint(0, vocabulary, mask.shape, device="cuda") * mask, mask


def pad_sorted(lengths: Sequence[int], vocabulary: int, size: int = 128) -> list[Batch]:
    """Batches of `size` texts of like length, the longest first, as sentence-transformers makes them."""
    return [pad(part, vocabulary) for part in sort_and_cut(lengths, size)]


def sort_and_cut(lengths: Sequence[int], size: int = 128) -> list[list[int]]:
    """The lengths of each of those batches."""
    order = sorted(lengths, reverse=True)
    return [order[start : start + size] for start in range(0, len(order), size)]


def _capture(run: Callable[[], Any]) -> Callable[[], None]:
    """CUDA-graph replay of `run`, after three calls on a side stream."""
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
