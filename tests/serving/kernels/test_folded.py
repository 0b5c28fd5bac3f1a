"""Layers folded into their neighbours are the layers: the algebra, on twins of Hopper's kernels in plain PyTorch."""

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from serving.engines import cuda_attention
from serving.engines.bert import AMAX_NAME, STATES_NAME, BertConfig, Packed, Weights, encode, list_linears
from serving.engines.cuda_attention import Attention
from serving.engines.cuda_folded import FoldedLayers, States
from serving.engines.cuda_linears import Linear, load_linears
from serving.engines.e4m3 import calibrate
from serving.kernels import attention_hopper, feed_forward, gemm_wide, reference
from serving.kernels.attention import LONG_LENGTH
from serving.kernels.compiled import CompileFailed
from serving.kernels.pool import pool
from tests.serving.kernels.models import make_encoder, read_model
from tests.serving.kernels.packs import in_order, make_packed, poisoned
from tests.serving.kernels.twins import add_wide, linear, narrow, use_attention, use_block, use_wide

NEEDS_NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU has the kernels themselves")
LINEARS = list_linears(2)
NORMS = "out_norm_weight", "out_norm_bias", "down_norm_weight", "down_norm_bias"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[BertConfig, Weights]:
    return read_model(make_encoder(tmp_path_factory.mktemp("encoder"), hidden=256, heads=4, intermediate=512, layers=3))


@pytest.fixture(scope="module")
def block_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[BertConfig, Weights]:
    """No norm, scale or sum of its is like another: feed-forward blocks read states far from mean 0, which only a
    matrix whose rows sum to 0 takes away."""
    folder = tmp_path_factory.mktemp("encoder")
    config, weights = read_model(make_encoder(folder, hidden=384, heads=6, intermediate=768, layers=2))
    layers = [
        replace(
            layer,
            out_bias=layer.out_bias + 1.0,
            up_weight=layer.up_weight * 0.5,
            down_weight=layer.down_weight * 3.0,
            **{name: getattr(layer, name) + 0.3 * torch.randn(config.hidden) for name in NORMS},
        )
        for layer in weights.layers
    ]
    batch = make_packed([60, 60], torch.device("cpu"))
    return config, calibrate_again(config, replace(weights, layers=tuple(layers)), batch)


def calibrate_again(config: BertConfig, weights: Weights, batch: Packed) -> Weights:
    """Changed weights with the largest values that the batch has in them."""
    found = calibrate(weights, config, [batch])
    largest = zip(weights.layers, found[AMAX_NAME], found[STATES_NAME], strict=True)
    return replace(weights, layers=tuple(replace(layer, amax=amax, state_amax=state) for layer, amax, state in largest))


def watch_directions(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Which of the kernels that run, and of the pooling, go upward."""
    directions: list[bool] = []

    def watch(own: Any, name: str) -> None:
        inner = getattr(own, name)

        def call(*arguments: Any, **named: Any) -> None:
            given = signature(inner).bind(*arguments, **named)
            given.apply_defaults()
            directions.append(given.arguments["is_upward"])
            inner(*arguments, **named)

        monkeypatch.setattr(own, name, call)

    watch(sys.modules["serving.kernels.gemm_hopper"], "linear")
    watch(gemm_wide, "linear")
    watch(gemm_wide, "add")
    watch(feed_forward, "run")
    watch(attention_hopper, "attention")
    watch(cuda_attention, "attention")
    watch(sys.modules[__name__], "pool")
    return directions


def load(weights: Weights, float16: Sequence[str] = ()) -> list[list[Linear]]:
    return load_linears(weights.layers, float16, torch.device("cpu"))


def run_folded(
    config: BertConfig, weights: Weights, batch: Packed, linears: list[list[Linear]], is_steady: bool = True,
    is_long: bool = True,
) -> Tensor:  # fmt: skip
    tokens = len(batch.ids)
    tables = weights.words, weights.positions, weights.norm_weight, weights.norm_bias
    embedded = reference.embed_norm(batch.ids, batch.starts, *tables, config.eps)
    narrow, scales = reference.quantize_rows(embedded)
    states = States(embedded.half(), narrow, scales[:, 0].contiguous())
    device, contexts = batch.ids.device, {output.dtype for _, output, *_ in linears}
    attention = Attention(config, device, contexts, is_steady)
    folded = FoldedLayers(weights, config, linears, attention, device, tokens)
    area = torch.zeros(tokens * 16 * config.hidden, dtype=torch.uint8)

    def carve(first: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return area[first : first + rows * columns * dtype.itemsize].view(dtype).view(rows, columns)

    norm, up = folded.run(batch, states, carve, is_long)
    out = poisoned(len(batch.offsets) - 1, config.hidden, device=states.x.device, dtype=torch.float32)
    done = torch.zeros(len(out), dtype=torch.int32, device=device)
    pool(states.x, batch.offsets, config.pooling, config.normalize, out, done, norm, up)
    return out


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GEMM and attention in plain PyTorch."""
    row_norm = lambda sums, factors, eps: SimpleNamespace(sums=sums, factors=factors, eps=eps)  # noqa: E731
    monkeypatch.setitem(sys.modules, "serving.kernels.gemm_hopper", SimpleNamespace(linear=linear, RowNorm=row_norm))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=4))
    use_attention(monkeypatch)


@NEEDS_NO_GPU
@pytest.mark.usefixtures("twin")
def test_folded_layers_survive_a_state_that_reaches_far(model: tuple[BertConfig, Weights]) -> None:
    """As MiniLM has one: a hundred times as far as the others, and part of the mean and spread of its row."""
    config, weights = model
    batch = make_packed([5, 1, 90, 33], torch.device("cpu"))
    shift = torch.zeros(config.hidden)
    shift[7] = 100.0
    first = replace(weights.layers[0], down_bias=weights.layers[0].down_bias + shift)
    weights = calibrate_again(config, replace(weights, layers=(first, *weights.layers[1:])), batch)
    states = weights.layers[0].state_amax
    assert states is not None
    assert states[1] > 99.0
    vectors = run_folded(config, weights, batch, load(weights))
    assert float(cosine_similarity(vectors, encode(weights, config, batch)).min()) > 0.98


@NEEDS_NO_GPU
@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize(("narrow", "least"), [("none", 0.9999), ("all", 0.98), ("every second", 0.98)])
def test_folded_layers_equal_the_oracle(narrow: str, least: float, model: tuple[BertConfig, Weights]) -> None:
    config, weights = model
    batch, names = make_packed([5, 1, 90, 33], torch.device("cpu")), list_linears(3)
    linears = load(weights, {"none": names, "all": [], "every second": names[::2]}[narrow])
    vectors = run_folded(config, weights, batch, linears)
    assert float(cosine_similarity(vectors, encode(weights, config, batch)).min()) > least


@NEEDS_NO_GPU
@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize(("wide", "least"), [("all", 1), ("down", 1), ("all", 1000)])
def test_layers_folded_into_the_wide_gemm_equal_the_oracle(
    wide: str, least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only some of a layer's products go there, so that sums over 192 columns and over 128 meet, and where
    rows are too few for those that add."""
    added = []
    config, weights = read_model(make_encoder(tmp_path, hidden=384, heads=6, intermediate=768, layers=3))

    def add(x: Tensor, *arguments: Any) -> None:
        added.append(x.shape[1])
        add_wide(x, *arguments)

    use_wide(monkeypatch, lambda weight: wide == "all" or weight.shape[1] == 768)
    monkeypatch.setattr(gemm_wide, "add", add)
    monkeypatch.setattr(gemm_wide, "least_rows", lambda columns, num_programs: least)
    batch = make_packed([5, 1, 90, 33], torch.device("cpu"))
    vectors = run_folded(config, weights, batch, load(weights, list_linears(3)), is_steady=False)
    assert float(cosine_similarity(vectors, encode(weights, config, batch)).min()) > 0.9999
    assert added == {("all", 1): [384, 768] * 3, ("down", 1): [768] * 3, ("all", 1000): []}[wide, least]


@NEEDS_NO_GPU
@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize("wide", ["all", "long", "short", "E4M3"])
@pytest.mark.parametrize("narrow", ["all", "every second", "two layers", "all but outputs"])
def test_e4m3_layers_folded_into_the_wide_gemm_equal_the_oracle(
    wide: str, narrow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever products go there, in one layer perhaps others than in the next: who reads what it writes in E4M3 has
    its matrix in the same order. All that runs was compiled."""
    config, weights = read_model(make_encoder(tmp_path, hidden=384, heads=6, intermediate=768, layers=3))
    chosen: dict[str, Callable[[Tensor], bool]] = {
        "all": lambda weight: True,
        "long": lambda weight: weight.shape[1] == 768,
        "short": lambda weight: weight.shape[1] == 384,
        "E4M3": lambda weight: weight.dtype == torch.float8_e4m3fn,
    }
    compiled, ran = use_wide(monkeypatch, chosen[wide])
    attended, attending = use_attention(monkeypatch)
    batch, names = make_packed([5, 1, 90, 33], torch.device("cpu")), list_linears(3)
    kept = {"all": [], "every second": names[::2], "two layers": names[4:8], "all but outputs": names[1::4]}
    vectors = run_folded(config, weights, batch, load(weights, kept[narrow]))
    assert float(cosine_similarity(vectors, encode(weights, config, batch)).min()) > 0.98
    assert compiled == ran
    assert attended == set(attending)
    assert len(attending) == config.layers


@NEEDS_NO_GPU
@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize("wide", ["MiniLM's", "all"])
@pytest.mark.parametrize(
    ("float16", "blocks"),
    [
        ([], [True, False]),
        (LINEARS[3::4], []),
        (LINEARS[2::4], []),
        (LINEARS[4:5], [False, False]),
        (LINEARS[1::4], [True, False]),
        (LINEARS[5:], [True]),
        (LINEARS[:4], [False]),
    ],
    ids=["none", "down", "up", "second query", "output, the default", "behind the second query", "first layer"],
)
def test_layers_with_the_block_in_one_kernel_equal_the_oracle(
    float16: list[str], blocks: list[bool], wide: str, block_model: tuple[BertConfig, Weights],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whichever linears are float16: a block is where up and down are E4M3, leaves a copy where the next layer reads
    one, and counts as one kernel where those before and behind it take turns to go up and down."""
    config, weights = block_model
    compiled, ran = use_block(monkeypatch)

    def is_long(weight: Tensor) -> bool:
        return weight.dtype == torch.float16 and weight.shape[1] == 768

    compiled_wide, ran_wide = use_wide(monkeypatch, is_long if wide == "MiniLM's" else lambda weight: True)
    directions = watch_directions(monkeypatch)
    batch = make_packed([5, 1, 40], torch.device("cpu"))
    vectors = run_folded(config, weights, batch, load(weights, float16))
    assert float(cosine_similarity(vectors, encode(weights, config, batch)).min()) > 0.98
    assert ran == blocks
    assert compiled == set(blocks)
    assert ran_wide <= compiled_wide  # no up and down fit both kernels but here
    assert directions == [number % 2 == 0 for number in range(5 * config.layers - len(blocks) + 1)]


@pytest.mark.parametrize(("kernel", "width"), [(gemm_wide, 64), (feed_forward, 16)])
def test_weights_are_reordered_as_who_writes_what_they_read(kernel: Any, width: int) -> None:
    """x in its order times a weight in its order is the product; for E4M3 as well."""
    x, weight = torch.randn(5, 128), torch.randn(3, 128)
    small = weight.to(torch.float8_e4m3fn)
    written = narrow(small.float(), torch.ones(1), width)
    assert torch.equal(kernel.reorder(small).float(), written.float())
    assert torch.equal(in_order(written, width), small.float())
    torch.testing.assert_close(kernel.reorder(x) @ kernel.reorder(weight).T, x @ weight.T)


@NEEDS_NO_GPU
@pytest.mark.usefixtures("twin")
def test_layers_without_a_compiler_for_the_wide_gemm_do_without_it(
    model: tuple[BertConfig, Weights], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(device: torch.device, forms: Collection[gemm_wide.Form]) -> None:
        raise CompileFailed("no such library: nvrtc")

    monkeypatch.setattr(gemm_wide, "fits", lambda weight, device: True)
    monkeypatch.setattr(gemm_wide, "prepare", fail)
    config, weights = model
    batch = make_packed([5, 1, 90, 33], torch.device("cpu"))
    vectors = run_folded(config, weights, batch, load(weights, list_linears(3)), is_steady=False)
    assert float(cosine_similarity(vectors, encode(weights, config, batch)).min()) > 0.9999
    assert "no such library: nvrtc" in caplog.text


@NEEDS_NO_GPU
@pytest.mark.usefixtures("twin")
def test_layers_without_a_compiler_for_the_block_take_two_gemms(
    block_model: tuple[BertConfig, Weights], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(device: torch.device, forms: Collection[bool]) -> None:
        raise CompileFailed("no such library: nvrtc")

    _, ran = use_block(monkeypatch)
    monkeypatch.setattr(feed_forward, "prepare", fail)
    config, weights = block_model
    batch = make_packed([5, 1, 40], torch.device("cpu"))
    vectors = run_folded(config, weights, batch, load(weights))
    assert float(cosine_similarity(vectors, encode(weights, config, batch)).min()) > 0.98
    assert not ran
    assert [record.message for record in caplog.records] == [
        "many tokens run on two GEMMs for each feed-forward block reason=no such library: nvrtc"
    ]


@NEEDS_NO_GPU
@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize(("float16", "least"), [(list_linears(3), 0.9999), ([], 0.98)], ids=["float16", "E4M3"])
def test_layers_without_a_compiler_for_attention_take_tritons(
    float16: list[str], least: float, model: tuple[BertConfig, Weights], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Which goes up and down in turns as well."""

    def fail(device: torch.device, size: int, forms: Collection[bool]) -> None:
        raise CompileFailed("no such library: nvrtc")

    _, ran = use_attention(monkeypatch)
    monkeypatch.setattr(attention_hopper, "prepare", fail)
    directions = watch_directions(monkeypatch)
    config, weights = model
    batch = make_packed([5, 1, 90, 33], torch.device("cpu"))
    vectors = run_folded(config, weights, batch, load(weights, float16), is_steady=not float16)
    assert float(cosine_similarity(vectors, encode(weights, config, batch)).min()) > least
    assert not ran
    assert directions == [number % 2 == 0 for number in range(5 * config.layers + 1)]
    assert [record.message for record in caplog.records] == [
        "many tokens run on attention by packed rows reason=no such library: nvrtc"
    ]


@NEEDS_NO_GPU
@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize(
    ("is_long", "is_steady", "by_tiles"), [(True, False, True), (False, False, False), (False, True, True)]
)
def test_float16_takes_tritons_attention_where_texts_are_short(
    is_long: bool, is_steady: bool, by_tiles: bool, model: tuple[BertConfig, Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a steady result never, whose bits depend on its own text alone."""
    _, ran = use_attention(monkeypatch)
    config, weights = model
    batch, linears = make_packed([58, 1, 20], torch.device("cpu")), load(weights, [] if is_steady else list_linears(3))
    vectors = run_folded(config, weights, batch, linears, is_steady, is_long)
    least = 0.98 if is_steady else 0.9999
    assert float(cosine_similarity(vectors, encode(weights, config, batch)).min()) > least
    assert ran == [is_steady] * (config.layers if by_tiles else 0)


@NEEDS_NO_GPU
@pytest.mark.usefixtures("twin")
def test_texts_count_as_long_by_the_attention_that_is_to_be_had(
    model: tuple[BertConfig, Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = model[0], torch.device("cpu"), {torch.float16}
    assert Attention(*own, is_steady=False).long_length == attention_hopper.LONG_LENGTH
    assert Attention(*own, is_steady=True).long_length is None
    monkeypatch.setattr(attention_hopper, "is_hopper", lambda device: False)
    assert Attention(*own, is_steady=False).long_length == LONG_LENGTH
