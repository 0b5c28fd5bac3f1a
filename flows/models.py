"""Models: what the steps of recipes make of the teacher. Recipes that begin alike share what they have in common."""

from collections.abc import Callable, Iterable
from typing import Any

from tasks.artifacts import Artifact
from tasks.distill import check_depth, distill, read_depth
from tasks.models.teacher import Teacher, load_teacher
from tasks.prune import prune, require_known
from tasks.pruning.vocabulary import trim_vocabulary
from tasks.steps import DistillConfig, PruneConfig, Step
from tasks.variants import Variant

Steps = tuple[Step, ...]
_TASKS: dict[str, Callable[[Teacher, Teacher, Any, Artifact], Artifact]] = {
    "distill": distill,
    "prune": prune,
    "trim": trim_vocabulary,
}


def make_models(teacher: Teacher, variants: Iterable[Variant], corpus: Artifact) -> dict[Steps, Teacher]:
    """The model that each sequence of steps ends in, described as a teacher is; of no steps, the teacher itself."""
    models: dict[Steps, Teacher] = {(): teacher}
    wanted = dict.fromkeys(variant.steps for variant in variants)
    for steps in wanted:
        check_steps(teacher, steps)
    for steps in wanted:
        for count in range(1, len(steps) + 1):
            if steps[:count] not in models:
                start, step = models[steps[: count - 1]], steps[count - 1]
                made = _TASKS[step.kind](start, teacher, step, corpus)
                models[steps[:count]] = load_teacher(str(made.folder), teacher.name)
    return {steps: models[steps] for steps in wanted}


def check_steps(teacher: Teacher, steps: Steps) -> None:
    """Raises StepRejected for what can be told to be impossible before hours are spent on the steps before it."""
    depth = read_depth(teacher) if steps else 0
    for step in steps:
        if isinstance(step, DistillConfig):
            depth = check_depth(teacher.name, step, depth)
        if isinstance(step, PruneConfig):
            require_known(teacher)
