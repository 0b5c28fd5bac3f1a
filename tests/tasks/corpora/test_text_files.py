import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.corpora.text_files import MAX_TEXT_CHARS, Record, read_qrels, read_records, read_sts
from tasks.errors import CorpusRejected

ROWS = [
    Record("plain text, with a comma"),
    Record('quoted "text"\u2028on', "a query?"),
    Record("naïve 你好 🙂 שלום\x0c."),
]


def write_jsonl(path: Path) -> None:
    rows = [{"text": r.text} | ({"query": r.query} if r.query else {}) for r in ROWS]
    path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "query"])
        writer.writerows([r.text, r.query or ""] for r in ROWS)


def write_excel_csv(path: Path) -> None:
    write_csv(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def write_parquet(path: Path) -> None:
    pq.write_table(pa.table({"text": [r.text for r in ROWS], "query": [r.query for r in ROWS]}), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [("c.jsonl", write_jsonl), ("c.csv", write_csv), ("c.CSV", write_excel_csv), ("c.parquet", write_parquet)],
)
def test_records_are_the_same_in_every_format(name: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / name)
    assert read_records(tmp_path / name) == ROWS


def test_records_of_text_are_its_lines_that_are_not_blank(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_bytes("\ufefffirst line\r\n\r\n  \nsecond 🙂 line\nlast".encode())
    assert [record.text for record in read_records(path)] == ["first line", "second 🙂 line", "last"]


@pytest.mark.parametrize("column", ["text", "sentence", "body", "document"])
def test_records_find_the_text_column(column: str, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"id": 1, column: "here"}))
    assert read_records(path) == [Record("here")]


def test_records_csv_leaves_other_readers_of_csv_their_longer_fields(tmp_path: Path) -> None:
    (tmp_path / "corpus.csv").write_text("text\none\n")
    before = csv.field_size_limit()
    assert [record.text for record in read_records(tmp_path / "corpus.csv")] == ["one"]
    assert csv.field_size_limit() == before


def test_records_csv_field_may_hold_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text('text\n"two\nlines"\nthree\n')
    assert [record.text for record in read_records(path)] == ["two\nlines", "three"]


BAD_FILES: dict[str, tuple[str, bytes | None, str]] = {
    "missing": ("c.txt", None, r"'.*c\.txt' does not exist"),
    "empty": ("c.txt", b"", r"c\.txt is empty"),
    "blank": ("c.txt", b"\n \n", r"c\.txt is empty"),
    "empty jsonl": ("c.jsonl", b"", r"c\.jsonl is empty"),
    "empty csv": ("c.csv", b"", r"c\.csv is empty"),
    "wrong ending": ("c.docx", b"text", r"c\.docx' ends in '\.docx': give one of \.txt, \.jsonl, \.csv, \.parquet"),
    "no ending": ("corpus", b"text", r"ends in ''"),
    "NUL in txt": ("c.txt", b"fine\nb\x00d\n", r"c\.txt:2 holds a NUL byte"),
    "NUL in jsonl": ("c.jsonl", b'{"text": "a\\u0000"}', r"c\.jsonl:1 holds a NUL byte"),
    "NUL in a query": ("c.jsonl", b'{"text": "a", "query": "\\u0000"}', r"c\.jsonl:1 holds a NUL byte"),
    "NUL in csv": ("c.csv", b"text\na\x00\n", r"c\.csv.* holds a NUL byte"),
    "long line": ("c.txt", b"ok\n" + b"a" * 1_000_000, r"c\.txt:2 holds 1,000,000 characters, limit 200,000"),
    "long csv field": ("c.csv", b"text\nok\n" + b"a" * 1_000_000, r"c\.csv:3 holds 1,000,000 characters"),
    "not UTF-8": ("c.txt", b"fine\nna\xefve\n", r"c\.txt:2 is not UTF-8 at byte 3"),
    "csv not UTF-8": ("c.csv", b"text\n\xff\n", r"c\.csv:2 is not UTF-8 at byte 1"),
    "not JSON": ("c.jsonl", b'{"text": "a"}\n{"text": \n', r"c\.jsonl:2 is not JSON"),
    "endless JSON": ("c.jsonl", b"[" * 100_000, r"c\.jsonl:1 is not JSON"),
    "no JSON object": ("c.jsonl", b'{"text": "a"}\n["b"]\n', r"c\.jsonl:2 is not a JSON object"),
    "half a character": ("c.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}', r"c\.jsonl:2 holds half a surrogate pair"),
    "no text key": ("c.jsonl", b'{"text": "a"}\n{"words": "b"}\n', r"c\.jsonl:2 has no text: name the column one of"),
    "a number as text": ("c.jsonl", b'{"text": 7}\n', r"c\.jsonl:1 has no text"),
    "no text column": ("c.csv", b"id,words\n1,b\n", r"c\.csv:2 has no text"),
    "a short row": ("c.csv", b"id,text\n1,a\n2\n", r"c\.csv:3 has no text"),
    "open quote": ("c.csv", b'text\nfine\n"never closed\nmore\n', r"c\.csv:\d is not CSV"),
    "no parquet": ("c.parquet", b"PAR1 not really", r"c\.parquet is not a parquet file"),
    "empty parquet file": ("c.parquet", b"", r"c\.parquet is not a parquet file"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_records_bad_file_is_rejected_by_place(case: str, tmp_path: Path) -> None:
    name, data, message = BAD_FILES[case]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusRejected, match=message):
        read_records(tmp_path / name)


def test_records_parquet_faults_name_the_row(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"words": ["a"]}), path)
    with pytest.raises(CorpusRejected, match=r"c\.parquet row 1 has no text"):
        read_records(path)
    pq.write_table(pa.table({"text": ["a", "b\x00"]}), path)
    with pytest.raises(CorpusRejected, match=r"c\.parquet:2 holds a NUL byte"):
        read_records(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorpusRejected, match="is not a parquet file"):
        read_records(path)


def test_records_never_quote_the_text_itself(tmp_path: Path) -> None:
    secret = "my password is swordfish"
    for name, data in (
        ("a.jsonl", f'{{"words": "{secret}"}}'),
        ("b.txt", secret + "\x00"),
        ("c.csv", f'text\n"{secret}'),
    ):
        (tmp_path / name).write_text(data)
        with pytest.raises(CorpusRejected) as caught:
            read_records(tmp_path / name)
        assert "swordfish" not in str(caught.value)


def test_records_text_at_the_limit_is_taken(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("a" * MAX_TEXT_CHARS)
    assert len(read_records(tmp_path / "c.txt")) == 1


def test_sts_reads_scores_and_sentences(tmp_path: Path) -> None:
    path = tmp_path / "sts.tsv"
    path.write_text("score\tsentence1\tsentence2\n2.5\ta b\tc\n0\td\te\n")
    assert read_sts(path) == ([2.5, 0.0], ["a b", "d"], ["c", "e"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "does not exist"),
        (b"", r"sts\.tsv:1 is not the header"),
        (b"a\tb\tc\n1\t2\t3\n", r"sts\.tsv:1 is not the header"),
        (b"score\tsentence1\tsentence2\n1\ta\tb\n2\tonly one\n", r"sts\.tsv:3 is not 'score"),
        (b"score\tsentence1\tsentence2\nhigh\ta\tb\n", r"sts\.tsv:2 is not 'score"),
        (b"score\tsentence1\tsentence2\nnan\ta\tb\n1\ta\tb\n", r"sts\.tsv:2 is not 'score"),
        (b"score\tsentence1\tsentence2\n1\ta\tb\n", "holds 1 rated pairs"),
        (b"score\tsentence1\tsentence2\n1\ta\tb\n1\tc\td\n", "the same score"),
        (b"score\tsentence1\tsentence2\n1\ta\x00\tb\n", r"sts\.tsv:2 holds a NUL byte"),
        (b"score\tsentence1\tsentence2\n1\ta\xff\tb\n", r"sts\.tsv:2 is not UTF-8"),
    ],
)
def test_sts_bad_file_is_rejected_by_line(data: bytes | None, message: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "sts.tsv").write_bytes(data)
    with pytest.raises(CorpusRejected, match=message):
        read_sts(tmp_path / "sts.tsv")


def test_qrels_keep_what_is_relevant(tmp_path: Path) -> None:
    path = tmp_path / "test.tsv"
    path.write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\nq2\td3\t-1\nq3\td1\t1\n")
    assert read_qrels(path) == {"q1": {"d1": 2}, "q3": {"d1": 1}}
    path.write_text("q1\td1\t1\n")
    assert read_qrels(path) == {"q1": {"d1": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q\td\tscore\nq1\td1\n", r"test\.tsv:2 is not 'query<TAB>document<TAB>whole-number score'"),
        ("q1\td1\t0.5\n", r"test\.tsv:1 is not 'query"),
        ("q1\td1\t--1\n", r"test\.tsv:1 is not 'query"),
        ("q1\td1\t²\n", r"test\.tsv:1 is not 'query"),
        ("q\td\tscore\nq1\td1\t0\n", "judges nothing relevant"),
        ("", "judges nothing relevant"),
    ],
)
def test_qrels_bad_file_is_rejected_by_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "test.tsv").write_text(text, encoding="utf-8")
    with pytest.raises(CorpusRejected, match=message):
        read_qrels(tmp_path / "test.tsv")


def test_gzip_cut_short_is_rejected(tmp_path: Path) -> None:
    from tasks.corpora.text_files import read_jsonl

    packed = gzip.compress("".join(f'{{"_id": "{i}", "text": "text {i}"}}\n' for i in range(500)).encode())
    for data in (packed[:-30], b"no gzip at all", packed[:5]):
        (tmp_path / "corpus.jsonl.gz").write_bytes(data)
        with pytest.raises(CorpusRejected, match=r"corpus\.jsonl\.gz is not a complete gzip file"):
            list(read_jsonl(tmp_path, "corpus"))
