"""A tiny BERT of the sizes the kernels know, as files of the cuda engine."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from serving.engines.bert import AMAX_NAME, BertConfig, Weights, encode, load_weights, read_config
from tests.serving.kernels.packs import TOKENS, make_packed

POSITIONS = 128


def make_encoder(folder: Path, hidden: int = 128, heads: int = 4, intermediate: int = 256, layers: int = 2) -> Path:
    """Write model.safetensors and config.json of random weights, calibrated; returns the former's path."""
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
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    path, tensors = folder / "model.safetensors", dict(model.state_dict())
    save_file(tensors, path)
    config, weights = read_model(path)
    amax = torch.zeros(layers, 4)
    encode(weights, config, make_packed([60, 60], torch.device("cpu")), amax)
    save_file(tensors | {AMAX_NAME: amax}, path)
    return path


def read_model(path: Path) -> tuple[BertConfig, Weights]:
    config = read_config(path.with_name("config.json"))
    return config, load_weights(path, config)
