"""Engines of our own on two GPUs of one machine."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from serving.engines.cuda import CudaEngine
from serving.engines.replicas import ReplicatedEngine, open_on_devices
from serving.tokenizer import pad_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("compute", ["f16", "f8"])
@pytest.mark.parametrize("sizes", [(384, 12, 1536), (768, 12, 3072)], ids=["MiniLM's", "BERT-base's"])
def test_two_gpus_answer_at_the_same_time_with_the_same_bits(
    compute: str, sizes: tuple[int, int, int], tmp_path: Path
) -> None:
    """Few and many tokens, kernels of Triton, Gluon and CUDA C++: each has what it needs on either GPU."""
    from tests.serving.kernels.models import make_encoder
    from tests.serving.kernels.packs import TOKENS

    path, rng = make_encoder(tmp_path, *sizes), np.random.default_rng(0)
    engine = open_on_devices(lambda: CudaEngine(path, compute, max_tokens=8192), [0, 1])
    assert isinstance(engine, ReplicatedEngine)
    batches = [
        pad_batch([rng.integers(0, TOKENS, length) for length in lengths])
        for lengths in ([12], [128, 3], [40] * 20, [128] * 50, [100, 7] * 60)
    ]
    first, second = ([own.embed(*batch) for batch in batches] for own in engine._engines)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda batch: engine.embed(*batch), batches * 4))
    for number, answer in enumerate(answers):
        np.testing.assert_array_equal(answer, first[number % len(batches)])
        np.testing.assert_array_equal(answer, second[number % len(batches)])
    assert engine.runtime.endswith("on 2 of 2 GPUs")
    engine.close()
