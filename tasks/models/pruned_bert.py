"""A BERT whose layers differ in heads and feed-forward width: transformers' own, built to the shapes of its config.

Its table of word embeddings may be the product of a narrow table and a matrix.
"""

from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, BertConfig, BertModel

MODEL_TYPE = "pruned_bert"


class PrunedBertConfig(BertConfig):
    """BertConfig, and how many heads and feed-forward neurons each layer kept; a head is as wide as before pruning."""

    model_type = MODEL_TYPE
    layer_heads: list[int] | None = None
    layer_widths: list[int] | None = None
    embedding_rank: int | None = None


class FactorisedEmbedding(nn.Module):
    """Word embeddings of rank `rank`: a table of narrow rows, and the linear map that widens them."""

    def __init__(self, num_pieces: int, rank: int, width: int, padding: int | None) -> None:
        super().__init__()
        self.table = nn.Embedding(num_pieces, rank, padding_idx=padding)
        self.widen = nn.Linear(rank, width)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [B, T] to vectors [B, T, H]."""
        return self.widen(self.table(ids))


class PrunedBertModel(BertModel):
    """BertModel with the layers of a PrunedBertConfig."""

    config_class = PrunedBertConfig

    def __init__(self, config: PrunedBertConfig, **kwargs: Any) -> None:
        # The pooler belongs to pre-training: no pooling that the export knows reads it.
        super().__init__(config, **(kwargs | {"add_pooling_layer": False}))
        heads, widths = config.layer_heads, config.layer_widths
        if not (heads and widths and len(heads) == len(widths) == config.num_hidden_layers):
            raise ValueError(
                f"layer_heads {heads} and layer_widths {widths} do not name one number for each of "
                f"{config.num_hidden_layers} layers"
            )
        for layer, num_heads, width in zip(self.encoder.layer, heads, widths, strict=True):
            _resize(layer, num_heads, width, config.hidden_size)
        if config.embedding_rank:
            self.embeddings.word_embeddings = FactorisedEmbedding(
                config.vocab_size, config.embedding_rank, config.hidden_size, config.pad_token_id
            )


def _resize(layer: Any, num_heads: int, width: int, hidden: int) -> None:
    attention = layer.attention.self
    attention.num_attention_heads = num_heads
    attention.all_head_size = inner = num_heads * attention.attention_head_size
    for name in ("query", "key", "value"):
        setattr(attention, name, nn.Linear(hidden, inner))
    layer.attention.output.dense = nn.Linear(inner, hidden)
    layer.intermediate.dense = nn.Linear(hidden, width)
    layer.output.dense = nn.Linear(width, hidden)


@cache
def register_pruned_bert() -> None:
    """Let transformers' Auto classes load such models: they are code of ours, not of the model."""
    AutoConfig.register(MODEL_TYPE, PrunedBertConfig)
    AutoModel.register(PrunedBertConfig, PrunedBertModel)
