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
from serving.kernels.few_tokens_cluster import FewTokensCluster, make_macros, pack_vectors, pack_weights
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


def unpack(fragments: torch.Tensor) -> torch.Tensor:
    """A matrix of one fragment, [16, 16], by the rule of the PTX manual: a lane's four registers of two halves."""
    matrix = torch.zeros(16, 16)
    for lane, halves in enumerate(fragments.view(32, 4, 2)):
        for register, (low, high) in enumerate(halves.tolist()):
            row, column = lane // 4 + 8 * (register % 2), 2 * (lane % 4) + 8 * (register // 2)
            matrix[row, column], matrix[row, column + 1] = low, high
    return matrix


def test_pack_weights_gives_every_warp_the_fragment_it_multiplies_by() -> None:
    layers, program, layer = 1, 5, 0
    shapes = {"qkv": (3 * HIDDEN, HIDDEN), "out": (HIDDEN, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    matrices = {name: torch.randn(layers, *shape).half() for name, shape in shapes.items()}
    biases = {name: torch.randn(layers, shape[0]).half() for name, shape in shapes.items()}
    norms = torch.randn(2 * layers + 1, 2, HIDDEN).half()
    pairs = [each for name in shapes for each in (matrices[name], biases[name])]
    stacked = Stacked(torch.empty(0), torch.empty(0), norms, *pairs)
    units = pack_weights(stacked)[layer, program].view(12, 48, 256)

    def assert_tile(unit: int, fragment: int, matrix: torch.Tensor, row: int, column: int) -> None:
        expected = matrix[layer, row : row + 16, column : column + 16].float()
        torch.testing.assert_close(unpack(units[unit, fragment]), expected, rtol=0, atol=0)

    # Values of the head (third pair of tiles), second half of the sum: warp 3 + 2, unit 1, its third step, second tile.
    assert_tile(1, 5 * 8 + 2 * 2 + 1, matrices["qkv"], 2 * HIDDEN + 32 * program + 16, 16 * (12 + 4 + 2))
    assert_tile(3, 3 * 12 + 4 * 2 + 1, matrices["out"], 32 * program + 16, 16 * (3 * 6 + 4))
    assert_tile(4 + 2, (4 + 3) * 6 + 1 * 2 + 0, matrices["up"], 128 * program + 16 * 6, 16 * (12 + 2 * 3 + 1))
    assert_tile(8 + 3, 9 * 4 + 1 * 2 + 1, matrices["down"], 32 * 9 + 16, 128 * program + 16 * (2 * 3 + 1))
    packed = pack_vectors(stacked)[layer, program]
    bias = biases["qkv"].view(3, HEADS, 32)[:, program].flatten()
    assert packed[:96].tolist() == bias.tolist()
    assert packed[96:128].tolist() == biases["out"][0, 32 * program :][:32].tolist()
    assert packed[128:256].tolist() == biases["up"][0, 128 * program :][:128].tolist()
    assert packed[256:288].tolist() == biases["down"][0, 32 * program :][:32].tolist()
    assert packed[288:].tolist() == norms[1:].flatten().tolist()


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
