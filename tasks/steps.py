"""Model-level steps of a recipe: what may be done to the model before it is exported, and the record each leaves.

A step is a frozen config here, told apart by `kind`, and a task of that name in a module of its own:
`task(start: Teacher, teacher: Teacher, config, corpus: Artifact) -> Artifact`. It writes a whole model folder of
sentence-transformers (`copy_model`, the weights, `write_step`): `load_teacher` on it describes the next start.
"""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

STEP_NAME = "step.json"
_COPIED = ("*.json", "*.txt", "*.model")
_LEFT_OUT = {"model.safetensors.index.json", STEP_NAME}


class DistillConfig(BaseModel):
    """A student with fewer layers, taught to embed as the teacher does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["distill"] = "distill"
    depth: int = Field(ge=1, description="layers of the student")

    def __str__(self) -> str:
        return f"distill to {self.depth} layers"


# More kinds make this a union: Annotated[DistillConfig | PruneConfig, Field(discriminator="kind")].
Step = DistillConfig


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
