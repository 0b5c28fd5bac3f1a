"""What the servers are asked to embed: real text, in an order that is the same in every run."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tasks.corpora.docs_corpus import harvest_documents, split_pair, split_sentences
from tasks.corpora.text_files import read_records
from tasks.errors import CorpusRejected

SHORT_WORDS = (7, 15)


@dataclass(frozen=True, slots=True)
class Texts:
    """Different texts in an order that has nothing to do with their length or origin.

    `short` have 7 to 15 words, `mixed` have all lengths of the corpus. A run that goes through them in order has no
    text twice in flight.
    """

    short: list[str]
    mixed: list[str]


def load_texts(corpus: str) -> Texts:
    """Texts of `docs:` or of a file (txt, jsonl, csv, parquet).

    Raises CorpusRejected, also where no text is short.
    """
    found = _harvest() if corpus == "docs:" else [record.text for record in read_records(Path(corpus))]
    mixed = sorted(dict.fromkeys(found), key=_hash)
    short = [text for text in mixed if SHORT_WORDS[0] <= len(text.split()) <= SHORT_WORDS[1]]
    if not short:
        raise CorpusRejected(f"corpus {corpus!r} has no text of {SHORT_WORDS[0]} to {SHORT_WORDS[1]} words")
    return Texts(short, mixed)


def _harvest() -> list[str]:
    """Sentences of the documentation, and summaries and bodies where a document has both."""
    texts: list[str] = []
    for _, text in harvest_documents():
        texts += [*split_sentences(text), *(split_pair(text) or ())]
    return texts


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
