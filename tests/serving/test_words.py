"""Ids found word by word against those of the tokenizer itself."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, BertWordPieceTokenizer, Tokenizer, normalizers, pre_tokenizers

from serving import words
from serving.errors import InputTooLong
from serving.tokenizer import TextTokenizer
from serving.words import WordIds
from tests.bundles import make_tokenizer
from tests.texts import make_sentences

_MAX_LENGTH = 24
_MARKS = ["[CLS]", "[SEP]", "[MASK]", "[pad]", "[", "\x00", "\x0b", "\x1f", "\x7f", "é", "中", "\u00a0", "\u200b", "Ⅷ"]
_SPACES = [" ", "  ", "\n", "\t", "\r\n"]
_part = st.one_of(
    st.sampled_from(" ".join(make_sentences(40)).split()),
    st.text(st.characters(max_codepoint=127), max_size=8),
    st.text(max_size=4),
    st.sampled_from([*_MARKS, *_SPACES, "x" * 100, "x" * 101, "don't", "C3-PO", "a_b", "UPPER"]),
)
_text = st.builds("".join, st.lists(st.one_of(_part, st.sampled_from(_SPACES)), max_size=60))


def make_bert(lowercase: bool = True) -> Tokenizer:
    trained = BertWordPieceTokenizer(lowercase=lowercase)
    trained.train_from_iterator(make_sentences(400), vocab_size=400, min_frequency=1, show_progress=False)
    return Tokenizer.from_str(trained._tokenizer.to_str())


def by_library(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    tokenizer.enable_truncation(_MAX_LENGTH)
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


@pytest.mark.parametrize("lowercase", [True, False])
def test_words_are_known_where_the_tokenizer_is_berts(lowercase: bool) -> None:
    tokenizer = make_bert(lowercase)
    known = WordIds.of(tokenizer)
    assert known is not None
    texts = make_sentences(200)
    found = [known.encode(text, _MAX_LENGTH, True, False) for text in texts]
    assert found == by_library(tokenizer, texts)
    assert 20 < len(known) < 400


_bert, _cased = make_bert(), make_bert(lowercase=False)


@settings(max_examples=400, deadline=None)
@given(st.lists(_text, min_size=1, max_size=4), st.booleans())
def test_any_text_has_the_ids_the_library_gives_it(texts: list[str], lowercase: bool) -> None:
    bert = _bert if lowercase else _cased
    found = TextTokenizer(bert, _MAX_LENGTH).encode(texts)
    assert [row.tolist() for row in found] == by_library(bert, texts)


@settings(max_examples=200, deadline=None)
@given(_text)
def test_the_end_of_a_text_is_kept_as_without_words(text: str) -> None:
    with_words, without = TextTokenizer(_bert, _MAX_LENGTH), TextTokenizer(_bert, _MAX_LENGTH)
    without._words = None
    assert with_words.encode([text], keep_end=True)[0].tolist() == without.encode([text], keep_end=True)[0].tolist()
    results: list[object] = []
    for tokenizer in (with_words, without):
        try:
            results.append(tokenizer.encode([text], truncate=False)[0].tolist())
        except InputTooLong as error:
            results.append(str(error))
    assert results[0] == results[1]


def test_text_that_is_not_plain_is_left_to_the_tokenizer() -> None:
    known = WordIds.of(_bert)
    assert known is not None
    for text in ("café", "a [MASK] here", "a\x00b", "page " * 5_000):
        assert known.encode(text, _MAX_LENGTH, True, False) is None, text
    for text in ("a [link] here", "line\nline\ttab", ""):
        assert known.encode(text, _MAX_LENGTH, True, False) is not None, text


def test_a_tokenizer_of_another_kind_is_asked_for_every_text() -> None:
    assert WordIds.of(make_tokenizer()) is None
    spaced, stripped, marked = make_bert(), make_bert(), make_bert()
    spaced.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    stripped.normalizer = normalizers.BertNormalizer(clean_text=False)
    marked.add_tokens([AddedToken("hello", normalized=True)])
    assert [WordIds.of(each) for each in (spaced, stripped, marked)] == [None] * 3


def test_words_remembered_are_few_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_MAX_WORDS", 8)
    tokenizer = make_bert()
    known = WordIds.of(tokenizer)
    assert known is not None
    for text in ["y" * 5_000, "z" * 101, "ea" * 40, *make_sentences(50)]:
        assert known.encode(text, _MAX_LENGTH, True, False) == by_library(tokenizer, [text])[0]
        assert len(known) <= 8
        assert all(len(word) <= 100 for word in known)
        assert all(len(ids) <= 8 for ids in known.values())
