"""Corpora by URI: `docs:`, a file, or a BEIR folder, split once into disjoint parts by content."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from prefect import task

from tasks.artifacts import CACHED, Artifact, draft
from tasks.corpora.docs_corpus import cut_passage, fingerprint_documents, harvest_documents, split_pair, split_sentences
from tasks.corpora.text_files import RatedPairs, Record, read_jsonl, read_qrels, read_records, read_sts
from tasks.errors import CorpusRejected

Part = Literal["calibration", "distillation", "evaluation"]
# Shares of the documents in percent. Evaluation gets most of those with a query, because their number sets the width
# of every retrieval interval: with 950 queries an interval is as wide as the gate's limit, 1 %.
_Shares = tuple[tuple[Part, int], ...]
_TEXT_SHARES: _Shares = (("calibration", 10), ("distillation", 60), ("evaluation", 30))
_PAIR_SHARES: _Shares = (("calibration", 10), ("distillation", 10), ("evaluation", 80))
_PARTS: tuple[Part, ...] = ("calibration", "distillation", "evaluation")
# The golden set of a bundle is the first 64 evaluation texts.
_MIN_TEXTS: dict[Part, int] = {"calibration": 8, "distillation": 8, "evaluation": 64}
# Sentences that cosine and overlap are judged on: the interval of their mean is then about 0.0001 wide.
_MAX_SENTENCES = 500
_STS_NAME = "sts.json"


@dataclass(frozen=True, slots=True)
class Retrieval:
    """A retrieval task: texts by id, and graded relevant documents by query."""

    queries: dict[str, str]
    documents: dict[str, str]
    qrels: dict[str, dict[str, int]]

    def list_judged(self) -> set[str]:
        """Queries and the documents judged relevant; what else the index holds is there to be told apart from them."""
        relevant = (self.documents[name] for grades in self.qrels.values() for name in grades)
        return {*self.queries.values(), *relevant}


@dataclass(slots=True)
class _Parts:
    """Texts and pairs by part, while a corpus is being split, and what more only evaluation may see."""

    texts: dict[Part, dict[str, None]] = field(default_factory=lambda: {part: {} for part in _PARTS})
    pairs: dict[Part, dict[str, str]] = field(default_factory=lambda: {part: {} for part in _PARTS})
    judged: set[str] = field(default_factory=set)


def part_of(text: str, has_query: bool = False) -> Part:
    """The part a text belongs to, by its content alone: the same in every run and on every machine."""
    point = int.from_bytes(_hash(text)[:8]) % 100
    for part, share in _PAIR_SHARES if has_query else _TEXT_SHARES:
        if point < share:
            return part
        point -= share
    raise AssertionError("shares sum to 100")


@task(task_run_name="corpus", cache_policy=CACHED, persist_result=True, result_serializer="json")
def build_corpus(uri: str, sts: tuple[Path, ...], fingerprint: str) -> Artifact:
    """Read the corpus at `uri` and the STS files, and write the parts and the rated pairs.

    `fingerprint` makes the cache see a changed source. Raises CorpusRejected.
    """
    rated = [read_sts(path) for path in sts]
    retrieval = None
    if uri == "docs:":
        parts = _split_documents(text for _, text in harvest_documents())
    elif Path(uri).is_dir():
        retrieval = read_beir(Path(uri))
        parts = _split_beir(retrieval)
    else:
        parts = _split_records(read_records(Path(uri)))
    parts.judged.update(text for _, first, second in rated for text in (*first, *second))
    _make_disjoint(parts)
    _check_sizes(uri, parts)
    with draft("corpus") as work:
        for part in _PARTS:
            _write_jsonl(work.folder / f"{part}.jsonl", ({"text": text} for text in parts.texts[part]))
        retrieval = retrieval or _pairs_as_retrieval(parts.pairs["evaluation"])
        if retrieval is not None:
            _write_beir(work.folder / "retrieval", retrieval)
        if rated:
            (work.folder / _STS_NAME).write_text(json.dumps(rated), encoding="utf-8")
    return work.artifact


def corpus_fingerprint(uri: str, sts: tuple[Path, ...] = ()) -> str:
    """What changes when the corpus behind `uri` or the content of an STS file changes.

    Raises CorpusRejected for a URI that names nothing and for an STS file that is none.
    """
    source = _source_fingerprint(uri)
    return hashlib.sha256(json.dumps([source, [read_sts(path) for path in sts]]).encode()).hexdigest()


def _source_fingerprint(uri: str) -> str:
    if uri == "docs:":
        return fingerprint_documents()
    path = Path(uri)
    if not path.exists():
        raise CorpusRejected(
            f"corpus {uri!r} does not exist: give docs:, a .txt, .jsonl, .csv or .parquet file or a BEIR folder"
        )
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def read_part(corpus: Artifact, part: Part) -> list[str]:
    """The texts of one part, in the order they were written."""
    with (corpus.folder / f"{part}.jsonl").open(encoding="utf-8") as stream:
        return [json.loads(line)["text"] for line in stream]


def read_calibration(corpus: Artifact, size: int, asker: str) -> list[str]:
    """The first `size` calibration texts. Raises CorpusRejected when there are fewer, or one is evaluated on."""
    texts = read_part(corpus, "calibration")[:size]
    if len(texts) < size:
        raise CorpusRejected(
            f"{asker} asks for {size} calibration texts, the corpus has {len(texts)}: "
            "set calibration_size lower or give a larger corpus"
        )
    sets, retrieval = evaluation_sets(corpus)
    judged = {text for name, part in sets.items() if name != "documents" for text in part}
    judged |= retrieval.list_judged() if retrieval else set()
    shared = judged.intersection(texts)
    if shared:
        raise CorpusRejected(
            f"{len(shared)} of {size} calibration texts are evaluation texts too, limit 0: a verdict would flatter "
            f"{asker}; build the corpus anew"
        )
    return texts


def read_retrieval(corpus: Artifact) -> Retrieval | None:
    """The corpus's evaluation pairs or qrels as a retrieval task, or None where it has none."""
    folder = corpus.folder / "retrieval"
    return read_beir(folder) if folder.is_dir() else None


def read_rated_pairs(corpus: Artifact) -> list[RatedPairs]:
    """The pairs of each STS file that the corpus was built with."""
    path = corpus.folder / _STS_NAME
    files = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return [(scores, first, second) for scores, first, second in files]


def evaluation_sets(corpus: Artifact) -> tuple[dict[str, list[str]], Retrieval | None]:
    """What candidates are judged on: `sentences`, and `queries` and `documents` where the corpus has pairs.

    Also `sts_first` and `sts_second`, the rated pairs of all STS files one after the other, where it has those.
    """
    retrieval, rated = read_retrieval(corpus), read_rated_pairs(corpus)
    sets = {"sentences": read_part(corpus, "evaluation")[:_MAX_SENTENCES]}
    if retrieval is not None:
        sets |= {"queries": list(retrieval.queries.values()), "documents": list(retrieval.documents.values())}
    if rated:
        sets["sts_first"] = [text for _, first, _ in rated for text in first]
        sets["sts_second"] = [text for _, _, second in rated for text in second]
    return sets, retrieval


def read_beir(folder: Path) -> Retrieval:
    """Read a BEIR folder: `corpus.jsonl`, `queries.jsonl` and `qrels/test.tsv`. Raises CorpusRejected."""
    qrels = read_qrels(folder / "qrels" / "test.tsv")
    documents = {row["_id"]: f"{row['title']} {row['text']}".strip() for row in read_jsonl(folder, "corpus")}
    queries = {row["_id"]: row["text"] for row in read_jsonl(folder, "queries")}
    for query, judged in qrels.items():
        if query not in queries:
            raise CorpusRejected(f"{folder}/qrels/test.tsv judges query {query!r}, which queries.jsonl does not have")
        unknown = judged.keys() - documents.keys()
        if unknown:
            raise CorpusRejected(
                f"{folder}/qrels/test.tsv names document {min(unknown)!r}, which corpus.jsonl does not have"
            )
    return Retrieval({query: queries[query] for query in qrels}, documents, qrels)


def _split_documents(texts: Iterable[str]) -> _Parts:
    """Whole documents go to one part: their sentences, and the pair of summary and passage where they have one.

    A body that was cut is a text as a whole: candidates are calibrated and compared on long texts as well.
    """
    parts = _Parts()
    for text in texts:
        pair = split_pair(text)
        part = part_of(text, has_query=pair is not None)
        parts.texts[part].update(dict.fromkeys(split_sentences(text)))
        if pair:
            query, body = pair
            passage = cut_passage(body)
            parts.pairs[part].setdefault(query, passage)
            if passage != body:
                parts.texts[part][body] = None
    return parts


def _split_records(records: Sequence[Record]) -> _Parts:
    parts = _Parts()
    for record in records:
        part = part_of(record.text, has_query=record.query is not None)
        parts.texts[part][record.text] = None
        if record.query is not None:
            parts.pairs[part].setdefault(record.query, record.text)
    return parts


def _split_beir(retrieval: Retrieval) -> _Parts:
    """The documents' parts; queries and the documents judged relevant are evaluation's alone."""
    parts = _Parts()
    for text in retrieval.documents.values():
        parts.texts[part_of(text)][text] = None
    parts.judged |= retrieval.list_judged()
    return parts


def _make_disjoint(parts: _Parts) -> None:
    """Drop from calibration and distillation what evaluation has too (documents share sentences), and shuffle.

    The order is by hash: any first N texts are a fair sample. Calibration sees queries and passages as well.
    """
    pairs = parts.pairs["calibration"]
    parts.texts["calibration"] |= dict.fromkeys([*pairs, *pairs.values()])
    judged = {*parts.judged, *parts.pairs["evaluation"], *parts.pairs["evaluation"].values()}
    for part in reversed(_PARTS):
        kept = [text for text in parts.texts[part] if text not in judged or part == "evaluation"]
        parts.texts[part] = dict.fromkeys(sorted(kept, key=_hash))
        judged.update(kept)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _check_sizes(uri: str, parts: _Parts) -> None:
    for part in _PARTS:
        count = len(parts.texts[part])
        if count < _MIN_TEXTS[part]:
            raise CorpusRejected(
                f"corpus {uri!r} gives {count} {part} texts, at least {_MIN_TEXTS[part]} are needed: "
                "give a corpus of a few hundred different texts (BEIR: judged documents are kept for evaluation)"
            )


def _pairs_as_retrieval(pairs: dict[str, str]) -> Retrieval | None:
    """Each query's own body is its one relevant document; equal bodies are one document."""
    if not pairs:
        return None
    ids = {body: f"d{index}" for index, body in enumerate(dict.fromkeys(pairs.values()))}
    queries = {f"q{index}": query for index, query in enumerate(pairs)}
    qrels = {f"q{index}": {ids[body]: 1} for index, body in enumerate(pairs.values())}
    return Retrieval(queries, {name: body for body, name in ids.items()}, qrels)


def _write_beir(folder: Path, retrieval: Retrieval) -> None:
    (folder / "qrels").mkdir(parents=True)
    _write_jsonl(folder / "corpus.jsonl", ({"_id": i, "text": t} for i, t in retrieval.documents.items()))
    _write_jsonl(folder / "queries.jsonl", ({"_id": i, "text": t} for i, t in retrieval.queries.items()))
    lines = [f"{q}\t{d}\t{score}" for q, judged in retrieval.qrels.items() for d, score in judged.items()]
    header = "query-id\tcorpus-id\tscore"
    (folder / "qrels" / "test.tsv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")


def _write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
