"""Which attention a model's runs take on a GPU, and what it needs."""

import logging
from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor

from serving.engines.bert import BertConfig, Packed
from serving.kernels import attention_hopper
from serving.kernels.attention import LONG_LENGTH, attention
from serving.kernels.compiled import CompileFailed
from serving.kernels.gemm import count_hopper_processors

_log = logging.getLogger(__name__)


class Attention:
    """Attention on one device; one run at a time."""

    def __init__(
        self, config: BertConfig, device: torch.device, contexts: Collection[torch.dtype], is_steady: bool
    ) -> None:
        """`contexts`: what results may be, float16 or E4M3; `is_steady`: see `attention`."""
        self._heads, self.is_steady = config.heads, is_steady
        size, forms = config.hidden // config.heads, {each != torch.float16 for each in contexts}
        prepare = partial(attention_hopper.prepare, device, size, forms)
        has_tiles = attention_hopper.fits(config.hidden, config.heads, device) and is_prepared(
            prepare, "attention by packed rows"
        )
        # By which the programs of `attention_hopper` share its work.
        self._ticket = torch.zeros(1, dtype=torch.int32, device=device) if has_tiles else None
        self._programs = count_hopper_processors(device)

    @property
    def long_length(self) -> int | None:
        """Tokens that one attends to, on average, from which a run `is_long`; none where that changes nothing."""
        if self.is_steady:
            return None
        return LONG_LENGTH if self._ticket is None else attention_hopper.LONG_LENGTH

    def run(
        self, qkv: Tensor, batch: Packed, context: Tensor, factor: Tensor | None, is_long: bool, is_upward: bool = True
    ) -> None:
        """See `reference.attention`: `context` takes the result, E4M3 the result times `factor` (float32 [1])."""
        if self._ticket is not None and (self.is_steady or is_long):
            own = self._ticket, self._programs
            attention_hopper.attention(qkv, batch.tiles, self._heads, context, *own, factor, is_upward)
        else:
            bounds = batch.starts, batch.ends
            attention(qkv, *bounds, self._heads, context, factor, is_long, self.is_steady, is_upward)


def is_prepared(prepare: Callable[[], None], instead: str) -> bool:
    """Whether kernels compile; else a warning says what runs instead."""
    try:
        prepare()
    except CompileFailed as error:
        _log.warning("many tokens run on %s reason=%s", instead, error)
        return False
    return True
