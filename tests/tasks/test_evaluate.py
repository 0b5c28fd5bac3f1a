import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from registry.gate import Check, GateLimits, default_checks, judge
from registry.manifest import EngineEntry, hash_file
from serving.errors import EngineUnavailable
from serving.tokenizer import TextTokenizer
from tasks.corpora.text_files import RatedPairs
from tasks.corpus import Retrieval, evaluation_sets, read_part
from tasks.evaluate import (
    choose_entry,
    compare_embeddings,
    compare_retrieval,
    compare_sts,
    evaluate,
    nearest,
    open_candidate,
    own_columns,
    rank_scores,
    row_cosine,
    score_champion,
    spearman_interval,
)
from tasks.publish import Origin, assemble_bundle
from tasks.quantize import Candidate
from tests.bundles import make_graph
from tests.forge import Forge
from tests.teachers import HIDDEN

RNG = np.random.default_rng(42)


def vectors(count: int, dimension: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)


def axes(*columns: int, count: int = 20) -> np.ndarray:
    """Unit vectors along the given axes."""
    return np.eye(count, dtype=np.float32)[list(columns)]


def query_ranking(order: list[int], count: int = 20) -> np.ndarray:
    """A query [1, D] whose nearest documents, the unit vectors, come in the given order."""
    query = np.zeros((1, count), dtype=np.float32)
    query[0, order] = np.linspace(1.0, 0.1, len(order))
    return query


@pytest.mark.parametrize(
    ("order", "grades", "ndcg", "recall"),
    [
        ([3, 1, 2], {3: 1}, 1.0, 1.0),
        ([3, 1, 2], {1: 1}, 1 / math.log2(3), 1.0),
        ([3, 1, 2], {2: 1}, 1 / math.log2(4), 1.0),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], {9: 1}, 1 / math.log2(11), 1.0),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], {10: 1}, 0.0, 0.0),
        # Linear gains: (1 + 2 / log2 3) / (2 + 1 / log2 3).
        ([5, 6], {5: 1, 6: 2}, (1 + 2 / math.log2(3)) / (2 + 1 / math.log2(3)), 1.0),
        ([5, 0, 6], {5: 2, 6: 1, 19: 1}, 2.5 / (2 + 1 / math.log2(3) + 0.5), 2 / 3),
        # More relevant documents than places: the ideal is ten of them.
        (list(range(10)), dict.fromkeys(range(12), 1), 1.0, 10 / 12),
    ],
)
def test_rank_scores_equal_hand_computed_ones(
    order: list[int], grades: dict[int, int], ndcg: float, recall: float
) -> None:
    scores = rank_scores(query_ranking(order), axes(*range(20)), [grades])
    assert scores["ndcg_at_10"][0] == pytest.approx(ndcg)
    assert scores["recall_at_10"][0] == pytest.approx(recall)


def test_nearest_equals_a_full_sort_and_breaks_ties_by_document_order() -> None:
    # Unit vectors, each twice or thrice: scores are exact, and ties fall on the last place too.
    documents = np.concatenate([axes(*range(20)), axes(*range(20)), axes(*range(0, 20, 3))])
    queries = vectors(600, dimension=20, seed=1)
    scores = queries[:, [*range(20), *range(20), *range(0, 20, 3)]]
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(nearest(queries, documents), expected)


@given(st.integers(1, 25))
def test_nearest_of_equal_documents_is_document_order(count: int) -> None:
    documents = axes(*[3] * count)
    np.testing.assert_array_equal(nearest(documents[:1], documents)[0], np.arange(min(10, count)))


def test_nearest_can_skip_the_text_itself() -> None:
    texts = vectors(700)
    found = nearest(texts, texts, {row: row for row in range(700)})
    assert not (found == np.arange(700)[:, None]).any()


def test_spearman_equals_scipy_with_and_without_ties() -> None:
    first, second = vectors(300), vectors(300, seed=1)
    for gold in (RNG.random(300), RNG.integers(0, 6, 300).astype(float)):
        expected = spearmanr(row_cosine(first, second), gold).statistic
        measured = spearman_interval(first, second, gold)
        assert measured.value == pytest.approx(expected, abs=1e-12)
        assert measured.low < expected < measured.high


def test_spearman_of_embeddings_that_tell_nothing_apart_is_zero() -> None:
    same = np.ones((20, 4), dtype=np.float32)
    measured = spearman_interval(same, same, np.arange(20.0))
    assert (measured.value, measured.low, measured.high) == (0, 0, 0)


def test_spearman_interval_of_few_pairs_is_finite() -> None:
    measured = spearman_interval(vectors(3), vectors(3, seed=1), np.array([1.0, 2.0, 3.0]))
    assert -1 <= measured.low <= measured.value <= measured.high <= 1


def rated(*sizes: int) -> list[RatedPairs]:
    return [([float(score) for score in range(size)], [""] * size, [""] * size) for size in sizes]


def similar_pairs(count: int, noise: float, seed: int) -> dict[str, np.ndarray]:
    """Embeddings of pairs that are the more alike the later they come, but for the noise."""
    similarity = np.linspace(-0.9, 0.9, count) + np.random.default_rng(seed).normal(0, noise, count)
    similarity = np.clip(similarity, -1, 1)
    second = np.stack([similarity, np.sqrt(1 - similarity**2)], axis=1).astype(np.float32)
    return {"sts_first": np.tile(np.array([[1, 0]], dtype=np.float32), (count, 1)), "sts_second": second}


def test_sts_is_the_mean_spearman_of_the_files_and_its_loss_against_the_teacher() -> None:
    teacher, own = similar_pairs(100, 0.2, 1), similar_pairs(100, 0.4, 2)
    # Of two files the second starts anew: pooled, the scores would say something else.
    measured = compare_sts(own, teacher, rated(60, 40))

    def mean(sets: dict[str, np.ndarray]) -> float:
        similarity = row_cosine(sets["sts_first"], sets["sts_second"])
        return float(np.mean([spearmanr(part, range(len(part))).statistic for part in np.split(similarity, [60])]))

    assert measured["sts_spearman"].value == pytest.approx(mean(own))
    assert measured["sts_spearman_loss"].value == pytest.approx(1 - mean(own) / mean(teacher))
    loss = measured["sts_spearman_loss"]
    assert 0 < loss.low < loss.value < loss.high


def test_sts_of_the_teacher_itself_loses_nothing() -> None:
    teacher = similar_pairs(50, 0.2, 1)
    loss = compare_sts(teacher, teacher, rated(50))["sts_spearman_loss"]
    assert (loss.value, loss.low, loss.high) == (0, 0, 0)


@pytest.mark.parametrize("sign", [-1, 0])
def test_sts_loss_against_a_teacher_that_rates_wrongly_passes_no_gate(sign: int) -> None:
    own = similar_pairs(50, 0.2, 1)
    teacher = {**own, "sts_second": own["sts_second"] * np.float32(sign)}
    loss = compare_sts(own, teacher, rated(50))["sts_spearman_loss"]
    assert math.isnan(loss.value)
    assert (
        judge({"sts_spearman_loss": loss}, [Check(metric="sts_spearman_loss", kind="max", limit=1)]).verdict == "fail"
    )


def test_comparison_with_itself_is_perfect() -> None:
    own = vectors(60)
    metrics = compare_embeddings(own, own)
    for name in ("cosine_mean", "cosine_p1", "cosine_min", "overlap_at_10"):
        measured = metrics[name]
        assert (measured.value, measured.low, measured.high) == pytest.approx((1, 1, 1), abs=1e-6)


def test_comparison_does_not_depend_on_the_length_of_vectors() -> None:
    own = vectors(60)
    scaled = own * RNG.uniform(0.1, 9, (60, 1)).astype(np.float32)
    assert compare_embeddings(scaled, own)["cosine_min"].value == pytest.approx(1, abs=1e-6)


def test_comparison_finds_the_one_bad_text() -> None:
    own = vectors(200)
    damaged = own.copy()
    damaged[17] *= -1
    metrics = compare_embeddings(damaged, own)
    assert metrics["cosine_min"].value == pytest.approx(-1, abs=1e-6)
    assert metrics["cosine_mean"].value == pytest.approx(1 - 2 / 200, abs=1e-6)
    assert metrics["cosine_mean"].low < metrics["cosine_mean"].value < metrics["cosine_mean"].high


def test_comparison_of_fewer_texts_than_neighbours() -> None:
    own = vectors(4)
    assert compare_embeddings(own, own)["overlap_at_10"].value == 1


def test_retrieval_of_the_teacher_itself_loses_nothing_and_cross_uses_the_teachers_index() -> None:
    documents, queries = axes(*range(15)), axes(0, 1, 2, 3)
    retrieval = Retrieval(
        {f"q{i}": f"query {i}" for i in range(4)},
        {f"d{i}": f"document {i}" for i in range(15)},
        {f"q{i}": {f"d{i}": 1} for i in range(4)},
    )
    teacher = {"queries": queries, "documents": documents}
    same = compare_retrieval(teacher, teacher, retrieval)
    assert same["ndcg_at_10_loss"].value == same["cross_ndcg_at_10_loss"].high == 0
    # Turned round: in itself as good as the teacher, but useless against the teacher's index.
    turned = {name: -rows for name, rows in teacher.items()}
    other = compare_retrieval(turned, teacher, retrieval)
    assert other["ndcg_at_10"].value == 1
    assert other["cross_ndcg_at_10"].value == 0
    assert other["cross_recall_at_10_loss"].value == 1


def test_retrieval_does_not_count_a_query_that_is_a_document_and_finds_itself() -> None:
    """As BEIR does it; a document that is judged relevant counts whatever its id is."""
    documents, queries = axes(*range(15)), axes(0, 1)
    queries[:, 2] = 0.5
    retrieval = Retrieval(
        {"0": "the same text", "1": "another one"},
        {f"{i}": f"document {i}" for i in range(15)},
        {"0": {"2": 1}, "1": {"1": 1}},
    )
    assert own_columns(retrieval) == {0: 0}
    embedded = {"queries": queries, "documents": documents}
    assert compare_retrieval(embedded, embedded, retrieval)["ndcg_at_10"].value == 1


def nan_candidate(forge: Forge, folder: Path) -> Candidate:
    """A real graph that embeds one word as NaN, built to the tiny teacher's vocabulary and dimension."""
    template = forge.study.find("fp32-onnx").candidate
    (folder / template.artifact.path).mkdir(parents=True)
    table = np.random.default_rng(0).standard_normal((400, HIDDEN)).astype(np.float32)
    text = read_part(forge.study.corpus, "evaluation")[0]
    table[TextTokenizer.from_folder(template.artifact.folder, 16).encode([text])[0][2]] = np.nan
    built = folder / template.artifact.path
    onnx.save(make_graph(table), built / "model.onnx")
    (built / "tokenizer.json").write_bytes((template.artifact.folder / "tokenizer.json").read_bytes())
    entry = hash_file(built / "model.onnx")
    engine = EngineEntry(runtime="onnxruntime", file="model.onnx", sha256=entry.sha256, size=entry.size)
    return template.model_copy(update={"engine": engine})


def test_evaluate_counts_non_finite_numbers_and_the_gate_fails_them(
    forge: Forge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, state = forge.study, tmp_path / "nan"
    candidate = nan_candidate(forge, state)
    for artifact in (study.corpus, forge.teacher_embeddings):
        (state / artifact.path).symlink_to(artifact.folder)
    monkeypatch.setenv("THORFORGE_HOME", str(state))
    quality = evaluate.fn(candidate, study.corpus, forge.teacher_embeddings, "here")
    assert quality.metrics["nonfinite"].value >= HIDDEN
    record = judge(quality.metrics, default_checks(GateLimits(), with_sts=False, with_champion=False))
    assert record.verdict == "fail"
    failed = {result.metric: result.reason for result in record.results if result.verdict == "fail"}
    assert {"nonfinite", "cosine_mean"} <= failed.keys()
    assert "not a finite measurement" in failed["cosine_mean"]


def test_evaluate_of_the_exported_graph_is_the_teacher(forge: Forge) -> None:
    quality = forge.study.find("fp32-onnx").quality
    sets, retrieval = evaluation_sets(forge.study.corpus)
    assert retrieval is not None
    assert (quality.num_texts, quality.num_queries) == (len(sets["sentences"]), len(retrieval.queries))
    assert quality.metrics["cosine_min"].value == pytest.approx(1, abs=1e-5)
    assert quality.metrics["ndcg_at_10_loss"].value == pytest.approx(0, abs=1e-6)
    assert quality.value("nonfinite") == 0
    assert quality.value("sts_spearman") is None


def test_evaluate_encodes_in_order_whatever_the_lengths(forge: Forge) -> None:
    encode, engine = open_candidate(forge.study.find("fp32-onnx").candidate)
    texts = [f"{'the baker counts bells ' * (index % 9)}{index}" for index in range(70)]
    steps: list[int] = []
    together = encode(texts, steps.append)
    alone = np.concatenate([encode([text], lambda n: None) for text in texts[:6]])
    engine.close()
    np.testing.assert_allclose(together[:6], alone, atol=1e-6)
    assert sum(steps) == 70


def test_champion_whose_kernels_do_not_run_here_is_judged_on_its_spare(
    forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.select._BOUND", ("openvino",))
    origin = Origin(mlflow_run_id=None, git_commit=None)
    champion = assemble_bundle.fn(forge.study, "int8-openvino", forge.teacher_embeddings, origin).folder
    assert choose_entry(champion).runtime == "openvino"

    def refuse(*_: object) -> None:
        raise EngineUnavailable("not on this processor")

    monkeypatch.setattr("serving.engines.openvino.OpenVinoEngine.__init__", refuse)
    assert choose_entry(champion).runtime == "onnxruntime"
    scores = score_champion.fn(champion, forge.study.corpus, "here")
    assert len(scores["ndcg_at_10"]) == forge.study.judged[0].quality.num_queries
