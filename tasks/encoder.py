"""The cuda engine's files from a teacher: float16 weights, configuration, and calibration for E4M3."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from serving.engines.bert import AMAX_NAME, CONFIG_NAME, LINEARS, Packed, encode, load_weights, read_config
from serving.tokenizer import Ids
from tasks.teacher import Teacher

ENCODER_NAME = "model.safetensors"


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
