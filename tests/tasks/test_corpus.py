import gzip
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.artifacts import Artifact
from tasks.corpora.text_files import read_sts
from tasks.corpus import (
    Part,
    build_corpus,
    corpus_fingerprint,
    evaluation_sets,
    part_of,
    read_beir,
    read_calibration,
    read_part,
    read_rated_pairs,
    read_retrieval,
)
from tasks.errors import CorpusRejected
from tests.forge import write_corpus, write_sts
from tests.texts import make_pairs, make_sentences

PARTS: tuple[Part, ...] = ("calibration", "distillation", "evaluation")


def build(uri: object) -> Artifact:
    return build_corpus.fn(str(uri), (), "fingerprint")


def write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_beir(folder: Path, num_documents: int = 300, num_judged: int = 30) -> Path:
    """Every judged document has a query and a title; query 0 has a second, barely relevant document."""
    (folder / "qrels").mkdir(parents=True)
    pairs = make_pairs(num_documents)
    write_jsonl(
        folder / "corpus.jsonl", ({"_id": f"d{i}", "title": f"T{i}", "text": p["text"]} for i, p in enumerate(pairs))
    )
    write_jsonl(folder / "queries.jsonl", ({"_id": f"q{i}", "text": p["query"]} for i, p in enumerate(pairs)))
    lines = [f"q{i}\td{i}\t{2 if i == 0 else 1}" for i in range(num_judged)] + ["q0\td5\t1"]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    return folder


def assert_disjoint(corpus: Artifact) -> dict[Part, set[str]]:
    parts = {part: set(read_part(corpus, part)) for part in PARTS}
    retrieval = read_retrieval(corpus)
    judged = set(parts["evaluation"])
    if retrieval is not None:
        relevant = {document for documents in retrieval.qrels.values() for document in documents}
        judged |= set(retrieval.queries.values()) | {retrieval.documents[document] for document in relevant}
    assert not parts["calibration"] & parts["distillation"]
    assert not (parts["calibration"] | parts["distillation"]) & judged
    return parts


@given(st.text(), st.booleans())
def test_part_depends_on_content_alone(text: str, has_query: bool) -> None:
    assert part_of(text, has_query) == part_of(text, has_query)
    assert part_of(text, has_query) in PARTS


def test_part_shares_are_as_documented() -> None:
    for has_query, shares in ((False, (0.1, 0.6, 0.3)), (True, (0.1, 0.1, 0.8))):
        found = [part_of(f"text {index}", has_query) for index in range(5000)]
        assert [found.count(part) / 5000 for part in PARTS] == pytest.approx(shares, abs=0.02)


@given(st.randoms(use_true_random=False))
def test_part_of_a_text_does_not_change_with_its_neighbours(rng: random.Random) -> None:
    texts = make_sentences(40)
    before = {text: part_of(text) for text in texts}
    rng.shuffle(texts)
    assert {text: part_of(text) for text in texts[:20]} == {text: before[text] for text in texts[:20]}


def test_corpus_parts_are_stable_under_reordering(tmp_path: Path) -> None:
    rows = make_pairs(200) + [{"text": text} for text in make_sentences(200)]
    original = build(write_jsonl(tmp_path / "a.jsonl", rows))
    shuffled = random.Random(1).sample(rows, len(rows))  # noqa: S311  any fixed order
    reordered = build(write_jsonl(tmp_path / "b.jsonl", shuffled))
    for part in PARTS:
        assert read_part(original, part) == read_part(reordered, part)
    first, second = read_retrieval(original), read_retrieval(reordered)
    assert first
    assert second
    assert set(first.queries.values()) == set(second.queries.values())
    assert set(first.documents.values()) == set(second.documents.values())


def test_corpus_docs_is_split_into_disjoint_parts() -> None:
    corpus = build("docs:")
    parts = assert_disjoint(corpus)
    sets, retrieval = evaluation_sets(corpus)
    assert len(parts["calibration"]) > 1000
    assert 13_000 <= sum(map(len, parts.values())) <= 20_000
    assert retrieval
    assert 1800 <= len(retrieval.queries) <= 2400
    assert max(map(len, retrieval.documents.values())) <= 200
    assert sum(len(text) > 300 for text in sets["sentences"]) > 20  # whole bodies, of which the documents are the start
    assert {name: len(texts) for name, texts in sets.items()} == {
        "sentences": 500,
        "queries": len(retrieval.queries),
        "documents": len(retrieval.documents),
    }


def test_corpus_records_shared_between_documents_are_judged_only_in_evaluation(tmp_path: Path) -> None:
    pairs = make_pairs(300)
    # Every query's text also comes as a bare text, which alone would fall into any part.
    rows = pairs + [{"text": pair["text"]} for pair in pairs] + [{"text": pair["query"]} for pair in pairs]
    assert_disjoint(build(write_jsonl(tmp_path / "c.jsonl", rows)))


def test_corpus_calibration_holds_queries_and_bodies(tmp_path: Path) -> None:
    pairs = make_pairs(300)
    texts = read_part(build(write_jsonl(tmp_path / "c.jsonl", pairs)), "calibration")
    for key in ("query", "text"):
        assert {pair[key] for pair in pairs} & set(texts)


def test_corpus_of_bare_texts_has_no_retrieval(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text("\n".join(make_sentences(300)))
    corpus = build(path)
    assert_disjoint(corpus)
    sets, retrieval = evaluation_sets(corpus)
    assert retrieval is None
    assert sets.keys() == {"sentences"}


@pytest.mark.parametrize("packed", [False, True])
def test_corpus_beir_folder_keeps_its_judgements(packed: bool, tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "beir")
    if packed:
        for path in folder.glob("*.jsonl"):
            path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    corpus = build(folder)
    assert_disjoint(corpus)
    retrieval = read_retrieval(corpus)
    assert retrieval == read_beir(folder)
    assert (len(retrieval.queries), len(retrieval.documents)) == (30, 300)
    assert retrieval.qrels["q0"] == {"d0": 2, "d5": 1}
    assert retrieval.documents["d7"].startswith("T7 ")


def test_corpus_beir_is_calibrated_on_what_its_index_holds_beside_the_judged_documents(tmp_path: Path) -> None:
    corpus = build(write_beir(tmp_path / "beir"))
    retrieval = read_retrieval(corpus)
    assert retrieval
    texts = read_calibration(corpus, 8, "int8-static")
    assert set(texts) <= set(retrieval.documents.values())
    write_jsonl(corpus.folder / "calibration.jsonl", [{"text": text} for text in [retrieval.documents["d5"], *texts]])
    with pytest.raises(CorpusRejected, match="1 of 8 calibration texts are evaluation texts too"):
        read_calibration(corpus, 8, "int8-static")


def test_corpus_beir_whose_documents_are_all_judged_says_why_nothing_is_left(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "beir", num_documents=50, num_judged=50)
    with pytest.raises(CorpusRejected, match=r"gives 0 calibration texts.*judged documents are kept for evaluation"):
        build(folder)


def test_corpus_beir_title_may_be_null(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "beir")
    write_jsonl(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": None, "text": f"text {i}"} for i in range(300)])  # type: ignore[dict-item]
    assert read_beir(folder).documents["d3"] == "text 3"


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def append(name: str, line: str) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        with (folder / name).open("a") as stream:
            stream.write(line + "\n")

    return edit


BAD_BEIR: dict[str, tuple[Callable[[Path], object], str]] = {
    "no corpus": (remove("corpus.jsonl"), r"has no corpus\.jsonl"),
    "no queries": (remove("queries.jsonl"), r"has no queries\.jsonl"),
    "no qrels": (remove("qrels/test.tsv"), r"test\.tsv does not exist"),
    "unknown query": (append("qrels/test.tsv", "nobody\td1\t1"), r"judges query 'nobody'"),
    "unknown document": (append("qrels/test.tsv", "q1\tnothing\t1"), r"names document 'nothing'"),
    "no id": (append("corpus.jsonl", '{"text": "a"}'), r"corpus\.jsonl:301 has no string '_id'"),
    "a number as id": (append("queries.jsonl", '{"_id": 7, "text": "a"}'), r"queries\.jsonl:301 has no string '_id'"),
    "no text": (append("corpus.jsonl", '{"_id": "x"}'), r"corpus\.jsonl:301 has no string 'text'"),
    "NUL": (append("corpus.jsonl", '{"_id": "x", "text": "\\u0000"}'), r"corpus\.jsonl:301 holds a NUL byte"),
    "NUL in a title": (
        append("corpus.jsonl", '{"_id": "x", "text": "a", "title": "\\u0000"}'),
        r"corpus\.jsonl:301 holds a NUL byte",
    ),
}


@pytest.mark.parametrize("case", BAD_BEIR)
def test_corpus_bad_beir_folder_is_rejected(case: str, tmp_path: Path) -> None:
    damage, message = BAD_BEIR[case]
    folder = write_beir(tmp_path / "beir")
    damage(folder)
    with pytest.raises(CorpusRejected, match=message):
        build(folder)


def test_corpus_too_small_is_rejected_and_leaves_nothing(tmp_path: Path, home: Path) -> None:
    (tmp_path / "one.txt").write_text("a single line\n")
    with pytest.raises(CorpusRejected, match=r"one\.txt' gives \d \w+ texts, at least 8 are needed"):
        build(tmp_path / "one.txt")
    assert not home.exists()


@pytest.mark.parametrize("uri", ["no/such/file.txt", "s3x:bucket"])
def test_corpus_fingerprint_of_what_is_not_there_is_rejected(uri: str) -> None:
    with pytest.raises(CorpusRejected, match="does not exist"):
        corpus_fingerprint(uri)


def test_corpus_fingerprint_follows_content(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "c.jsonl", 20)
    folder = write_beir(tmp_path / "beir")
    before = [corpus_fingerprint(str(path)), corpus_fingerprint(str(folder))]
    assert before == [corpus_fingerprint(str(path)), corpus_fingerprint(str(folder))]
    append("c.jsonl", "{}")(tmp_path)
    append("qrels/test.tsv", "q1\td2\t1")(folder)
    assert not set(before) & {corpus_fingerprint(str(path)), corpus_fingerprint(str(folder))}


def test_corpus_fingerprint_follows_the_content_of_sts_files_and_refuses_a_bad_one(tmp_path: Path) -> None:
    uri = str(write_corpus(tmp_path / "c.jsonl", 20))
    path = write_sts(tmp_path / "a.tsv", make_sentences(20))
    first = corpus_fingerprint(uri, (path,))
    copy = path.rename(tmp_path / "b.tsv")
    assert corpus_fingerprint(uri, (copy,)) == first != corpus_fingerprint(uri)
    write_sts(copy, make_sentences(22))
    assert corpus_fingerprint(uri, (copy,)) != first
    copy.write_text("score\tsentence1\tsentence2\n1\tone\n")
    with pytest.raises(CorpusRejected, match=r"b\.tsv:2 is not 'score"):
        corpus_fingerprint(uri, (copy,))


def test_corpus_keeps_rated_sentences_out_of_calibration(tmp_path: Path) -> None:
    texts = make_sentences(300)
    path = tmp_path / "c.txt"
    path.write_text("\n".join(texts))
    plain = build(path)
    rated = read_part(plain, "calibration")[:6]
    files = (write_sts(tmp_path / "a.tsv", rated[:4]), write_sts(tmp_path / "b.tsv", rated[2:]))
    corpus = build_corpus.fn(str(path), files, "fingerprint")
    assert read_part(corpus, "calibration") == read_part(plain, "calibration")[6:]
    assert read_part(corpus, "evaluation") == read_part(plain, "evaluation")
    assert read_rated_pairs(corpus) == [read_sts(file) for file in files]
    sets, _ = evaluation_sets(corpus)
    assert sets["sts_first"] == [rated[0], rated[2], rated[2], rated[4]]
    assert sets["sts_second"] == [rated[1], rated[3], rated[3], rated[5]]
    assert read_rated_pairs(plain) == []
