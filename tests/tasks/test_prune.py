import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from serving.errors import EngineUnavailable
from tasks.artifacts import Artifact, draft
from tasks.corpus import build_corpus, corpus_fingerprint
from tasks.encoder import write_encoder
from tasks.errors import CorpusRejected, StepRejected, TeacherRejected
from tasks.export import export_onnx
from tasks.models.teacher import Teacher, load_sentence_transformer, load_teacher
from tasks.prune import choose_removals, prune
from tasks.pruning.cut import cut
from tasks.pruning.importance import Statistics, measure, order_all, order_removals, output_projections
from tasks.pruning.reconstruct import reconstruct
from tasks.pruning.vocabulary import trim_vocabulary
from tasks.reporting.plots import plot_pruning_profile, plot_steps
from tasks.steps import PruneConfig, TrimConfig, read_step
from tests.forge import write_corpus
from tests.teachers import HIDDEN
from tests.texts import make_sentences

SIZE = 16
CONFIG = PruneConfig(ratio=0.3, calibration_size=SIZE, embedding_ratio=0.25)


def quietly(steps: int) -> None:
    """No progress to show."""


@pytest.fixture
def teacher(tiny_teacher: Path) -> Teacher:
    return load_teacher.fn(str(tiny_teacher))


@pytest.fixture(scope="module")
def module_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prune")


@pytest.fixture(autouse=True)
def home(module_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One state folder for all tests of this module: they share the corpus and a pruned model."""
    monkeypatch.setenv("THORFORGE_HOME", str(module_home))
    return module_home


@pytest.fixture(scope="module")
def corpus(module_home: Path) -> Artifact:
    uri = str(write_corpus(module_home / "corpus.jsonl"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THORFORGE_HOME", str(module_home))
        return build_corpus.fn(uri, (), corpus_fingerprint(uri))


@pytest.fixture(scope="module")
def pruned(module_home: Path, corpus: Artifact, tiny_teacher: Path) -> Path:
    """The folder of a pruned model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THORFORGE_HOME", str(module_home))
        teacher = load_teacher.fn(str(tiny_teacher))
        return prune.fn(teacher, teacher, CONFIG, corpus).folder


def test_prune_makes_a_smaller_model_that_exports_and_says_what_it_is(teacher: Teacher, pruned: Path) -> None:
    smaller, record = load_teacher.fn(str(pruned)), read_step(pruned)
    export_onnx.fn(smaller)  # which compares with sentence-transformers itself
    model = load_sentence_transformer(pruned)
    assert record is not None
    assert record.num_parameters == smaller.num_parameters == sum(p.numel() for p in model.parameters())
    assert (record.start_parameters, record.config) == (teacher.num_parameters, CONFIG)
    share = 1 - smaller.num_encoder_parameters / teacher.num_encoder_parameters
    head = 4 * HIDDEN * 8 + 3 * 8  # parameters of the largest block that may go at a time
    assert 0.3 <= share < 0.3 + 3 * head / teacher.num_encoder_parameters
    layers = model[0].auto_model.encoder.layer
    assert record.details["embedding_rank"] == model[0].auto_model.embeddings.word_embeddings.table.embedding_dim == 24
    assert record.details["heads"] == [layer.attention.self.num_attention_heads for layer in layers]
    assert record.details["widths"] == [layer.intermediate.dense.out_features for layer in layers]
    assert len(set(zip(record.details["heads"], record.details["widths"], strict=True))) == 2, "layers differ"


def test_prune_again_starts_from_the_pruned_model(teacher: Teacher, pruned: Path, corpus: Artifact) -> None:
    start = load_teacher.fn(str(pruned))
    again = prune.fn(start, teacher, PruneConfig(ratio=0.2, calibration_size=SIZE), corpus)
    smaller = load_teacher.fn(str(again.folder))
    assert smaller.num_encoder_parameters <= 0.8 * start.num_encoder_parameters
    study: Any = SimpleNamespace(judged=[SimpleNamespace(model=smaller)])
    names = {f"prune-{model.digest[:8]}" for model in (start, smaller)}
    assert plot_steps(study).keys() == names | {f"{name}-profile" for name in names}


def test_prune_takes_what_does_nothing_first(tiny_teacher: Path) -> None:
    model, original = load_sentence_transformer(tiny_teacher), load_sentence_transformer(tiny_teacher)
    with torch.no_grad():
        for each in (model, original):
            layers = each[0].auto_model.encoder.layer
            output_projections(layers[0])["heads"].weight[:, 8:16] = 0  # its second head
            output_projections(layers[1])["neurons"].weight[:, ::2] = 0
    texts = make_sentences(SIZE)
    removals = order_all(model, measure(model, texts, quietly), multiple=32)
    gone = choose_removals(removals, budget=1)
    assert {removal.columns for queue in gone.values() for removal in queue} <= {
        tuple(range(8, 16)),
        tuple(range(0, 64, 2)),
    }
    gone = {place: queue[:1] for place, queue in removals.items() if place in {(0, "heads"), (1, "neurons")}}
    smaller = cut(model, {place: gone.get(place, []) for place in removals}, 0.0, {})
    assert (smaller[0].auto_model.config.layer_heads, smaller[0].auto_model.config.layer_widths) == ([3, 4], [64, 32])
    np.testing.assert_allclose(smaller.encode(texts), original.encode(texts), atol=1e-5)


def test_prune_error_is_what_the_best_compensation_leaves() -> None:
    torch.manual_seed(0)
    inputs, gradients = torch.randn(50, 12).double(), torch.randn(40, 6).double()
    weight = torch.randn(6, 12)
    measured = Statistics(inputs.T @ inputs, gradients.T @ gradients)
    removals = order_removals(measured, weight, unit=1, block=4, column=13)
    gone = torch.tensor([column for removal in removals for column in removal.columns])
    kept = torch.tensor([column for column in range(12) if column not in gone.tolist()])
    gram = measured.gram + 0.01 * measured.gram.diagonal().mean() * torch.eye(12)
    left = gram[gone][:, gone] - gram[gone][:, kept] @ torch.linalg.solve(gram[kept][:, kept], gram[kept][:, gone])
    lost = weight.double()[:, gone]
    assert sum(removal.error for removal in removals) == pytest.approx(
        float(torch.trace(measured.fisher @ lost @ left @ lost.T))
    )


def test_reconstruction_brings_a_cut_model_closer(tiny_teacher: Path) -> None:
    model = load_sentence_transformer(tiny_teacher)
    texts = make_sentences(60)
    removals = order_all(model, measure(model, texts, quietly), multiple=32)
    smaller = cut(model, choose_removals(removals, budget=5000), 0.0, {})
    expected = model.encode(texts)
    before = float((smaller.encode(texts) * expected).sum(axis=1).mean())
    reconstruct(smaller, model, texts, quietly)
    assert float((smaller.encode(texts) * expected).sum(axis=1).mean()) > before


def test_prune_profile_shows_every_layer(pruned: Path) -> None:
    record = read_step(pruned)
    assert record is not None
    heads, widths = plot_pruning_profile(record).axes
    assert [bar.get_height() for bar in heads.patches] == [count / 4 for count in record.details["heads"]]
    assert [bar.get_height() for bar in widths.patches] == [width / 64 for width in record.details["widths"]]


@pytest.mark.parametrize(
    "changes", [{"ratio": 1.0}, {"ratio": -0.1}, {"embedding_ratio": 1.0}, {"max_minutes": 0}, {"calibration_size": 0}]
)
def test_prune_settings_out_of_range_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(changes))):
        PruneConfig.model_validate({"ratio": 0.3} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 0.99}, r"asks for \d+ of the layers' parameters to go, \d+ can: every layer keeps one head"),
        ({"num_texts": 5000}, "5000 texts to train on were asked for"),
    ],
)
def test_prune_that_cannot_be_done_is_refused(
    changes: dict[str, float], message: str, teacher: Teacher, corpus: Artifact
) -> None:
    config = PruneConfig.model_validate({"ratio": 0.3, "calibration_size": SIZE} | changes)
    with pytest.raises(StepRejected, match=message):
        prune.fn(teacher, teacher, config, corpus)


def test_prune_refuses_too_few_calibration_texts_and_those_that_are_evaluated_on(
    teacher: Teacher, corpus: Artifact
) -> None:
    with pytest.raises(
        CorpusRejected, match=r"tiny: prune 30 % .* asks for 5000 calibration texts, the corpus has \d+"
    ):
        prune.fn(teacher, teacher, PruneConfig(ratio=0.3, calibration_size=5000), corpus)
    with draft("corpus") as work:
        shutil.copytree(corpus.folder, work.folder, dirs_exist_ok=True)
        shutil.copyfile(work.folder / "evaluation.jsonl", work.folder / "calibration.jsonl")
    with pytest.raises(CorpusRejected, match="16 of 16 calibration texts are evaluation texts too, limit 0"):
        prune.fn(teacher, teacher, CONFIG, work.artifact)


def test_prune_after_trimming_is_refused(teacher: Teacher, corpus: Artifact) -> None:
    start = load_teacher.fn(str(trim_vocabulary.fn(teacher, teacher, TrimConfig(ratio=0.1), corpus).folder))
    with pytest.raises(StepRejected, match="another tokenizer than its teacher tiny: trim after the steps that train"):
        prune.fn(start, teacher, CONFIG, corpus)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_prune_names_a_model_type_it_does_not_know(teacher_copy: Path, corpus: Artifact) -> None:
    edit_config(teacher_copy, model_type="mpnet")
    start = load_teacher.fn(str(teacher_copy))
    with pytest.raises(StepRejected, match="is of type 'mpnet': pruning knows bert and pruned_bert"):
        prune.fn(start, start, PruneConfig(ratio=0.3, calibration_size=SIZE), corpus)


def test_pruned_model_is_refused_where_its_shapes_cannot_be_honoured(pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match="model_type is 'pruned_bert', our kernels know 'bert'"):
        write_encoder(load_teacher.fn(str(pruned)), tmp_path / "encoder")


@pytest.mark.parametrize("shapes", [{"layer_heads": [4]}, {"layer_widths": None}, {"layer_heads": [4, 4]}])
def test_pruned_model_whose_shapes_are_wrong_is_rejected(
    shapes: dict[str, object], pruned: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(pruned, tmp_path / "damaged")
    edit_config(folder, **shapes)
    with pytest.raises(TeacherRejected, match="cannot load"):
        load_sentence_transformer(folder)
