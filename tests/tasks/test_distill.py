"""Distillation on a tiny random teacher of four layers: choice of layers, training, going on after a kill."""

import json
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import load_file

from registry.manifest import hash_file
from tasks.artifacts import Artifact
from tasks.corpus import build_corpus, corpus_fingerprint
from tasks.distill import choose_layers, distill, read_depth
from tasks.distillation.layers import find_layers
from tasks.distillation.teach import join_neighbours, num_held_out, training_rows
from tasks.distillation.training import Job, prepare, run_job
from tasks.errors import StepRejected, TrainingFailed
from tasks.export import export_onnx
from tasks.models.teacher import Teacher, load_sentence_transformer, load_teacher
from tasks.prune import prune
from tasks.steps import DistillConfig, PruneConfig, Training, read_step
from tests.forge import write_corpus
from tests.teachers import make_teacher

STEPS = 12


@pytest.fixture(scope="module")
def deep_teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return load_teacher.fn(str(make_teacher(tmp_path_factory.mktemp("deep") / "deep", layers=4)))


@pytest.fixture
def corpus(tmp_path: Path) -> Artifact:
    uri = str(write_corpus(tmp_path / "corpus.jsonl", 700))
    return build_corpus.fn(uri, (), corpus_fingerprint(uri))


def make_job(folder: Path, teacher: Teacher, corpus: Artifact, training: Training) -> Path:
    folder.mkdir()
    rows = training_rows(teacher, corpus, training)
    shutil.copytree(teacher.folder, folder / "student")
    held_out = num_held_out(rows)
    job = Job(
        student=folder / "student", teacher=teacher.folder, training=training, num_held_out=held_out, max_steps=STEPS
    )
    prepare(folder, job, rows)
    return folder


def test_distill_makes_a_smaller_model_that_loads_as_a_teacher_and_learns(
    deep_teacher: Teacher, corpus: Artifact
) -> None:
    config = DistillConfig(depth=2, epochs=3, batch_size=16, learning_rate=2e-3)
    folder = distill.fn(deep_teacher, deep_teacher, config, corpus).folder
    student, record = load_teacher.fn(str(folder), "tiny"), read_step(folder)
    assert record is not None
    assert read_depth(student) == 2
    assert student.num_encoder_parameters * 2 == deep_teacher.num_encoder_parameters
    assert (record.num_parameters, record.start_parameters) == (student.num_parameters, deep_teacher.num_parameters)
    assert (record.start, record.teacher, record.corpus) == (deep_teacher.digest, deep_teacher.digest, corpus.digest)
    curve = record.details["curve"]
    start = record.details["choices"][" ".join(map(str, record.details["layers"]))]
    assert curve[-1]["held_out_cosine"] > start  # training helped
    assert curve[-1]["loss"] < curve[0]["loss"]
    before, after = (load_file(place / "model.safetensors") for place in (deep_teacher.folder, folder))
    words = "embeddings.word_embeddings.weight"
    assert np.array_equal(before[words], after[words])  # words the corpus lacks stay where they are
    assert hash_file(folder / "tokenizer.json") == hash_file(deep_teacher.tokenizer)


FAMILIES = ("distilbert", "roberta", "modernbert", "qwen3", "gemma3_text", "t5")


@pytest.mark.parametrize("family", FAMILIES)
def test_distill_knows_every_family_with_a_list_of_layers(family: str, corpus: Artifact, tmp_path: Path) -> None:
    teacher = load_teacher.fn(str(make_teacher(tmp_path / family, layers=4, family=family)))
    config = DistillConfig(depth=2, epochs=1, batch_size=16)
    student = load_teacher.fn(str(distill.fn(teacher, teacher, config, corpus).folder), family)
    assert read_depth(student) == 2
    assert student.num_encoder_parameters < teacher.num_encoder_parameters
    fields = json.loads((student.folder / "config.json").read_text())
    assert len(fields.get("layer_types", range(2))) == 2
    export_onnx.fn(student)  # which compares with sentence-transformers itself


@pytest.mark.parametrize("family", ["modernbert", "t5"])
def test_distill_keeps_a_first_layer_that_has_not_what_the_others_have(
    family: str, corpus: Artifact, tmp_path: Path
) -> None:
    teacher = load_teacher.fn(str(make_teacher(tmp_path / family, layers=4, family=family)))
    rows = training_rows(teacher, corpus, Training())
    _, scores = choose_layers(load_sentence_transformer(teacher.folder), teacher, 2, rows[-16:])
    assert scores.keys() == {"0 1", "0 2", "0 3"}


def test_distill_refuses_a_model_whose_layers_are_one_and_the_same(corpus: Artifact, tmp_path: Path) -> None:
    teacher = load_teacher.fn(str(make_teacher(tmp_path / "albert", family="albert")))
    with pytest.raises(StepRejected, match="a model of type 'albert' has no list of layers"):
        distill.fn(teacher, teacher, DistillConfig(depth=1), corpus)


def test_distill_after_pruning_keeps_the_shapes_of_the_layers_left(deep_teacher: Teacher, corpus: Artifact) -> None:
    pruning = PruneConfig(ratio=0.2, calibration_size=16)
    start = load_teacher.fn(str(prune.fn(deep_teacher, deep_teacher, pruning, corpus).folder))
    config = DistillConfig(depth=2, epochs=1, batch_size=16)
    student = distill.fn(start, deep_teacher, config, corpus).folder
    record, before = read_step(student), json.loads((start.folder / "config.json").read_text())
    assert record is not None
    fields = json.loads((student / "config.json").read_text())
    for name in ("layer_heads", "layer_widths"):
        assert fields[name] == [before[name][layer] for layer in record.details["layers"]]


def test_choose_layers_takes_the_choice_that_embeds_most_like_the_teacher(
    deep_teacher: Teacher, corpus: Artifact
) -> None:
    rows = training_rows(deep_teacher, corpus, Training())
    model = load_sentence_transformer(deep_teacher.folder)
    kept, scores = choose_layers(model, deep_teacher, 2, rows[-16:])
    assert scores.keys() == {f"{a} {b}" for a, b in combinations(range(4), 2)}
    assert scores[" ".join(map(str, kept))] == max(scores.values())
    holder, name = find_layers(model[0].auto_model)
    assert len(getattr(holder, name)) == 2


def test_run_job_goes_on_from_its_last_whole_checkpoint_to_the_same_weights(
    deep_teacher: Teacher, corpus: Artifact, tmp_path: Path
) -> None:
    training = Training(batch_size=8, learning_rate=2e-3)
    folder = make_job(tmp_path / "job", deep_teacher, corpus, training)
    first = run_job(folder)
    expected = (folder / "trained" / "model.safetensors").read_bytes()
    # As a kill leaves it while the last checkpoint is written: its state, which comes last, is missing.
    assert {path.name for path in folder.glob("checkpoint-*")} == {f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"}
    (folder / f"checkpoint-{STEPS}" / "trainer_state.json").unlink()
    shutil.rmtree(folder / "trained")
    again = run_job(folder)
    assert (folder / "trained" / "model.safetensors").read_bytes() == expected
    assert again.curve == first.curve
    assert [point.step for point in again.curve] == list(range(1, STEPS + 1))
    assert again.seconds > 0


def test_run_job_stops_at_a_loss_that_is_no_number(deep_teacher: Teacher, corpus: Artifact, tmp_path: Path) -> None:
    folder = make_job(tmp_path / "job", deep_teacher, corpus, Training(batch_size=8, learning_rate=1e30))
    with pytest.raises(TrainingFailed, match="the loss is nan at step"):
        run_job(folder)


def test_distill_refuses_a_student_as_deep_as_its_teacher(deep_teacher: Teacher, corpus: Artifact) -> None:
    with pytest.raises(StepRejected, match="a student of 4 layers is not smaller than deep, which has 4"):
        distill.fn(deep_teacher, deep_teacher, DistillConfig(depth=4), corpus)


def test_distill_refuses_more_texts_than_there_are(deep_teacher: Teacher, corpus: Artifact) -> None:
    with pytest.raises(StepRejected, match=r"50000 texts to train on were asked for, the corpus has \d+"):
        distill.fn(deep_teacher, deep_teacher, DistillConfig(depth=2, num_texts=50_000), corpus)


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"max_minutes": 0}, {"num_texts": 0}, {"depth": 0}, {"joined_share": 1}, {"budget": 3}]
)
def test_distill_config_refuses_a_budget_of_zero_and_what_it_does_not_know(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        DistillConfig.model_validate({"depth": 2, **wrong})


@pytest.mark.parametrize("key", ["learning_rate", "epochs", "max_minutes", "hidden_weight", "contrastive_weight"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_step_settings_are_finite(key: str, value: float) -> None:
    for config in (DistillConfig(depth=2), PruneConfig(ratio=0.3)):
        with pytest.raises(ValidationError, match=key):
            type(config).model_validate(config.model_dump() | {key: value})


def test_join_neighbours_gives_the_share_asked_for_of_longer_texts() -> None:
    texts = [f"text {number}" for number in range(90)]
    joined = join_neighbours(texts, 0.1)
    assert len(joined) / (len(joined) + len(texts)) == pytest.approx(0.1)
    assert joined[0] == "text 0 text 1"
    assert {text.count("text") for text in joined} == set(range(2, 9))
    assert join_neighbours(texts, 0.0) == []
    left_out = " ".join(join_neighbours(texts, 0.4, 30)).split()
    assert {int(word) for word in left_out if word != "text"} == set(range(60))  # the last 30 are in none


def test_texts_that_are_measured_on_are_no_part_of_long_ones_that_are_trained_on(
    deep_teacher: Teacher, corpus: Artifact
) -> None:
    rows = training_rows(deep_teacher, corpus, Training(joined_share=0.5))
    held_out = {row[1:-1].tobytes() for row in rows[-num_held_out(rows) :]}
    joined = [row.tobytes() for row in rows[: len(rows) // 2]]
    assert not any(text in row for text in held_out for row in joined)
