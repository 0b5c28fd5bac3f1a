"""Teach: everything about training a model of a step but the training itself: texts, jobs, processes, resuming."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from registry.manifest import hash_file, list_files, payload_checksum
from serving.tokenizer import Ids, TextTokenizer
from tasks.artifacts import Artifact
from tasks.corpus import read_part
from tasks.errors import StepRejected, TrainingFailed
from tasks.models.teacher import Teacher
from tasks.state import state_dir
from tasks.steps import Training, transformer_folder

if TYPE_CHECKING:
    from tasks.distillation.training import Trained

_NUM_HELD_OUT = 256
_MAX_HELD_OUT_SHARE = 0.1
_MAX_JOINED = 8
_RESULT = "result.json"


def training_rows(start: Teacher, corpus: Artifact, training: Training) -> list[Ids]:
    """Token ids of the distillation texts that are asked for, after those of long ones made of neighbours.

    The last `num_held_out` are to measure on: texts as they came, and no part of a long one. Raises StepRejected where
    the corpus has too few.
    """
    texts = read_training_texts(corpus, training)
    num_rows = len(texts) + _num_joined(texts, training.joined_share)
    joined = join_neighbours(texts, training.joined_share, num_held_out(range(num_rows)))
    tokenizer = TextTokenizer.from_folder(start.tokenizer.parent, start.max_seq_length)
    return tokenizer.encode([*joined, *texts])


def read_training_texts(corpus: Artifact, training: Training) -> list[str]:
    """The distillation texts that are asked for. Raises StepRejected where the corpus has too few."""
    texts = read_part(corpus, "distillation")
    wanted = training.num_texts or len(texts)
    if wanted > len(texts):
        raise StepRejected(
            f"{wanted} texts to train on were asked for, the corpus has {len(texts)}: "
            "lower num_texts or give a larger corpus"
        )
    return texts[:wanted]


def require_same_tokenizer(start: Teacher, teacher: Teacher) -> None:
    """Raises StepRejected where the two split texts differently: a student is taught token by token."""
    if start.tokenizer.read_bytes() != teacher.tokenizer.read_bytes():
        raise StepRejected(
            f"{start.name} has another tokenizer than its teacher {teacher.name}: trim after the steps that train"
        )


def join_neighbours(texts: Sequence[str], share: float, num_left_out: int = 0) -> list[str]:
    """Texts of 2 to 8 neighbours, as many as are `share` of all texts then: a corpus of sentences teaches no length.

    The last `num_left_out` are in none of them.
    """
    joined, place, count = [], 0, max(1, len(texts) - num_left_out)
    for index in range(_num_joined(texts, share)):
        size = 2 + index % (_MAX_JOINED - 1)
        joined.append(" ".join(texts[(place + offset) % count] for offset in range(size)))
        place += size
    return joined


def _num_joined(texts: Sequence[str], share: float) -> int:
    return int(len(texts) * share / (1 - share))


def num_held_out(rows: Sequence[object]) -> int:
    """How many rows at the end are measured on instead of trained on."""
    return max(1, min(_NUM_HELD_OUT, int(len(rows) * _MAX_HELD_OUT_SHARE)))


def teach(folder: Path, teacher: Teacher, rows: Sequence[Ids], training: Training) -> "Trained":
    """Train the model in `folder` on `rows`, on every GPU there is; a job of the same inputs that was killed goes on.

    Raises TrainingFailed.
    """
    from tasks.distillation.training import Trained, run_job  # noqa: PLC0415  a cached run need not load torch

    work = _make_job(folder, teacher, rows, training)
    processes = num_gpus()
    if processes > 1:
        run_distributed(work, processes)
        trained = Trained.model_validate_json((work / _RESULT).read_text(encoding="utf-8"))
    else:
        trained = run_job(work)
    weights = transformer_folder(folder) / "model.safetensors"
    shutil.copyfile(work / "trained" / weights.name, weights)
    shutil.rmtree(work)
    return trained


def run_distributed(work: Path, processes: int) -> None:
    """Run the job in `work` in `processes` processes, one a GPU. Raises TrainingFailed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    # The checkout, not the working folder, is where `tasks` lies.
    checkout = Path(__file__).parents[2]
    done = subprocess.run([*command, "-m", "tasks.distillation.training", str(work)], cwd=checkout, check=False)
    if done.returncode:
        raise TrainingFailed(
            f"training on {processes} GPUs ended with status {done.returncode}: run again, it goes on where it was"
        )


def num_gpus() -> int:
    """NVIDIA GPUs that this process may use."""
    import torch  # noqa: PLC0415

    return torch.cuda.device_count()


def _make_job(folder: Path, teacher: Teacher, rows: Sequence[Ids], training: Training) -> Path:
    """The job's folder, named by all that goes into it, so that the same job finds the checkpoints it left."""
    from tasks.distillation.training import Job, prepare  # noqa: PLC0415

    key = hashlib.sha256(payload_checksum({name: hash_file(folder / name) for name in list_files(folder)}).encode())
    key.update(f"{teacher.digest} {training.model_dump_json()}".encode())
    key.update(np.concatenate(rows).tobytes())
    work = state_dir() / "training" / key.hexdigest()[:16]
    if not (work / "job.json").is_file():
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder, work / "student")
        held_out = num_held_out(rows)
        job = Job(
            student=work / "student",
            teacher=teacher.folder,
            training=training,
            num_held_out=held_out,
            max_steps=max(1, round((len(rows) - held_out) * training.epochs / training.batch_size)),
        )
        prepare(work, job, rows)
    return work
