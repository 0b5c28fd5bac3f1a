"""What attention heads and feed-forward neurons are worth: the error their removal leaves in the embeddings.

The measure is Fisher information with compensation (OBS). An output projection's inputs [N, I] and the gradient of the
embeddings with respect to its outputs [N, H] give two matrices: the Gram matrix of the one says what the columns left
can make up for, the Fisher matrix of the other what an error costs in the embeddings. Columns are removed in order of
the error that remains after the best compensation. The gradient of a loss against the teacher would be zero here,
because the model to be pruned still is the teacher: random projections of the embedding are differentiated instead,
whose expected outer product is the Gauss-Newton Hessian of that loss.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from tasks.progress import Advance
from tasks.pruning.budget import count_column

Kind = Literal["heads", "neurons"]
Place = tuple[int, Kind]  # an output projection: its layer, and what feeds it
BATCH = 32
# Shares of the mean diagonal that are added to it: enough to invert, little against what is measured.
_DAMPING = 0.01
# Neurons removed between two measurements of those left: two that stand in for one another must not go together.
_STEP = 8


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of one output projection: `gram` [I, I] of its inputs and `fisher` [H, H] of its outputs, float64 means."""

    gram: Tensor
    fisher: Tensor


@dataclass(frozen=True, slots=True)
class Removal:
    """A block of columns that go together, the parameters that go with it, and the error that adds to embeddings."""

    columns: tuple[int, ...]
    num_parameters: int
    error: float


Removals = Mapping[Place, Sequence[Removal]]


def output_projections(layer: Any) -> dict[Kind, Any]:
    """The linear modules that heads and neurons of a BERT layer feed."""
    return {"heads": layer.attention.output.dense, "neurons": layer.output.dense}


def batches(model: Any, texts: Sequence[str]) -> Iterator[Tensor]:
    """Token ids [B, T] of texts of the same length in tokens, so that nothing is padded; shortest first."""
    rows = model.tokenizer(list(texts), truncation=True, max_length=model.max_seq_length)["input_ids"]
    for _, same in groupby(sorted(rows, key=len), key=len):
        group = torch.tensor(list(same))
        yield from group.split(BATCH)


def measure(model: Any, texts: Sequence[str], advance: Advance) -> dict[Place, Statistics]:
    """Gram and Fisher matrices of every output projection of a sentence-transformers BERT, by one random projection
    a text."""
    encoder = model[0].auto_model
    layers = encoder.encoder.layer
    # Gradients are wanted of what flows through, not of the weights.
    model.requires_grad_(False)
    entry = encoder.embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    sums: dict[Place, list[Tensor]] = {}
    noise = torch.Generator().manual_seed(0)
    tokens = 0
    for ids in batches(model, texts):
        with _recording(layers, sums):
            embedding = model({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["sentence_embedding"]
            (embedding * torch.randn(embedding.shape, generator=noise)).sum().backward()
        tokens += ids.numel()
        advance(len(ids))
    entry.remove()
    return {place: Statistics(*(total / tokens for total in totals)) for place, totals in sorted(sums.items())}


@contextmanager
def _recording(layers: Any, sums: dict[Place, list[Tensor]]) -> Iterator[None]:
    """While open, add to `sums` the outer products of what goes through every output projection."""

    def watch(place: Place) -> Any:
        def forward(module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            _add(place, 0, inputs[0].detach())
            output.register_hook(lambda gradient: _add(place, 1, gradient))

        return forward

    def _add(place: Place, which: int, values: Tensor) -> None:
        rows = values.flatten(0, 1)
        product = (rows.T @ rows).double()
        totals = sums.setdefault(place, [torch.zeros(()), torch.zeros(())])
        totals[which] = totals[which] + product

    hooks = [
        module.register_forward_hook(watch((number, kind)))
        for number, layer in enumerate(layers)
        for kind, module in output_projections(layer).items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def order_all(model: Any, statistics: Mapping[Place, Statistics], multiple: int) -> dict[Place, list[Removal]]:
    """What could go from every output projection: whole heads, and neurons, `multiple` at a time."""
    encoder = model[0].auto_model
    head = encoder.encoder.layer[0].attention.self.attention_head_size
    hidden = encoder.config.hidden_size
    found = {}
    for (number, kind), measured in statistics.items():
        weight = output_projections(encoder.encoder.layer[number])[kind].weight.detach()
        unit, block = (head, head) if kind == "heads" else (1, multiple)
        found[number, kind] = order_removals(measured, weight, unit, block, count_column(kind, hidden))
    return found


def order_removals(measured: Statistics, weight: Tensor, unit: int, block: int, column: int) -> list[Removal]:
    """Blocks of columns of `weight` [H, I] from the least to the most important, the last block never among them.

    Columns go in units of `unit` (a head, or 1), `block` columns at a time, each with `column` parameters.
    """
    gram = measured.gram + _DAMPING * measured.gram.diagonal().mean() * torch.eye(len(measured.gram))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    # With V = R W and Fisher = RᵀR an error in the outputs is a plain sum of squares.
    values, vectors = torch.linalg.eigh(measured.fisher)
    scaled = (values.clamp(min=0).sqrt()[:, None] * vectors.T) @ weight.double()
    alive = torch.ones(len(gram), dtype=torch.bool)
    removals = []
    while int(alive.sum()) > block:
        columns: list[int] = []
        error = 0.0
        while len(columns) < block:
            chosen, cost = _cheapest(scaled, inverse, alive, unit, min(_STEP, block - len(columns)))
            _remove(scaled, inverse, chosen)
            alive[chosen] = False
            columns += chosen.tolist()
            error += cost
        removals.append(Removal(tuple(sorted(columns)), block * column, error))
    return removals


def _cheapest(scaled: Tensor, inverse: Tensor, alive: Tensor, unit: int, count: int) -> tuple[Tensor, float]:
    """The unit, or the `count` single columns, whose removal costs least after compensation, and that cost."""
    if unit == 1:
        score = (scaled.square().sum(dim=0) / inverse.diagonal()).masked_fill(~alive, torch.inf)
        chosen = score.argsort(stable=True)[:count]
        return chosen, _error(scaled, inverse, chosen)
    units = [torch.arange(start, start + unit) for start in range(0, len(alive), unit) if alive[start]]
    costs = [_error(scaled, inverse, columns) for columns in units]
    best = min(range(len(units)), key=costs.__getitem__)
    return units[best], costs[best]


def _error(scaled: Tensor, inverse: Tensor, columns: Tensor) -> float:
    lost = scaled[:, columns]
    return float((torch.linalg.solve(inverse[columns][:, columns], lost.T) * lost.T).sum())


def _remove(scaled: Tensor, inverse: Tensor, columns: Tensor) -> None:
    """Take `columns` out, the rest making up for them (in place)."""
    share = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
    scaled -= scaled[:, columns] @ share
    inverse -= inverse[:, columns] @ share
    # Exactly gone, not gone up to rounding; their own diagonal stays finite to divide by.
    scaled[:, columns] = 0
    inverse[columns] = 0
    inverse[:, columns] = 0
    inverse[columns, columns] = 1
