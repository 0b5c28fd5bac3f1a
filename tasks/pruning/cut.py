"""Cut: a copy of a BERT without some heads and neurons, and with word embeddings of a lower rank."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from tasks.models.pruned_bert import PrunedBertConfig, PrunedBertModel
from tasks.pruning.importance import Kind, Removal, Removals, output_projections

# Modules of a layer whose rows make the columns of an output projection.
_FEEDING: dict[Kind, tuple[str, ...]] = {
    "heads": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "neurons": ("intermediate.dense",),
}
_OUTPUT: dict[Kind, str] = {"heads": "attention.output.dense", "neurons": "output.dense"}
_WORDS = "embeddings.word_embeddings"
_OWN_FIELDS = ("model_type", "architectures", "layer_heads", "layer_widths", "embedding_rank")


def cut(model: Any, gone: Removals, ratio: float, counts: Mapping[int, int]) -> Any:
    """A copy of a sentence-transformers BERT without the columns in `gone`.

    The table of word embeddings loses `ratio` of its rank: the nearest one, each piece as heavy as it is frequent.
    """
    encoder = model[0].auto_model
    head = encoder.encoder.layer[0].attention.self.attention_head_size
    state = {name: value for name, value in encoder.state_dict().items() if not name.startswith("pooler.")}
    left: dict[Kind, list[int]] = {"heads": [], "neurons": []}
    for (number, kind), removals in sorted(gone.items()):
        columns = _kept(output_projections(encoder.encoder.layer[number])[kind].in_features, removals)
        left[kind].append(len(columns))
        layer = f"encoder.layer.{number}"
        for name in _FEEDING[kind]:
            for part in ("weight", "bias"):
                state[f"{layer}.{name}.{part}"] = state[f"{layer}.{name}.{part}"][columns]
        state[f"{layer}.{_OUTPUT[kind]}.weight"] = state[f"{layer}.{_OUTPUT[kind]}.weight"][:, columns]
    rank = getattr(encoder.config, "embedding_rank", None)
    if ratio:
        rank = max(1, round((1 - ratio) * (rank or encoder.config.hidden_size)))
        state |= _factorise(encoder.get_input_embeddings(), rank, counts)
        state.pop(f"{_WORDS}.weight", None)
    fields = {key: value for key, value in encoder.config.to_dict().items() if key not in _OWN_FIELDS}
    smaller = PrunedBertModel(
        PrunedBertConfig(
            **fields,
            layer_heads=[width // head for width in left["heads"]],
            layer_widths=left["neurons"],
            embedding_rank=rank,
        )
    )
    smaller.load_state_dict(state)
    copy = deepcopy(model)
    copy[0].model = smaller.eval()
    return copy


def _kept(size: int, removals: Sequence[Removal]) -> Tensor:
    keep = torch.ones(size, dtype=torch.bool)
    keep[[column for removal in removals for column in removal.columns]] = False
    return keep.nonzero()[:, 0]


def _factorise(words: Any, rank: int, counts: Mapping[int, int]) -> dict[str, Tensor]:
    """Weights of a FactorisedEmbedding: principal components of the rows, each as heavy as its piece is frequent."""
    with torch.no_grad():
        rows = words(torch.arange(getattr(words, "table", words).num_embeddings)).double()
    weights = torch.tensor([counts.get(number, 0) + 1.0 for number in range(len(rows))]).double().sqrt()[:, None]
    mean = (rows * weights.square()).sum(dim=0) / weights.square().sum()
    _, _, components = torch.linalg.svd((rows - mean) * weights, full_matrices=False)
    basis = components[:rank]
    return {
        f"{_WORDS}.table.weight": ((rows - mean) @ basis.T).float(),
        f"{_WORDS}.widen.weight": basis.T.contiguous().float(),
        f"{_WORDS}.widen.bias": mean.float(),
    }
