"""What the encoders take of a GPU's memory, by count: on a device that has shapes and no memory.

torch counts every tensor in multiples of 512 bytes, and what is larger than 1 MiB with up to as much behind it.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from serving.engines import cuda_encoder
from serving.engines.bert import BertConfig, Layer, Weights
from serving.engines.cuda_encoder import Encoder, Fp8Encoder
from serving.kernels import attention_hopper, feed_forward, few_tokens_cluster, gemm_wide
from serving.kernels.compiled import TensorMap
from serving.kernels.few_tokens_cluster import FewTokensCluster

META = torch.device("meta")
HIDDEN, HEADS, INNER, LAYERS, VOCABULARY, POSITIONS = 384, 12, 1536, 6, 30_522, 512
TABLES = 2 * HIDDEN * (VOCABULARY + POSITIONS)  # bytes in float16
MATRICES = LAYERS * HIDDEN * (4 * HIDDEN + 2 * INNER)  # values
VECTORS = LAYERS * (9 * HIDDEN + INNER) + 2 * HIDDEN
BLOCK, LARGE = 512, 1 << 20


class Counted(TorchDispatchMode):
    """Bytes of the tensors without memory: those that live, and the most that did at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*arguments, **(named or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.device == META:
                storage = each.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), -(-storage.nbytes() // BLOCK) * BLOCK
        self.peak = max(self.peak, sum(self.sizes()))
        return result

    def sizes(self) -> list[int]:
        """Of each piece of memory that somebody holds."""
        self._storages = {key: held for key, held in self._storages.items() if not held[0].expired()}
        return [size for _, size in self._storages.values()]


@pytest.fixture(scope="module")
def model() -> tuple[BertConfig, Weights]:
    """MiniLM's sizes."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape)

    layers = tuple(
        Layer(
            draw(3 * HIDDEN, HIDDEN), draw(3 * HIDDEN), draw(HIDDEN, HIDDEN), draw(HIDDEN), draw(HIDDEN), draw(HIDDEN),
            draw(INNER, HIDDEN), draw(INNER), draw(HIDDEN, INNER), draw(HIDDEN), draw(HIDDEN), draw(HIDDEN),
            torch.ones(4), torch.ones(2),
        )
        for _ in range(LAYERS)
    )  # fmt: skip
    config = BertConfig(VOCABULARY, POSITIONS, HIDDEN, LAYERS, HEADS, INNER, 1e-12, "mean", True)
    words, positions = torch.zeros(VOCABULARY, HIDDEN), torch.zeros(POSITIONS, HIDDEN)
    return config, Weights(words, positions, draw(HIDDEN), draw(HIDDEN), layers)


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel that such a GPU takes, and none compiled."""
    for module in (cuda_encoder, gemm_wide, feed_forward, attention_hopper):
        monkeypatch.setattr(module, "is_hopper", lambda device: True)
    for module in (gemm_wide, feed_forward):
        monkeypatch.setattr(module, "prepare", lambda device, forms: None)
    monkeypatch.setattr(attention_hopper, "prepare", lambda device, size, forms: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(few_tokens_cluster, "CudaKernel", lambda *arguments: None)
    monkeypatch.setattr(TensorMap, "of", lambda *arguments: None)
    monkeypatch.setattr(FewTokensCluster, "fits", lambda *sizes: True)


@pytest.mark.parametrize("tokens", [32, 512])
def test_float16_for_few_tokens_holds_every_parameter_once(tokens: int, model: tuple[BertConfig, Weights]) -> None:
    """But the biases, of which each program of the kernel for few tokens has its own together: 41 KB of 45 MB."""
    with Counted() as counted:
        encoder = Encoder(model[1], model[0], META, tokens, tokens // 16)
    assert encoder._few is not None
    workspace = tokens * (2 * HIDDEN + 8 * HIDDEN)
    assert counted.peak - workspace - TABLES - 2 * MATRICES <= 2 * (2 * VECTORS)
    assert len([size for size in counted.sizes() if size > LARGE]) == (2 if workspace <= LARGE else 3)


def test_float16_for_one_short_text_takes_no_more_than_torch(model: tuple[BertConfig, Weights]) -> None:
    """Whose modules hold type embeddings and two tables of integers as well, and whose GELU has two intermediates."""
    torchs = TABLES + 2 * (MATRICES + VECTORS + 2 * HIDDEN) + 2 * 8 * POSITIONS + 32 * 2 * (2 * INNER + 2 * HIDDEN)
    with Counted() as counted:
        Encoder(model[1], model[0], META, 32, 2)
    assert counted.peak < torchs - 50_000  # integers and vectors of the engine's runs have room


def test_float16_for_many_tokens_takes_nothing_that_it_does_not_keep(model: tuple[BertConfig, Weights]) -> None:
    """Two of four matrices have a folded form besides: those that read a state."""
    with Counted() as counted:
        encoder = Encoder(model[1], model[0], META, 4096, 256)
    assert encoder._folded is not None
    assert counted.peak == sum(counted.sizes())
    folded = 2 * HIDDEN * (3 * HIDDEN * (LAYERS - 1) + INNER * LAYERS)
    assert counted.peak - 4096 * (2 * HIDDEN + 8 * HIDDEN) - TABLES - 2 * MATRICES - folded < 600_000


@pytest.mark.parametrize("tokens", [32, 512])
def test_e4m3_holds_every_matrix_once_and_takes_nothing_else_on_the_way(
    tokens: int, model: tuple[BertConfig, Weights]
) -> None:
    with Counted() as counted:
        encoder = Fp8Encoder(model[1], model[0], META, tokens, tokens // 16)
    assert encoder._folded is not None
    assert counted.peak == sum(counted.sizes())
    workspace = tokens * (2 * HIDDEN + 7 * HIDDEN + HIDDEN + 64)
    assert counted.peak - workspace - TABLES - MATRICES < 300_000  # vectors, and scales of 512 bytes each
