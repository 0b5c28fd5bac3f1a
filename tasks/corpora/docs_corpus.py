"""The `docs:` corpus: sentences and query/body pairs from the standard library's own documentation."""

import ast
import hashlib
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from threading import Lock
from types import ModuleType

_SKIPPED_FOLDERS = {"__pycache__", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"}
_MIN_SENTENCE_WORDS, _MAX_SENTENCE_WORDS = 8, 60
_MIN_QUERY_WORDS, _MIN_BODY_WORDS = 4, 12
# A body is searched by its beginning, as a passage: whole bodies, 88 tokens on average, doubled the time of a run.
_PASSAGE_CHARS = 200
# Text that is code, a table or a doctest rather than prose: mostly punctuation, or a prompt.
_NOT_PROSE = re.compile(r">>>|\.\.\. |={3,}|-{3,}|\*{3,}|_{3,}|\||[{}<>\\]{2,}")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")
# Who comes while another thread reads waits for what that one finds: two readings at once take each other's time, and
# in CPython 3.11 ast.parse fails now and then when another thread parses too.
_READING = Lock()


def harvest_documents() -> list[tuple[str, str]]:
    """(title, text) of every topic, module, class and function that this Python documents, in a fixed order.

    Titles are dotted names or topic names; texts are cleaned of common indentation. Nothing outside the standard
    library is read, and pure-Python modules are parsed, not imported.
    """
    with _READING:
        return _read_documents()


@cache
def _read_documents() -> list[tuple[str, str]]:
    documents: dict[str, str] = {}
    for title, text in (*_topics(), *_sources(), *_builtins()):
        if text not in documents:
            documents[text] = title
    return sorted((title, text) for text, title in documents.items())


def fingerprint_documents() -> str:
    """What changes when `harvest_documents` would find something else: the interpreter or a source file."""
    digest = hashlib.sha256(sys.version.encode())
    for path in _source_files():
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def split_sentences(text: str) -> list[str]:
    """Sentences of prose in a document: 8 to 60 words, no code, no tables, white space folded."""
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        if _NOT_PROSE.search(paragraph):
            continue
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
            if _MIN_SENTENCE_WORDS <= len(sentence.split()) <= _MAX_SENTENCE_WORDS:
                sentences.append(sentence)
    return sentences


def split_pair(text: str) -> tuple[str, str] | None:
    """(query, body): a document's one-line summary and the rest of it, or None where it has no such shape."""
    summary, _, rest = text.partition("\n\n")
    query, body = " ".join(summary.split()), " ".join(rest.split())
    if not _MIN_QUERY_WORDS <= len(query.split()) <= _MAX_SENTENCE_WORDS:
        return None
    if _NOT_PROSE.search(query) or len(body.split()) < _MIN_BODY_WORDS:
        return None
    return query, body


def cut_passage(body: str) -> str:
    """The beginning of a body that a query has to find: its first 200 characters, cut between words."""
    if len(body) <= _PASSAGE_CHARS:
        return body
    return body[: _PASSAGE_CHARS + 1].rpartition(" ")[0] or body[:_PASSAGE_CHARS]


def _topics() -> Iterator[tuple[str, str]]:
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    for name, text in topics.items():
        yield f"topic {name}", inspect.cleandoc(text)


def _sources() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in _source_files():
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # the standard library ships a few files that are templates or bad on purpose
            continue
        yield from _docstrings(tree, ".".join(path.relative_to(root).with_suffix("").parts))


def _source_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return [p for p in sorted(root.rglob("*.py")) if not _SKIPPED_FOLDERS.intersection(p.relative_to(root).parts)]


def _docstrings(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield (module if isinstance(node, ast.Module) else f"{module}.{node.name}"), text


def _builtins() -> Iterator[tuple[str, str]]:
    """Docstrings of the modules compiled into the interpreter, which have no source to parse."""
    for name in sorted(sys.builtin_module_names):
        yield from _members(import_module(name))


def _members(module: ModuleType) -> Iterator[tuple[str, str]]:
    owners: list[ModuleType | type] = [module, *(value for value in vars(module).values() if inspect.isclass(value))]
    for owner in owners:
        for name, value in ((owner.__name__, owner), *sorted(vars(owner).items())):
            text = inspect.getdoc(value) if callable(value) or value is module else None
            if text:
                yield f"{module.__name__}.{name}", text
