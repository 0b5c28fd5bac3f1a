"""Distil: a student with fewer layers of its teacher, the best ones to begin with, taught to embed as it does."""

import json
from collections.abc import Sequence
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

from prefect import task

from serving.tokenizer import Ids
from tasks.artifacts import CACHED, Artifact, draft
from tasks.distillation.teach import num_held_out, require_same_tokenizer, teach, training_rows
from tasks.errors import StepRejected
from tasks.models.teacher import Teacher, load_sentence_transformer
from tasks.progress import progress
from tasks.steps import DistillConfig, copy_model, describe_step, transformer_folder, write_step

# Beyond this many choices of layers, each of which takes about a second to measure, they are dropped one at a time,
# the least missed first.
_MAX_CHOICES = 300

Layers = tuple[int, ...]


@task(task_run_name="distill-{config.depth}", cache_policy=CACHED, persist_result=True, result_serializer="json")
def distill(start: Teacher, teacher: Teacher, config: DistillConfig, corpus: Artifact) -> Artifact:
    """A student of `config.depth` layers of `start`, taught by `teacher` on the distillation part.

    Raises StepRejected before anything is trained, TrainingFailed.
    """
    check_depth(start.name, config, read_depth(start))
    require_same_tokenizer(start, teacher)
    rows = training_rows(start, corpus, config)
    student = load_sentence_transformer(start.folder)
    with draft("distill") as work:
        kept, scores = choose_layers(student, teacher, config.depth, rows[-num_held_out(rows) :])
        write_student(start, student, kept, work.folder)
        trained = teach(work.folder, teacher, rows, config)
        details = {"layers": kept, "choices": scores, **trained.model_dump(mode="json", exclude={"seconds"})}
        write_step(work.folder, describe_step(work.folder, config, start, teacher, corpus, details))
    return work.artifact


def check_depth(name: str, config: DistillConfig, depth: int) -> int:
    """The student's depth. Raises StepRejected where the model it begins with is no deeper."""
    if config.depth >= depth:
        raise StepRejected(f"a student of {config.depth} layers is not smaller than {name}, which has {depth}")
    return config.depth


def read_depth(model: Teacher) -> int:
    """Layers of a model, from its configuration. Raises StepRejected for a model whose layers cannot be told."""
    config = json.loads((model.tokenizer.parent / "config.json").read_text(encoding="utf-8"))
    depth = next((config[key] for key in _DEPTH_KEYS if isinstance(config.get(key), int)), None)
    if depth is None:
        raise StepRejected(
            f"{model.name} is of type {config.get('model_type')!r}, whose layers distillation cannot tell"
        )
    return int(depth)


_DEPTH_KEYS = ("num_hidden_layers", "n_layers", "num_layers")


def choose_layers(
    student: Any, teacher: Teacher, depth: int, held_out: Sequence[Ids]
) -> tuple[Layers, dict[str, float]]:
    """The layers that embed most like the teacher before any training, and the cosine of each choice measured.

    The choice matters: of MiniLM's six, the layers 0, 2, 5 start out at another level than 3, 4, 5.
    """
    from tasks.distillation.training import embed_rows  # noqa: PLC0415  a cached run need not load torch

    holder, name = find_layers(student)
    layers = list(getattr(holder, name))
    expected = embed_rows(load_sentence_transformer(teacher.folder), held_out)
    scores: dict[Layers, float] = {}

    def measure(choice: Layers) -> float:
        _set_layers(student, [layers[place] for place in choice])
        scores[choice] = float((embed_rows(student, held_out) * expected).sum(axis=1).mean())
        return scores[choice]

    kept = tuple(range(len(layers)))
    step = len(layers) - depth if comb(len(layers), depth) <= _MAX_CHOICES else 1
    with progress("choose layers", len(layers) - depth) as advance:
        while len(kept) > depth:
            kept = max(combinations(kept, len(kept) - step), key=measure)
            advance(step)
    _set_layers(student, [layers[place] for place in kept])
    return kept, {" ".join(map(str, choice)): round(score, 6) for choice, score in scores.items()}


def find_layers(model: Any) -> tuple[Any, str]:
    """The module that holds the encoder's list of layers, and the list's name in it. Raises StepRejected."""
    import torch  # noqa: PLC0415

    encoder = model[0].auto_model
    for holder in encoder.modules():
        for name, child in holder.named_children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == encoder.config.num_hidden_layers:
                return holder, name
    raise StepRejected(f"a {encoder.config.model_type} model has no list of layers that distillation could choose from")


def _set_layers(model: Any, layers: Sequence[Any]) -> None:
    import torch  # noqa: PLC0415

    holder, name = find_layers(model)
    setattr(holder, name, torch.nn.ModuleList(layers))
    model[0].auto_model.config.num_hidden_layers = len(layers)


def write_student(start: Teacher, student: Any, layers: Layers, folder: Path) -> None:
    """The model folder of `start` with the student's weights and number of layers."""
    copy_model(start.folder, folder)
    place = transformer_folder(folder)
    before = json.loads((place / "config.json").read_text(encoding="utf-8"))
    key = next(key for key in _DEPTH_KEYS if key in before)
    student[0].auto_model.save_pretrained(place)
    (place / "config.json").write_text(json.dumps(before | {key: len(layers)}, indent=1) + "\n", encoding="utf-8")
