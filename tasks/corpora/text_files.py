"""Reading text that people bring: txt, jsonl, csv, parquet and BEIR files, with every fault named by file and line."""

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.errors import CorpusRejected

MAX_TEXT_CHARS = 200_000
_TEXT_COLUMNS = ("text", "sentence", "body", "document")
# Scores, and the first and the second sentence of each pair.
RatedPairs = tuple[list[float], list[str], list[str]]
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Record:
    """One text of a corpus, with the query it answers where the file has one."""

    text: str
    query: str | None = None


def read_records(path: Path) -> list[Record]:
    """Read a corpus file by its ending. Raises CorpusRejected naming the file, the line and the fault."""
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Record]]]] = {
        ".txt": _read_txt,
        ".jsonl": _read_jsonl_records,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise CorpusRejected(
            f"corpus {str(path)!r} ends in {path.suffix!r}: give one of {', '.join(readers)} or a BEIR folder"
        )
    if not path.is_file():
        raise CorpusRejected(f"corpus file {str(path)!r} does not exist")
    records = []
    for line, record in reader(path):
        for text in (record.text, record.query or ""):
            check_text(text, f"{path}:{line}")
        if record.text.strip():
            records.append(record)
    if not records:
        raise CorpusRejected(f"corpus file {path} is empty: give a few hundred different texts")
    return records


def check_text(text: str, place: str) -> None:
    """Refuse what is not text a person wrote. Raises CorpusRejected naming `place`."""
    if "\x00" in text:
        raise CorpusRejected(f"{place} holds a NUL byte: the file is binary or not UTF-8; save it as UTF-8 text")
    if _SURROGATE.search(text):
        raise CorpusRejected(f"{place} holds half a surrogate pair (\\ud800 to \\udfff), which is no character")
    if len(text) > MAX_TEXT_CHARS:
        raise CorpusRejected(
            f"{place} holds {len(text):,} characters, limit {MAX_TEXT_CHARS:,}: split it into paragraphs"
        )


def read_jsonl(folder: Path, stem: str) -> Iterator[dict[str, str]]:
    """Rows of a BEIR folder's `<stem>.jsonl` or `.jsonl.gz`: `_id`, `text` and `title`. Raises CorpusRejected."""
    path = next((p for p in (folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.gz") if p.is_file()), None)
    if path is None:
        raise CorpusRejected(
            f"{folder} has no {stem}.jsonl: a BEIR folder holds corpus.jsonl, queries.jsonl and qrels/test.tsv"
        )
    for line, row in _json_rows(path):
        for key in ("_id", "text"):
            if not isinstance(row.get(key), str):
                raise CorpusRejected(f"{path}:{line} has no string {key!r}")
        title = row["title"] if isinstance(row.get("title"), str) else ""  # absent or null where there is none
        check_text(title + row["text"], f"{path}:{line}")
        yield row | {"title": title}


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Relevance judgements above zero: query → document → grade. Raises CorpusRejected."""
    if not path.is_file():
        raise CorpusRejected(
            f"{path} does not exist: a BEIR folder holds corpus.jsonl, queries.jsonl and qrels/test.tsv"
        )
    qrels: dict[str, dict[str, int]] = {}
    for number, line in enumerate(_lines(path), start=1):
        fields = line.split("\t")
        if number == 1 and fields[-1] == "score":
            continue
        if len(fields) != 3 or not re.fullmatch("-?[0-9]+", fields[2]):
            raise CorpusRejected(f"{path}:{number} is not 'query<TAB>document<TAB>whole-number score'")
        if int(fields[2]) > 0:
            qrels.setdefault(fields[0], {})[fields[1]] = int(fields[2])
    if not qrels:
        raise CorpusRejected(f"{path} judges nothing relevant")
    return qrels


def read_sts(path: Path) -> RatedPairs:
    """Read an STS file: tab-separated with header score, sentence1, sentence2. Raises CorpusRejected."""
    if not path.is_file():
        raise CorpusRejected(f"STS file {str(path)!r} does not exist")
    lines = list(_lines(path))
    if not lines or lines[0].split("\t") != ["score", "sentence1", "sentence2"]:
        raise CorpusRejected(f"{path}:1 is not the header 'score<TAB>sentence1<TAB>sentence2'")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        fields = line.split("\t")
        try:
            score, first, second = fields
            rows.append((_finite(score), first, second))
        except ValueError:
            raise CorpusRejected(f"{path}:{number} is not 'score<TAB>sentence1<TAB>sentence2'") from None
        for text in (first, second):
            check_text(text, f"{path}:{number}")
    if len(rows) < 2:
        raise CorpusRejected(f"{path} holds {len(rows)} rated pairs: a correlation needs more")
    if len({score for score, _, _ in rows}) == 1:
        raise CorpusRejected(f"{path} gives all {len(rows)} pairs the same score: a correlation needs different ones")
    return [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]


def _finite(score: str) -> float:
    number = float(score)
    if not math.isfinite(number):
        raise ValueError(score)
    return number


def _lines(path: Path) -> Iterator[str]:
    """Lines without their ends and byte-order mark, decoded strictly: a bad byte is named by line."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
        number = 0
        try:
            for number, raw in enumerate(stream, start=1):
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise CorpusRejected(
                f"{path}:{number} is not UTF-8 at byte {error.start + 1}: save the file as UTF-8"
            ) from None
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise CorpusRejected(f"{path} is not a complete gzip file: fetch or pack it again") from None


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CorpusRejected(f"{path}:{number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise CorpusRejected(f"{path}:{number} is not a JSON object")
        yield number, row


def _record(row: dict[str, Any], place: str) -> Record:
    """A row with a text column and perhaps a query."""
    column = next((name for name in _TEXT_COLUMNS if isinstance(row.get(name), str)), None)
    if column is None:
        raise CorpusRejected(
            f"{place} has no text: name the column one of {', '.join(_TEXT_COLUMNS)} (and query beside it for pairs)"
        )
    query = row.get("query")
    return Record(row[column], query if isinstance(query, str) and query else None)


def _read_txt(path: Path) -> Iterator[tuple[int, Record]]:
    for number, line in enumerate(_lines(path), start=1):
        yield number, Record(line)


def _read_jsonl_records(path: Path) -> Iterator[tuple[int, Record]]:
    for number, row in _json_rows(path):
        yield number, _record(row, f"{path}:{number}")


def _read_csv(path: Path) -> Iterator[tuple[int, Record]]:
    text = "\n".join(_lines(path))
    check_text(text.replace("\n", "")[:MAX_TEXT_CHARS], str(path))
    # Our own limit, which names the line, comes first. This one is the whole process's: others read CSV, too.
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            yield reader.line_num, _record(row, f"{path}:{reader.line_num}")
    except csv.Error as error:
        raise CorpusRejected(f"{path}:{reader.line_num} is not CSV: {error}") from None


def _read_parquet(path: Path) -> Iterator[tuple[int, Record]]:
    import pyarrow.parquet as pq  # noqa: PLC0415  half a second only this format pays

    try:
        table = pq.read_table(path)
    except Exception as error:  # pyarrow's errors share no public base class
        raise CorpusRejected(f"{path} is not a parquet file: {error}") from None
    for number, row in enumerate(table.to_pylist(), start=1):
        yield number, _record(row, f"{path} row {number}")
