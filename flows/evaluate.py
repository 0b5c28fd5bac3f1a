"""evaluate: STS and retrieval scores of any model, bundle or worker, on files the user names."""

from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from registry.gate import Measurement
from tasks.corpora.text_files import read_sts
from tasks.corpus import read_beir
from tasks.evaluate import own_columns, rank_scores, relevant_columns, spearman_interval
from tasks.measurement.statistics import mean_interval
from tasks.progress import progress
from tasks.sources import Source, open_source


class Score(BaseModel):
    """One metric on one data set, times 100 as published tables have it, with its 95 % interval."""

    model_config = ConfigDict(frozen=True)

    dataset: str
    metric: str
    value: float
    low: float
    high: float
    count: int


class Evaluation(BaseModel):
    """All scores of one source."""

    model_config = ConfigDict(frozen=True)

    source: str
    kind: str
    model: str
    scores: tuple[Score, ...]


def evaluate_source(source: str, sts: list[Path], beir: list[Path]) -> Evaluation:
    """Score `source` on STS files (Spearman) and BEIR folders (nDCG@10, recall@10).

    Raises TaskError, RegistryError or ServingError, each naming what is wrong.
    """
    opened = open_source(source)
    try:
        scores = [score for path in sts for score in _score_sts(opened, path)]
        scores += [score for path in beir for score in _score_beir(opened, path)]
    finally:
        opened.close()
    return Evaluation(source=source, kind=opened.kind, model=opened.name, scores=tuple(scores))


def _score_sts(source: Source, path: Path) -> list[Score]:
    gold, first, second = read_sts(path)
    with progress(path.stem, 2 * len(gold)) as advance:
        left, right = source.encode(first, advance), source.encode(second, advance)
    return [_score(path.stem, "sts_spearman", spearman_interval(left, right, np.array(gold)), len(gold))]


def _score_beir(source: Source, folder: Path) -> list[Score]:
    retrieval = read_beir(folder)
    with progress(folder.name, len(retrieval.queries) + len(retrieval.documents)) as advance:
        queries = source.encode(list(retrieval.queries.values()), advance)
        documents = source.encode(list(retrieval.documents.values()), advance)
    scores = rank_scores(queries, documents, relevant_columns(retrieval), own_columns(retrieval))
    return [_score(folder.name, name, mean_interval(values), len(queries)) for name, values in scores.items()]


def _score(dataset: str, metric: str, measured: Measurement, count: int) -> Score:
    value, low, high = 100 * measured.value, 100 * measured.low, 100 * measured.high
    return Score(dataset=dataset, metric=metric, value=value, low=low, high=high, count=count)
