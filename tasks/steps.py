"""Model-level steps of a recipe: what may be done to the model before it is exported, and the record each leaves.

A step is a frozen config here, told apart by `kind`, and a task of that name in a module of its own:
`task(start: Teacher, teacher: Teacher, config, corpus: Artifact) -> Artifact`. It writes a whole model folder of
sentence-transformers (`copy_model`, the weights, `write_step`): `load_teacher` on it describes the next start.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.models.weights import count_parameters

if TYPE_CHECKING:  # what imports this for the recipes' names alone need not pay for Prefect
    from tasks.artifacts import Artifact
    from tasks.models.teacher import Teacher

STEP_NAME = "step.json"
_COPIED = ("*.json", "*.txt", "*.model")
_LEFT_OUT = {"model.safetensors.index.json", STEP_NAME}


class Training(BaseModel):
    """How a student is taught by its teacher: what every step that trains has in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_texts: int | None = Field(
        default=None, ge=1, description="texts of the distillation part to train on; by default all of it"
    )
    epochs: float = Field(default=4.0, gt=0, allow_inf_nan=False, description="how often each text is met")
    max_minutes: float = Field(
        default=28.0,
        gt=0,
        allow_inf_nan=False,
        description="wall-clock budget: the learning rate has fallen to zero when it is spent",
    )
    batch_size: int = Field(default=64, ge=2, description="texts a step, on all devices together")
    learning_rate: float = Field(default=7e-4, gt=0, allow_inf_nan=False, description="at its peak, after the warm-up")
    joined_share: float = Field(
        default=0.1, ge=0, lt=1, description="long texts, made of neighbouring ones, added as this share of all texts"
    )
    hidden_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="weight of the token states' loss")
    contrastive_weight: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="weight of telling a text from others in a batch"
    )
    seed: int = Field(default=0, ge=0, description="of the order of texts")


class DistillConfig(Training):
    """A student with fewer layers, taught to embed as the teacher does."""

    kind: Literal["distill"] = Field(default="distill", description="what tells steps apart")
    depth: int = Field(ge=1, description="layers of the student")

    def __str__(self) -> str:
        return f"distill to {self.depth} layers"


class PruneConfig(Training):
    """The same depth with fewer heads and feed-forward neurons, then taught what the cut took."""

    kind: Literal["prune"] = "prune"
    ratio: float = Field(ge=0, lt=1, description="share of the layers' parameters to remove")
    calibration_size: int = Field(default=1000, ge=1, description="calibration texts that importance is measured on")
    embedding_ratio: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the word embeddings' rank to remove, before they are widened again",
    )
    epochs: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="how often each text is met")
    max_minutes: float = Field(default=10.0, gt=0, allow_inf_nan=False, description="wall-clock budget of the teaching")

    def __str__(self) -> str:
        return (
            f"prune {100 * self.ratio:g} % of the layers and {100 * self.embedding_ratio:g} % of the embeddings' rank"
        )


class TrimConfig(BaseModel):
    """A smaller vocabulary, without the pieces that the corpus uses least."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["trim"] = "trim"
    ratio: float = Field(
        ge=0, lt=1, description="share of the word pieces to remove; special tokens and single characters always stay"
    )

    def __str__(self) -> str:
        return f"trim {100 * self.ratio:g} % of the vocabulary"


Step = Annotated[DistillConfig | PruneConfig | TrimConfig, Field(discriminator="kind")]


class StepRecord(BaseModel):
    """What `step.json` says: what was done to which model, and what came out. No times: equal work, equal digest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: Step
    start: str = Field(description="digest of the model the step began with")
    teacher: str = Field(description="digest of the original teacher")
    corpus: str = Field(description="digest of the corpus artifact")
    num_parameters: int
    num_encoder_parameters: int
    start_parameters: int
    start_encoder_parameters: int
    details: dict[str, Any] = Field(description="what only this kind of step knows: its choices and its curves")
    before: "StepRecord | None" = Field(default=None, description="the record of the step that made what it began with")


def describe_step(
    folder: Path, config: Step, start: "Teacher", teacher: "Teacher", corpus: "Artifact", details: dict[str, Any]
) -> StepRecord:
    """The record of a step that turned `start` into the model now in `folder`."""
    counts = count_parameters(transformer_folder(folder) / "model.safetensors")
    return StepRecord(
        config=config,
        start=start.digest,
        teacher=teacher.digest,
        corpus=corpus.digest,
        num_parameters=counts.everything,
        num_encoder_parameters=counts.encoder,
        start_parameters=start.num_parameters,
        start_encoder_parameters=start.num_encoder_parameters,
        details=details,
        before=read_step(start.folder),
    )


def transformer_folder(folder: Path) -> Path:
    """Where the Transformer module of a model folder lies: weights, configuration, tokenizer."""
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    return folder / str(modules[0]["path"])


def copy_model(source: Path, target: Path) -> None:
    """Copy a model folder without its weights: modules, configuration, tokenizer."""
    for pattern in _COPIED:
        for path in sorted(source.rglob(pattern)):
            if path.name not in _LEFT_OUT and ".cache" not in path.parts:
                place = target / path.relative_to(source)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, place)


def write_step(folder: Path, record: StepRecord) -> None:
    """Write the record beside the model."""
    (folder / STEP_NAME).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_step(folder: Path) -> StepRecord | None:
    """The record of the step that made the model in `folder`, or None where no step of ours made it."""
    path = folder / STEP_NAME
    return StepRecord.model_validate(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
