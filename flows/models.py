"""Models: what the steps of recipes make of the teacher. Recipes that begin alike share what they have in common."""

from collections.abc import Iterable

from prefect import Task

from flows.workers import run_each
from tasks.artifacts import Artifact
from tasks.distill import distill
from tasks.export import export_onnx
from tasks.models.teacher import Teacher, load_teacher
from tasks.prune import prune
from tasks.pruning.vocabulary import trim_vocabulary
from tasks.steps import Step
from tasks.variants import Variant

Steps = tuple[Step, ...]
_TASKS: dict[str, Task[..., Artifact]] = {"distill": distill, "prune": prune, "trim": trim_vocabulary}


def make_models(
    teacher: Teacher, variants: Iterable[Variant], corpus: Artifact
) -> tuple[dict[Steps, Teacher], dict[Steps, Artifact]]:
    """The model that each sequence of steps ends in, described as a teacher is, and its exported graph.

    All first steps are one sweep, then all second ones, and so on. Of no steps it is the teacher itself, whose graph
    comes first: what cannot be exported says so before anything is trained.
    """
    models: dict[Steps, Teacher] = {(): teacher}
    exported: dict[Steps, Artifact] = {(): export_onnx(teacher)}
    wanted = dict.fromkeys(variant.steps for variant in variants if variant.steps)
    for count in range(1, max(map(len, wanted), default=0) + 1):
        beginnings = dict.fromkeys(steps[:count] for steps in wanted if len(steps) >= count)
        made = run_each({b: (_TASKS[b[-1].kind], (models[b[:-1]], teacher, b[-1], corpus)) for b in beginnings})
        models |= {steps: load_teacher(str(model.folder), teacher.name) for steps, model in made.items()}
    exported |= run_each({steps: (export_onnx, (models[steps],)) for steps in wanted})
    return models, exported
