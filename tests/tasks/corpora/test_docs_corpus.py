import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Event

import pytest

from tasks.corpora import docs_corpus
from tasks.corpora.docs_corpus import cut_passage, harvest_documents, split_pair, split_sentences

HARVEST = """
import hashlib
from tasks.corpora.docs_corpus import harvest_documents
print(hashlib.sha256(repr(harvest_documents()).encode("utf-8", "surrogatepass")).hexdigest())
"""


@pytest.fixture(scope="module")
def documents() -> list[tuple[str, str]]:
    return harvest_documents()


def test_docs_harvest_is_the_same_in_a_process_that_hashes_differently(documents: list[tuple[str, str]]) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", HARVEST],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=root,
        timeout=120,
    )
    assert done.stdout.strip() == hashlib.sha256(repr(documents).encode("utf-8", "surrogatepass")).hexdigest()


def test_docs_harvest_is_sorted_and_of_known_size(documents: list[tuple[str, str]]) -> None:
    assert documents == sorted(documents)
    texts = [text for _, text in documents]
    assert len(texts) == len(set(texts))
    sentences = {sentence for text in texts for sentence in split_sentences(text)}
    pairs = {pair for text in texts if (pair := split_pair(text))}
    assert 13_000 <= len(sentences) <= 18_000
    assert 2_200 <= len(pairs) <= 3_100


def test_docs_sentences_are_prose_of_bounded_length() -> None:
    document = (
        "Return a shallow copy of the list, which the caller may change.  It is fast.\n"
        "This sentence goes on\nover a line break and is kept whole because it is long enough.\n\n"
        ">>> this is a doctest and its words are many but it is no prose at all\n\n"
        "+------+ | a table with | enough words to count as | a sentence is not one |"
    )
    assert split_sentences(document) == [
        "Return a shallow copy of the list, which the caller may change.",
        "This sentence goes on over a line break and is kept whole because it is long enough.",
    ]
    assert split_sentences(f"{'word ' * 61}.") == []


def test_docs_pair_is_summary_and_body() -> None:
    body = "The body explains at some length what the summary only names, in twelve words or more."
    assert split_pair(f"Return the mean value.\n\n{body}") == ("Return the mean value.", body)
    assert split_pair(f"Mean.\n\n{body}") is None
    assert split_pair("Return the mean value.\n\nToo short a body.") is None
    assert split_pair(f">>> mean([1, 2, 3]) is two\n\n{body}") is None
    assert split_pair("Return the mean value.") is None


def test_docs_passage_is_the_beginning_of_a_body_cut_between_words() -> None:
    assert cut_passage("short") == "short"
    assert cut_passage("x" * 200) == "x" * 200
    assert cut_passage("x" * 201) == "x" * 200
    words = "word " * 40  # the 40th word ends at character 199, the next begins at 200
    assert cut_passage(words + "word") == words.rstrip()
    assert cut_passage("word " * 38 + "a longer word here") == "word " * 38 + "a longer"


def test_docs_are_read_once_whichever_threads_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    started, may_end, readings = Event(), Event(), list[int]()

    def read() -> Iterator[tuple[str, str]]:
        readings.append(len(readings))
        started.set()
        assert may_end.wait(60)
        yield "title", "text"

    monkeypatch.setattr(docs_corpus, "_topics", read)
    monkeypatch.setattr(docs_corpus, "_sources", lambda: ())
    monkeypatch.setattr(docs_corpus, "_builtins", lambda: ())
    monkeypatch.setattr(docs_corpus, "_read_documents", cache(docs_corpus._read_documents.__wrapped__))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(harvest_documents)
        assert started.wait(60)
        second = pool.submit(harvest_documents)
        may_end.set()
        assert first.result() is second.result()
    assert readings == [0]
