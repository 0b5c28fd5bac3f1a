"""A tiny BERT of the sizes the kernels know, as files of the cuda engine."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from serving.engines.bert import (
    E4M3_NAME,
    E4M3_VERSION,
    BertConfig,
    Layer,
    Weights,
    load_weights,
    read_config,
)
from serving.engines.e4m3 import calibrate
from tests.serving.kernels.packs import TOKENS, make_packed

POSITIONS = 128


def make_encoder(
    folder: Path, hidden: int = 128, heads: int = 4, intermediate: int = 256, layers: int = 2,
    float16: Sequence[str] | None = (),
) -> Path:  # fmt: skip
    """Write model.safetensors and config.json of random weights, calibrated; returns the former's path.

    `float16` names the linear layers that E4M3 leaves alone; the files do without where it is None.
    """
    from transformers import BertConfig as Sizes
    from transformers import BertModel

    sizes = Sizes(
        vocab_size=TOKENS,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=POSITIONS,
        initializer_range=0.1,
    )
    torch.manual_seed(1)
    model = BertModel(sizes, add_pooling_layer=False)
    folder.mkdir(parents=True, exist_ok=True)
    fields = sizes.to_dict() | {"pooling": "mean", "normalize": True}
    if float16 is not None:
        fields[E4M3_NAME] = {"schema_version": E4M3_VERSION, "float16": list(float16)}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    path, tensors = folder / "model.safetensors", dict(model.state_dict())
    for name in tensors:  # which are 1 and 0 in a new model
        if "LayerNorm" in name:
            tensors[name] = torch.randn(hidden) * 0.2 + (1.0 if name.endswith("weight") else 0.0)
    save_file(tensors, path)
    config, weights = read_model(path)
    save_file(tensors | calibrate(weights, config, [make_packed([60, 60], torch.device("cpu"))]), path)
    return path


def read_model(path: Path) -> tuple[BertConfig, Weights]:
    config = read_config(path.with_name("config.json"))
    return config, load_weights(path, config)


def poison(layer: Layer, linear: int) -> Layer:
    """A layer that answers with NaN where the input of one of its linear layers is quantised by calibration."""
    assert layer.amax is not None
    amax = layer.amax.clone()
    amax[linear] = float("nan")
    return replace(layer, amax=amax)
