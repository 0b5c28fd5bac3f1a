"""Distil: a student with fewer layers of its teacher, the best ones to begin with, taught to embed as it does."""

import json
from collections.abc import Sequence
from itertools import combinations
from math import comb
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task

from serving.tokenizer import Ids
from tasks.artifacts import CACHED, Artifact, draft
from tasks.distillation.teach import num_held_out, require_same_tokenizer, teach, training_rows
from tasks.errors import StepRejected
from tasks.models.teacher import Teacher, load_sentence_transformer
from tasks.progress import progress
from tasks.steps import DistillConfig, copy_model, describe_step, transformer_folder, write_step

if TYPE_CHECKING:
    from tasks.distillation.layers import Layers

# Beyond this many choices of layers, each of which takes about a second to measure, they are dropped one at a time,
# the least missed first.
_MAX_CHOICES = 300
_NUM_READ_BACK, _READ_BACK_LIMIT = 16, 1e-4


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
        held_out = rows[-num_held_out(rows) :]
        kept, scores = choose_layers(student, teacher, config.depth, held_out)
        write_student(start, student, kept, held_out[:_NUM_READ_BACK], work.folder)
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
) -> tuple["Layers", dict[str, float]]:
    """The layers that embed most like the teacher before any training, and the cosine of each choice measured.

    The choice matters: of MiniLM's six, the layers 0, 2, 5 start out at another level than 3, 4, 5. `student` is left
    with the layers chosen. Raises StepRejected where no choice fits the architecture.
    """
    from tasks.distillation.layers import LayerList  # noqa: PLC0415  a cached run need not load torch
    from tasks.distillation.training import embed_rows  # noqa: PLC0415

    found = LayerList(student)
    expected = embed_rows(load_sentence_transformer(teacher.folder), held_out)
    scores: dict[Layers, float] = {}

    def measure(choice: "Layers") -> float:
        found.take(choice)
        scores[choice] = float((embed_rows(student, held_out) * expected).sum(axis=1).mean())
        return scores[choice]

    kept = tuple(range(len(found.layers)))
    step = len(kept) - depth if comb(len(kept), depth) <= _MAX_CHOICES else 1
    with progress("choose layers", len(kept) - depth) as advance:
        while len(kept) > depth:
            choices = [choice for choice in combinations(kept, len(kept) - step) if found.fits(choice)]
            if not choices:
                raise StepRejected(f"no {len(kept) - step} layers of {teacher.name} are built like its first ones")
            kept = max(choices, key=measure)
            advance(step)
    found.take(kept)
    return kept, {" ".join(map(str, choice)): round(score, 6) for choice, score in scores.items()}


def write_student(start: Teacher, student: Any, layers: "Layers", rows: Sequence[Ids], folder: Path) -> None:
    """The model folder of `start` with the weights of `student`, which was left with `layers`, and their settings.

    Raises StepRejected where the model that is read back embeds `rows` otherwise.
    """
    from tasks.distillation.layers import list_settings  # noqa: PLC0415  a cached run need not load torch
    from tasks.distillation.training import embed_rows  # noqa: PLC0415

    copy_model(start.folder, folder)
    place = transformer_folder(folder)
    config = student[0].auto_model.config
    before = json.loads((place / "config.json").read_text(encoding="utf-8"))
    key = next(key for key in _DEPTH_KEYS if key in before)
    student[0].auto_model.save_pretrained(place)
    fields = before | {key: len(layers)} | list_settings(config, len(layers))
    (place / "config.json").write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    error = abs(embed_rows(load_sentence_transformer(folder), rows) - embed_rows(student, rows)).max()
    if not error <= _READ_BACK_LIMIT:
        raise StepRejected(
            f"layers {' '.join(map(str, layers))} of {start.name}, a model of type {config.model_type!r}, embed "
            f"otherwise once they are read back: off by {error:.1e}, limit {_READ_BACK_LIMIT:.0e}"
        )
