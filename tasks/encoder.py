"""The cuda engine's files from a teacher: float16 weights, configuration, and calibration for E4M3."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from prefect import task
from safetensors.torch import load_file, save_file

from registry.manifest import EngineEntry, hash_file
from serving.engines.bert import AMAX_NAME, CONFIG_NAME, LINEARS, Packed, encode, load_weights, read_config
from serving.tokenizer import TOKENIZER_NAME, Ids, TextTokenizer
from tasks.artifacts import CACHED, Artifact, draft
from tasks.corpus import read_part
from tasks.errors import QuantizationFailed
from tasks.models.teacher import Teacher
from tasks.quantize import Candidate
from tasks.variants import Variant

ENCODER_NAME = "model.safetensors"


@task(task_run_name="encoder-{variant.name}", cache_policy=CACHED, persist_result=True, result_serializer="json")
def build_encoder(variant: Variant, teacher: Teacher, corpus: Artifact, calibration_size: int) -> Candidate:
    """A variant of the cuda engine from the teacher's weights. Raises QuantizationFailed and EngineUnavailable."""
    texts = read_part(corpus, "calibration")[:calibration_size] if variant.is_calibrated else []
    if variant.is_calibrated and len(texts) < calibration_size:
        raise QuantizationFailed(
            f"{variant.name} asks for {calibration_size} calibration texts, the corpus has {len(texts)}: "
            "set calibration_size lower or give a larger corpus"
        )
    tokenizer = TextTokenizer.from_folder(teacher.tokenizer.parent, teacher.max_seq_length)
    with draft(variant.name) as work:
        (work.folder / TOKENIZER_NAME).write_bytes(teacher.tokenizer.read_bytes())
        path = write_encoder(teacher, work.folder, tokenizer.encode(texts) if texts else ())
        entry = hash_file(path)
        disk_bytes = sum(file.stat().st_size for file in work.folder.iterdir())
    return Candidate(
        variant=variant,
        artifact=work.artifact,
        engine=EngineEntry(
            runtime="cuda", file=ENCODER_NAME, sha256=entry.sha256, size=entry.size, compute=variant.compute
        ),
        max_seq_length=teacher.max_seq_length,
        calibration_size=len(texts),
        calibration_digest=corpus.digest if texts else None,
        disk_bytes=disk_bytes,
    )


def write_encoder(teacher: Teacher, folder: Path, calibration: Sequence[Ids] = ()) -> Path:
    """Write `model.safetensors` (float16) and `config.json` into `folder`; returns the former's path.

    With `calibration` texts (token ids) the file also holds the largest input each linear layer saw, which `f8`
    needs. Raises EngineUnavailable for an architecture or a weight that the cuda engine cannot honour.
    """
    source = teacher.tokenizer.parent
    fields = json.loads((source / CONFIG_NAME).read_text(encoding="utf-8"))
    fields |= {"pooling": teacher.pooling, "normalize": teacher.normalize}
    folder.mkdir(parents=True, exist_ok=True)
    config_path = folder / CONFIG_NAME
    config_path.write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    config = read_config(config_path)
    weights = load_weights(source / ENCODER_NAME, config)
    tensors = {
        name: value.half() for name, value in load_file(source / ENCODER_NAME).items() if value.is_floating_point()
    }
    if len(calibration):
        amax = torch.zeros(config.layers, LINEARS)
        for row in calibration:
            encode(weights, config, Packed.of_rows([row]), amax)
        tensors[AMAX_NAME] = amax
    path = folder / ENCODER_NAME
    save_file(tensors, path)
    return path
