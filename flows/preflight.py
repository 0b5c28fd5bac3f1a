"""Preflight: every recipe held against the model, the corpus and the node before anything is trained.

Steps and builds refuse the same things themselves; a step that comes third would do so after hours.
"""

from collections.abc import Sequence

from flows.engines import check_engine
from tasks.artifacts import Artifact
from tasks.corpus import read_calibration
from tasks.distill import check_depth, read_depth
from tasks.distillation.teach import read_training_texts
from tasks.errors import StepRejected
from tasks.models.teacher import Teacher
from tasks.prune import require_prunable
from tasks.pruning.vocabulary import require_trimmable
from tasks.steps import DistillConfig, PruneConfig, Step, TrimConfig
from tasks.variants import KERNEL_VARIANTS, Variant


def check_recipes(teacher: Teacher, variants: Sequence[Variant], corpus: Artifact, calibration_size: int) -> None:
    """Raises StepRejected, CorpusRejected and EngineUnavailable for what would turn out to be impossible later."""
    for steps in dict.fromkeys(variant.steps for variant in variants):
        check_steps(teacher, steps, corpus)
    for variant in variants:
        if variant.build in KERNEL_VARIANTS:
            check_engine(variant, teacher)
    calibrated = next((variant for variant in variants if variant.is_calibrated), None)
    if calibrated:
        read_calibration(corpus, calibration_size, calibrated.name)


def check_steps(teacher: Teacher, steps: Sequence[Step], corpus: Artifact) -> None:
    """Raises StepRejected and CorpusRejected for steps that the model, the corpus, or a step before them rule out."""
    depth: int | None = None
    pieces: int | None = None
    is_pruned = False
    for step in steps:
        if isinstance(step, TrimConfig):
            pieces = require_trimmable(teacher, step, pieces)
            continue
        if pieces is not None:
            raise StepRejected(
                f"{step} comes after trimming, which leaves {teacher.name} another tokenizer than its "
                "teacher has: trim after the steps that train"
            )
        read_training_texts(corpus, step)
        if isinstance(step, DistillConfig):
            depth = check_depth(teacher.name, step, depth or read_depth(teacher))
        if isinstance(step, PruneConfig):
            read_calibration(corpus, step.calibration_size, f"{teacher.name}: {step}")
            if not is_pruned:  # what is left for another cut, only the first one tells
                require_prunable(teacher, step)
            is_pruned = True
