"""The cluster's kernel: packed weights are what each program multiplies by; on a GPU with clusters it is the oracle."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from serving.engines.bert import BertConfig, Packed, Weights, encode
from serving.engines.cuda_encoder import Encoder
from serving.kernels.compiled import _FOLDER
from serving.kernels.few_tokens import Stacked
from serving.kernels.few_tokens_cluster import FewTokensCluster, make_macros, pack_biases
from tests.serving.kernels.models import make_encoder, read_model
from tests.serving.kernels.packs import make_packed, relative_error

HIDDEN, HEADS, INNER = 384, 12, 1536
NEEDS_CLUSTERS = pytest.mark.skipif(
    not FewTokensCluster.fits(HIDDEN, HEADS, INNER, torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    reason="needs a GPU with clusters",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[BertConfig, Weights]:
    return read_model(make_encoder(tmp_path_factory.mktemp("encoder"), HIDDEN, HEADS, INNER, layers=3))


def test_pack_biases_gives_every_program_its_own() -> None:
    program, layer = 5, 1
    sizes = {"qkv": 3 * HIDDEN, "out": HIDDEN, "up": INNER, "down": HIDDEN}
    biases = {name: torch.randn(2, size).half() for name, size in sizes.items()}
    pairs = [each for name in sizes for each in (torch.empty(2, 0), biases[name])]
    packed = pack_biases(Stacked(torch.empty(0), torch.empty(0), torch.empty(0), *pairs))[layer, program]
    expected = [biases["qkv"][layer].view(3, HEADS, 32)[:, program].flatten()]
    expected += [biases[name][layer].view(HEADS, -1)[program] for name in ("out", "up", "down")]
    assert packed.tolist() == torch.cat(expected).tolist()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs CUDA's compiler")
@pytest.mark.parametrize(("rows", "pooling"), [(16, "cls"), (32, "mean")])
def test_few_tokens_cluster_compiles_without_spilling(rows: int, pooling: str, tmp_path: Path) -> None:
    macros = [f"-D{name}={value}" for name, value in make_macros(rows, pooling, True).items()]
    target = ["-gencode=arch=compute_90,code=sm_90", "-std=c++17", "-Xptxas", "-v", "-cubin", "-o", tmp_path / "out"]
    command = ["nvcc", *target, *macros, _FOLDER / "few_tokens_cluster.cu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores" in done.stderr


def test_few_tokens_cluster_fits_only_its_sizes_and_a_gpu() -> None:
    assert not FewTokensCluster.fits(HIDDEN, HEADS, INNER, torch.device("cpu"))
    assert not FewTokensCluster.fits(768, HEADS, 3072, torch.device("cpu"))


@pytest.mark.gpu
@NEEDS_CLUSTERS
@pytest.mark.parametrize(
    ("lengths", "pooling"),
    [([1], "mean"), ([16], "mean"), ([3, 12], "cls"), ([3, 14], "cls"), ([32], "lasttoken"), ([1] * 32, "mean")],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_few_tokens_cluster_equals_the_oracle(
    lengths: list[int], pooling: str, normalize: bool, model: tuple[BertConfig, Weights]
) -> None:
    config, weights = replace(model[0], pooling=pooling, normalize=normalize), model[1]
    encoder = Encoder(weights, config, torch.device("cuda"), max_tokens=32, max_rows=32)
    assert isinstance(encoder._few, FewTokensCluster)
    encoder._out.fill_(float("nan"))
    batch = make_packed(lengths, torch.device("cuda"))
    vectors = encoder.run(batch).cpu()
    oracle = encode(weights, config, Packed(*(getattr(batch, name).cpu() for name in Packed.__slots__)))
    assert relative_error(vectors, oracle) < 5e-3


@pytest.mark.gpu
@NEEDS_CLUSTERS
def test_few_tokens_cluster_answers_the_same_every_time(model: tuple[BertConfig, Weights]) -> None:
    config, weights = model
    encoder = Encoder(weights, config, torch.device("cuda"), max_tokens=32, max_rows=8)
    batch = make_packed([13, 2, 17], torch.device("cuda"))
    first = encoder.run(batch).clone()
    for _ in range(300):
        torch.testing.assert_close(encoder.run(batch), first, rtol=0, atol=0)
