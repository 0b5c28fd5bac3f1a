"""Training: a student taught to embed as its teacher does, by sentence-transformers' trainer.

A job is a folder that holds all a training run needs (`prepare`), so that `python -m torch.distributed.run -m
tasks.distillation.training FOLDER` runs the same job on several GPUs, and a job that was killed goes on from its last
checkpoint.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.sampler import DefaultBatchSampler
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from serving.tokenizer import Ids, pad_batch
from tasks.errors import TrainingFailed
from tasks.measurement.hardware import cpu_flags
from tasks.models.teacher import load_sentence_transformer
from tasks.models.weights import is_of_a_layer
from tasks.progress import Advance, progress
from tasks.steps import Training

_JOB, _TOKENS, _RESULT = "job.json", "tokens.npz", "result.json"
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
_NUM_POINTS = 20
_WARMUP_STEPS, _WARMUP_SHARE = 100, 0.05  # whichever is shorter
_TEMPERATURE = 0.05
_SORTED_BATCHES = 50  # batches whose texts are sorted by length together


class Point(BaseModel):
    """One point of the loss curve."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    loss: float
    held_out_cosine: float


class Job(BaseModel):
    """What `job.json` says; the token ids lie beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    student: Path
    teacher: Path
    training: Training
    num_held_out: int
    max_steps: int


class Trained(BaseModel):
    """What a finished job tells of itself: `seconds` of all its processes, killed ones up to their last checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_steps: int
    num_texts: int
    seconds: float
    curve: tuple[Point, ...]


def prepare(folder: Path, job: Job, rows: Sequence[Ids]) -> None:
    """Write the job and the token ids of its texts; the last `num_held_out` are only measured on."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    np.savez(folder / _TOKENS, ids=np.concatenate(rows).astype(np.int32), lengths=lengths)
    (folder / _JOB).write_text(job.model_dump_json(indent=1) + "\n", encoding="utf-8")


def run_job(folder: Path) -> Trained:
    """Train, or go on training, the job in `folder`; the trained weights replace those of the student's folder.

    Raises TrainingFailed when the loss is no longer a number.
    """
    job = Job.model_validate_json((folder / _JOB).read_text(encoding="utf-8"))
    rows = _read_rows(folder)
    training, held_out = rows[: -job.num_held_out], rows[-job.num_held_out :]
    student, teacher = load_sentence_transformer(job.student), load_sentence_transformer(job.teacher)
    _prepare_student(student)
    with progress(f"train {job.max_steps} steps", job.max_steps) as advance:
        clock = Clock(job, advance)
        trainer = _Trainer(
            model=student,
            args=_arguments(folder, job),
            train_dataset=Dataset.from_dict({"label": range(len(training))}),
            loss=TeachingLoss(student, teacher.requires_grad_(False), job.training),
            data_collator=_Collator(training),
            evaluator=HeldOut(held_out, teacher),
            callbacks=[clock],
        )
        trainer.clock, trainer.lengths = clock, np.array([len(row) for row in training])
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    result = _result(trainer, clock, len(training))
    if not result.num_steps:
        raise TrainingFailed(
            f"no step was made: {len(training)} texts do not fill a batch of {job.training.batch_size} on every process"
        )
    if trainer.is_world_process_zero():
        student.to("cpu")[0].auto_model.save_pretrained(folder / "trained")
        (folder / _RESULT).write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return result


class TeachingLoss(torch.nn.Module):
    """How far the student's embeddings and token states are from those the teacher has for the same tokens.

    The teacher runs beside the student: its token states are 25 times as many targets as its embeddings and too many
    to keep.
    """

    def __init__(self, model: SentenceTransformer, teacher: SentenceTransformer, training: Training) -> None:
        """`model` is the student; the trainer puts a wrapped one in its place."""
        super().__init__()
        self.model, self.teacher, self.training_config = model, teacher, training

    def forward(self, features: list[dict[str, Any]], labels: Any) -> dict[str, Any]:
        """The weighted losses by name, of one batch."""
        config = self.training_config
        with torch.no_grad():
            right = self.teacher.eval()(dict(features[0]))
        own = self.model(dict(features[0]))
        student, teacher = _unit(own["sentence_embedding"]), _unit(right["sentence_embedding"])
        losses = {"embedding": (1 - (student * teacher).sum(dim=1)).mean()}
        if config.hidden_weight:
            mask = features[0]["attention_mask"].bool()
            states, targets = own["token_embeddings"][mask].float(), right["token_embeddings"][mask].float()
            losses["hidden"] = config.hidden_weight * (states - targets).square().mean() / targets.var()
        if config.contrastive_weight:
            places = torch.arange(len(student), device=student.device)
            scores = student @ teacher.T / _TEMPERATURE
            losses["contrastive"] = config.contrastive_weight * torch.nn.functional.cross_entropy(scores, places)
        return losses


def _unit(embeddings: Any) -> Any:
    return torch.nn.functional.normalize(embeddings.float(), dim=1)


class Clock(TrainerCallback, ExportableState):
    """The budget: how much of it is spent, in steps or in time, whichever is further, through kills as well."""

    def __init__(self, job: Job, advance: Advance) -> None:
        """The clock starts with the training, not with the loading before it."""
        self.job, self.advance = job, advance
        self.spent, self.started, self.step = 0.0, time.monotonic(), 0

    @property
    def seconds(self) -> float:
        """Of this process and, up to their last checkpoint, of those before it."""
        return self.spent + time.monotonic() - self.started

    def share(self, step: int) -> float:
        """Of the budget, 0 to 1: by steps alone, unless time runs out first, so that runs within it are alike."""
        steps, time_ = step / self.job.max_steps, self.seconds / (60 * self.job.training.max_minutes)
        return min(1.0, steps if time_ < _WARMUP_SHARE else max(steps, time_))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"spent": self.seconds}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the time that was spent before a kill."""
        saved = state.stateful_callbacks.get("Clock") if state.global_step else None
        self.spent = saved["attributes"]["spent"] if isinstance(saved, dict) else 0.0
        self.started = time.monotonic()
        self.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop when the budget is spent."""
        self.advance(1)
        control.should_training_stop |= self.share(state.global_step) >= 1

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Raises TrainingFailed for a loss that is no number."""
        if not math.isfinite(logs.get("loss", 0.0)):
            raise TrainingFailed(f"the loss is {logs['loss']} at step {state.global_step}: lower the learning rate")


class _Trainer(SentenceTransformerTrainer):
    """Warm-up and then a linear fall to zero, over the share of the budget that is spent; batches of like length."""

    clock: Clock
    lengths: NDArray[np.int64]

    def get_batch_sampler(self, dataset: Any, *args: Any, **options: Any) -> DefaultBatchSampler:
        """As the trainer asks for it: anything may be asked in an order of its own."""
        return _LengthGrouped(self.lengths, dataset, *args, **options)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """None: it would embed examples and write a page that nobody reads."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Ours, not one by the number of steps."""
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, self._factor)
        return self.lr_scheduler

    def _factor(self, step: int) -> float:
        warmup = min(_WARMUP_STEPS, _WARMUP_SHARE * self.clock.job.max_steps)
        return min((step + 1) / max(warmup, 1), 1 - self.clock.share(step))


class _LengthGrouped(DefaultBatchSampler):
    """Batches of texts of like length, in an order that depends on the seed and the epoch alone."""

    epoch = 0

    def __init__(self, lengths: NDArray[np.int64], *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.lengths = lengths

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.lengths))
        chunk = _SORTED_BATCHES * self.batch_size
        batches = []
        for start in range(0, len(order), chunk):
            part = order[start : start + chunk]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            batches += [part[first : first + self.batch_size] for first in range(0, len(part), self.batch_size)]
        # The last batch of an epoch may be shorter, as everywhere; dropped where several devices want equal ones.
        whole = [batch for batch in batches if len(batch) == self.batch_size or not self.drop_last]
        for index in rng.permutation(len(whole)):
            yield whole[index].tolist()


class _Collator:
    """Places in the list of texts to padded tokens, as the trainer wants them named."""

    valid_label_columns = ("label",)

    def __init__(self, rows: Sequence[Ids]) -> None:
        self.rows = rows

    def __call__(self, places: list[dict[str, int]]) -> dict[str, Any]:
        labels = [place["label"] for place in places]
        ids, mask = pad_batch([self.rows[label] for label in labels])
        return {
            "text_input_ids": torch.from_numpy(ids),
            "text_attention_mask": torch.from_numpy(mask),
            "label": torch.tensor(labels),
        }


class HeldOut(BaseEvaluator):
    """Mean cosine of student and teacher on texts that training does not see."""

    def __init__(self, rows: Sequence[Ids], teacher: SentenceTransformer) -> None:
        """The teacher's embeddings are computed at the first call."""
        super().__init__()
        self.rows, self.teacher = rows, teacher
        self.expected: Any = None

    def __call__(self, model: SentenceTransformer, *args: Any, **options: Any) -> dict[str, float]:
        """`held_out_cosine` of `model`."""
        if self.expected is None:
            self.expected = embed_rows(self.teacher, self.rows)
        return {"held_out_cosine": float((embed_rows(model, self.rows) * self.expected).sum(axis=1).mean())}


def embed_rows(model: SentenceTransformer, rows: Sequence[Ids]) -> NDArray[np.float32]:
    """Unit embeddings of token ids, on the model's own device."""
    was_training = model.training
    model.eval()
    order = np.argsort([len(row) for row in rows], kind="stable")
    parts = []
    with torch.inference_mode():
        for start in range(0, len(order), 64):
            ids, mask = pad_batch([rows[place] for place in order[start : start + 64]])
            features = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
            on_device = {name: value.to(model.device) for name, value in features.items()}
            parts.append(_unit(model(on_device)["sentence_embedding"]).cpu().numpy())
    model.train(was_training)
    embeddings = np.empty((len(rows), parts[0].shape[1]), dtype=np.float32)
    embeddings[order] = np.concatenate(parts)
    return embeddings


def _prepare_student(student: SentenceTransformer) -> None:
    """Only layers learn: words that the corpus lacks keep their place among those it has. Nothing is dropped out."""
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(is_of_a_layer(name))
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def _arguments(folder: Path, job: Job) -> SentenceTransformerTrainingArguments:
    has_gpu = torch.cuda.is_available()
    training, every = job.training, max(1, job.max_steps // _NUM_POINTS)
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's; the group itself is formed by these arguments
    return SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=job.max_steps,
        per_device_train_batch_size=max(1, training.batch_size // processes),
        learning_rate=training.learning_rate,
        weight_decay=0.01,
        optim="adamw_torch_fused",
        bf16=torch.cuda.is_bf16_supported() if has_gpu else bool(_BF16_FLAGS & set(cpu_flags())),
        use_cpu=not has_gpu,
        ddp_backend="gloo" if processes > 1 and not has_gpu else None,
        seed=training.seed,
        dataloader_num_workers=2 if has_gpu else 0,
        dataloader_drop_last=processes > 1,
        eval_strategy="steps",
        eval_steps=every,
        logging_steps=every,
        logging_nan_inf_filter=False,
        save_steps=every,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end: the trainer's state comes last."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _read_rows(folder: Path) -> list[Ids]:
    with np.load(folder / _TOKENS, allow_pickle=False) as tokens:
        ids, lengths = tokens["ids"].astype(np.int64), tokens["lengths"]
    return np.split(ids, np.cumsum(lengths)[:-1])


def _result(trainer: Any, clock: Clock, num_texts: int) -> Trained:
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    cosines = {e["step"]: e["eval_held_out_cosine"] for e in trainer.state.log_history if "eval_held_out_cosine" in e}
    return Trained(
        num_steps=trainer.state.global_step,
        num_texts=num_texts,
        seconds=clock.seconds,
        curve=tuple(
            Point(step=step, loss=losses[step], held_out_cosine=cosines[step])
            for step in sorted(losses.keys() & cosines.keys())
        ),
    )


if __name__ == "__main__":
    run_job(Path(sys.argv[1]))
