"""Evaluate: how close a candidate's embeddings are to the teacher's, and what that costs on tasks."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from prefect import task
from pydantic import BaseModel, ConfigDict

from registry.gate import Measurement
from registry.manifest import EngineEntry, read_manifest
from registry.staging import staged_folder
from serving.engines import GPU_RUNTIMES, Embeddings, Engine, num_cores, open_engine
from serving.errors import EngineUnavailable
from serving.tokenizer import TOKENIZER_NAME, Ids, TextTokenizer, pad_batch
from tasks.artifacts import CACHED, Artifact
from tasks.corpora.text_files import RatedPairs
from tasks.corpus import Retrieval, evaluation_sets, read_rated_pairs
from tasks.graphs.exact import write_exact_twin
from tasks.measurement.statistics import Values, loss_interval, mean_interval, relative_loss, statistic_interval
from tasks.progress import Advance, progress
from tasks.quantize import Candidate
from tasks.state import state_dir

TOP_K = 10
# A batch of 16 on each core is done sooner than one of 32 on two: 5.4 for 6.1 s in fp32, 6.0 for 7.9 s in exact INT8.
_BATCH = 16
_NUM_PARITY = 64
_SAME_COSINE = 1 - 1e-6  # the least of a sample in float32
_SCORE_ROWS = 512
_NO_COLUMNS: Mapping[int, int] = MappingProxyType({})

# Texts to embeddings [N, D] in their order, reporting progress.
Encode = Callable[[Sequence[str], Advance], Embeddings]
# Rows drawn from a sample [R, N] to one value each [R].
_Statistic = Callable[[NDArray[np.intp]], Values]


class Quality(BaseModel):
    """Measurements by name. A metric that the corpus cannot give is absent: a gate that asks for it fails."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metrics: dict[str, Measurement]
    num_texts: int
    num_queries: int
    scores: dict[str, list[float]] = {}
    """Per query, what `ndcg_at_10` and `recall_at_10` are the means of: two systems are compared query by query."""

    def value(self, name: str) -> float | None:
        """The point value of a metric, or None where it was not measured."""
        return self.metrics[name].value if name in self.metrics else None

    def losses_vs(self, champion: dict[str, list[float]]) -> dict[str, Measurement]:
        """Losses as a share of the champion's scores of the same queries; empty without any."""
        return {
            f"{name}_loss_vs_champion": loss_interval(np.array(self.scores[name]), np.array(scores))
            for name, scores in champion.items()
            if len(self.scores.get(name, ())) == len(scores) > 0
        }


@task(
    task_run_name="evaluate-{candidate.variant.name}",
    cache_policy=CACHED,
    persist_result=True,
    result_serializer="json",
)
def evaluate(candidate: Candidate, corpus: Artifact, teacher_embeddings: Artifact, hardware: str) -> Quality:
    """Judge a candidate on the evaluation part, through the engine class that the worker runs.

    INT8 and FP8 graphs are judged on exact arithmetic, and `engine_cosine_mean` says how near the engine that serves
    comes to it on this processor; `hardware` is part of the cache key.
    """
    sets, retrieval = evaluation_sets(corpus)
    teacher = {path.stem: np.load(path, allow_pickle=False) for path in teacher_embeddings.folder.glob("*.npy")}
    encode, engine, engine_cosine = open_judged(candidate, sets["sentences"])
    with progress(f"evaluate {candidate.variant.name}", sum(map(len, sets.values()))) as advance:
        own = {name: encode(texts, advance) for name, texts in sets.items()}
    engine.close()
    metrics = compare_embeddings(own["sentences"], teacher["sentences"])
    metrics["engine_cosine_mean"] = engine_cosine
    metrics["nonfinite"] = _count_nonfinite(list(own.values()))
    if retrieval is not None:
        metrics |= compare_retrieval(own, teacher, retrieval)
    if rated := read_rated_pairs(corpus):
        metrics |= compare_sts(own, teacher, rated)
    return Quality(
        metrics=metrics,
        num_texts=len(sets["sentences"]),
        num_queries=len(sets.get("queries", ())),
        scores={} if retrieval is None else _score_queries(own, retrieval),
    )


@task(task_run_name="score-champion", cache_policy=CACHED, persist_result=True, result_serializer="json")
def score_champion(champion: Path | None, corpus: Artifact, hardware: str) -> dict[str, list[float]]:
    """Per query, the champion bundle's nDCG@10 and recall@10 on the same texts, as it serves here; or nothing.

    `hardware` is part of the cache key, as `evaluate`'s.
    """
    sets, retrieval = evaluation_sets(corpus)
    if champion is None or retrieval is None:
        return {}
    encode, engine = open_encoder(champion, choose_entry(champion), read_manifest(champion).max_seq_length)
    wanted = {name: sets[name] for name in ("queries", "documents")}
    with progress("evaluate champion", sum(map(len, wanted.values()))) as advance:
        own = {name: encode(texts, advance) for name, texts in wanted.items()}
    engine.close()
    return _score_queries(own, retrieval)


def choose_entry(bundle: Path) -> EngineEntry:
    """The engine of a bundle that serves on this node: the first that loads, which a spare is where kernels are not."""
    *entries, last = read_manifest(bundle).engines
    for entry in entries:
        try:
            open_engine(bundle, entry).close()
        except EngineUnavailable:
            continue
        return entry
    return last


def open_candidate(candidate: Candidate, is_exact: bool = False) -> tuple[Encode, Engine]:
    """The candidate's engine, and text encoding on top of it; `is_exact`: the graph's arithmetic on any processor."""
    folder, entry, length = candidate.artifact.folder, candidate.engine, candidate.max_seq_length
    if not is_exact or candidate.variant.build != "int8-dynamic":
        return open_encoder(folder, entry, length, is_exact)
    # onnxruntime multiplies integers on the processor's kernels whatever it is told.
    state_dir().mkdir(parents=True, exist_ok=True)
    with staged_folder(state_dir(), "exact") as twin:
        write_exact_twin(folder / entry.file, twin / entry.file)
        shutil.copyfile(folder / TOKENIZER_NAME, twin / TOKENIZER_NAME)
        return open_encoder(twin, entry, length)


def open_encoder(folder: Path, entry: EngineEntry, max_length: int, is_exact: bool = False) -> tuple[Encode, Engine]:
    """An engine of a bundle folder, and text encoding on top of it: as many batches at a time as there are cores.

    Raises EngineUnavailable.
    """
    num_threads, num_runs = (0, 1) if entry.runtime in GPU_RUNTIMES else (1, num_cores())
    engine = open_engine(folder, entry, num_threads, num_runs, is_exact=is_exact)
    return _make_encoder(TextTokenizer.from_folder(folder, max_length), engine, num_runs), engine


def open_judged(candidate: Candidate, texts: Sequence[str]) -> tuple[Encode, Engine, Measurement]:
    """The engine that a candidate is judged on, and the cosine with it of the one that serves.

    That is the one that serves where it is exact, or proves to be on the first of `texts`: kernels that add up integers
    without a loss take half the time of the same in float32.
    """
    encode, engine = open_candidate(candidate)
    if not candidate.variant.is_exact:
        return encode, engine, Measurement(1.0, 1.0, 1.0)
    encode_exactly, exact = open_candidate(candidate, is_exact=True)
    # In the same batches: dynamic ranges are a batch's.
    rows = [_unit(each(texts[:_NUM_PARITY], lambda steps: None)) for each in (encode, encode_exactly)]
    cosines = (rows[0] * rows[1]).sum(axis=1, dtype=np.float64)
    if cosines.min() >= _SAME_COSINE:
        exact.close()
        return encode, engine, mean_interval(cosines)
    engine.close()
    return encode_exactly, exact, mean_interval(cosines)


def _make_encoder(tokenizer: TextTokenizer, engine: Engine, num_runs: int) -> Encode:
    """Encoding in batches of like length, so that little padding is computed, `num_runs` of them at a time."""

    def encode(texts: Sequence[str], advance: Advance) -> Embeddings:
        ids = tokenizer.encode(texts)
        order = np.argsort([len(row) for row in ids], kind="stable")
        parts: list[Embeddings] = []
        with ThreadPoolExecutor(num_runs) as pool:
            for part in pool.map(lambda batch: engine.embed(*batch), _batches(ids, order)):
                parts.append(part)
                advance(len(part))
        embeddings = np.empty((len(ids), parts[0].shape[1]), dtype=np.float32)
        embeddings[order] = np.concatenate(parts)
        return embeddings

    return encode


def _batches(ids: list[Ids], order: NDArray[np.intp]) -> list[tuple[Ids, Ids]]:
    return [pad_batch([ids[row] for row in order[start : start + _BATCH]]) for start in range(0, len(order), _BATCH)]


def compare_embeddings(own: Embeddings, teacher: Embeddings) -> dict[str, Measurement]:
    """Cosine similarity text by text: mean, 1st percentile, minimum; and overlap of the 10 nearest neighbours."""
    cosine = _unit(own) * _unit(teacher)
    similarity = cosine.sum(axis=1, dtype=np.float64)
    size = len(similarity)

    def lowest(share: float) -> _Statistic:
        return lambda rows: np.quantile(similarity[rows], share, axis=1)

    return {
        "cosine_mean": mean_interval(similarity),
        "cosine_p1": statistic_interval(lowest(0.01), size),
        "cosine_min": statistic_interval(lowest(0.0), size),
        "overlap_at_10": mean_interval(_overlap(own, teacher)),
    }


def compare_retrieval(
    own: dict[str, Embeddings], teacher: dict[str, Embeddings], retrieval: Retrieval
) -> dict[str, Measurement]:
    """nDCG@10 and recall@10 of the candidate, of its queries on the teacher's index (`cross_`), and their losses."""
    judged = relevant_columns(retrieval), own_columns(retrieval)
    base = rank_scores(teacher["queries"], teacher["documents"], *judged)
    metrics: dict[str, Measurement] = {}
    for prefix, documents in (("", own["documents"]), ("cross_", teacher["documents"])):
        scores = rank_scores(own["queries"], documents, *judged)
        for name, values in scores.items():
            metrics[f"{prefix}{name}"] = mean_interval(values)
            metrics[f"{prefix}{name}_loss"] = loss_interval(values, base[name])
    return metrics


def compare_sts(
    own: dict[str, Embeddings], teacher: dict[str, Embeddings], rated: Sequence[RatedPairs]
) -> dict[str, Measurement]:
    """Spearman correlation of `sts_first` with `sts_second`, the mean over the files, and its loss.

    Pairs are resampled within their file, the same for the candidate and the teacher.
    """
    scores = [np.array(file[0]) for file in rated]
    sizes = [len(file) for file in scores]

    def mean_spearman(sets: dict[str, Embeddings]) -> Callable[..., Values]:
        similarities = np.split(row_cosine(sets["sts_first"], sets["sts_second"]), np.cumsum(sizes)[:-1])
        files = [_spearman(similarity, gold) for similarity, gold in zip(similarities, scores, strict=True)]
        return lambda *rows: np.mean([file(drawn) for file, drawn in zip(files, rows, strict=True)], axis=0)

    candidate, base = mean_spearman(own), mean_spearman(teacher)
    return {
        "sts_spearman": statistic_interval(candidate, *sizes),
        "sts_spearman_loss": statistic_interval(lambda *rows: relative_loss(candidate(*rows), base(*rows)), *sizes),
    }


def _score_queries(own: dict[str, Embeddings], retrieval: Retrieval) -> dict[str, list[float]]:
    scores = rank_scores(own["queries"], own["documents"], relevant_columns(retrieval), own_columns(retrieval))
    return {name: values.tolist() for name, values in scores.items()}


def relevant_columns(retrieval: Retrieval) -> list[dict[int, int]]:
    """Per query, the grade of each relevant document by its column in the index."""
    column = {name: index for index, name in enumerate(retrieval.documents)}
    return [{column[d]: grade for d, grade in retrieval.qrels[q].items()} for q in retrieval.queries]


def own_columns(retrieval: Retrieval) -> dict[int, int]:
    """By row of a query, the column of the document that has its id and is not judged relevant: the query itself.

    In some data sets of BEIR (ArguAna, Quora) queries are documents too, and finding oneself does not count there.
    """
    column = {name: index for index, name in enumerate(retrieval.documents)}
    named = ((row, query) for row, query in enumerate(retrieval.queries) if query in column)
    return {row: column[query] for row, query in named if query not in retrieval.qrels[query]}


def rank_scores(
    queries: Embeddings,
    documents: Embeddings,
    relevant: list[dict[int, int]],
    own: Mapping[int, int] = _NO_COLUMNS,
) -> dict[str, Values]:
    """Per query: nDCG@10 (linear gains, log2 discount, as trec_eval and BEIR) and recall@10 (share of relevant).

    `own` is what `own_columns` gives.
    """
    discounts = 1 / np.log2(np.arange(2, TOP_K + 2))
    ndcg, recall = np.zeros(len(relevant)), np.zeros(len(relevant))
    for row, (found, grades) in enumerate(zip(nearest(queries, documents, own), relevant, strict=True)):
        gains = np.array([grades.get(int(column), 0) for column in found], dtype=np.float64)
        ideal = np.sort(list(grades.values()))[::-1][:TOP_K]
        ndcg[row] = (gains @ discounts[: len(gains)]) / (ideal @ discounts[: len(ideal)])
        recall[row] = np.count_nonzero(gains) / len(grades)
    return {"ndcg_at_10": ndcg, "recall_at_10": recall}


def nearest(queries: Embeddings, documents: Embeddings, own: Mapping[int, int] = _NO_COLUMNS) -> NDArray[np.intp]:
    """Columns of the 10 documents nearest each query by cosine, best first [N, 10]; equal scores keep document order.

    `own` says by row which column is the query itself, and no neighbour.
    """
    queries, documents = _unit(queries), _unit(documents)
    parts = []
    for start in range(0, len(queries), _SCORE_ROWS):
        scores = queries[start : start + _SCORE_ROWS] @ documents.T
        for row in range(len(scores)):
            if start + row in own:
                scores[row, own[start + row]] = -np.inf
        parts.append(_top(scores))
    return np.concatenate(parts)


def spearman_interval(first: Embeddings, second: Embeddings, gold: Values) -> Measurement:
    """Spearman correlation of cosine similarities with rated ones, -1 to 1, and its interval over rated pairs."""
    return statistic_interval(_spearman(row_cosine(first, second), gold), len(gold))


def row_cosine(first: Embeddings, second: Embeddings) -> Values:
    """Cosine of row i with row i."""
    return np.asarray((_unit(first) * _unit(second)).sum(axis=1), dtype=np.float64)


def _spearman(similarity: Values, gold: Values) -> _Statistic:
    return lambda rows: _correlations(_rank(similarity[rows]), _rank(gold[rows]))


def _rank(values: Values) -> Values:
    from scipy.stats import rankdata  # noqa: PLC0415  takes a second, and who promotes ranks nothing

    return np.asarray(rankdata(values, axis=1), dtype=np.float64)


def _correlations(first: Values, second: Values) -> Values:
    """Row by row; 0 where one side does not vary at all (equal embeddings, a resample of one pair)."""
    first, second = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (first, second))
    covariance = (first * second).sum(axis=1)
    scale = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    return np.divide(covariance, scale, out=np.zeros_like(scale), where=scale != 0)


def _overlap(own: Embeddings, teacher: Embeddings) -> Values:
    """Per text, the share of the teacher's 10 nearest neighbours that the candidate finds too."""
    itself = {row: row for row in range(len(own))}
    pairs = zip(nearest(own, own, itself), nearest(teacher, teacher, itself), strict=True)
    return np.array([len(set(a) & set(b)) / len(b) for a, b in pairs])


def _top(scores: NDArray[np.float32]) -> NDArray[np.intp]:
    count = min(TOP_K, scores.shape[1])
    candidates = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    worst = np.take_along_axis(scores, candidates, axis=1).min(axis=1, keepdims=True)
    # Of several documents that tie for the last place the partition takes any: those rows are sorted in full.
    for row in np.flatnonzero((scores >= worst).sum(axis=1) > count):
        candidates[row] = np.argsort(-scores[row], kind="stable")[:count]
    candidates.sort(axis=1)
    order = np.argsort(-np.take_along_axis(scores, candidates, axis=1), axis=1, kind="stable")
    return np.take_along_axis(candidates, order, axis=1)


def _unit(embeddings: Embeddings) -> Embeddings:
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return np.asarray(embeddings / np.where(norms == 0, 1, norms), dtype=np.float32)


def _count_nonfinite(sets: list[Embeddings]) -> Measurement:
    count = float(sum(np.count_nonzero(~np.isfinite(embeddings)) for embeddings in sets))
    return Measurement(count, count, count)
