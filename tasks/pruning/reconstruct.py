"""Least squares after pruning: output projections are fitted so that every layer again gives what it gave before."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tasks.progress import Advance
from tasks.pruning.importance import batches

# Share of the mean diagonal that ties the solution to the weights there were.
_RIDGE = 0.01


@torch.no_grad()  # type: ignore[untyped-decorator]
def reconstruct(pruned: Any, original: Any, texts: Sequence[str], advance: Advance) -> None:
    """Fit every output projection of `pruned` (in place), layer by layer, to the sums that `original` normalises.

    The fit sees what the layers before it, pruned and fitted already, really give: their errors are corrected too.
    """
    ids = list(batches(original, texts))
    theirs, ours = ([model[0].auto_model.embeddings(input_ids=batch) for batch in ids] for model in (original, pruned))
    for layer, target in zip(pruned[0].auto_model.encoder.layer, original[0].auto_model.encoder.layer, strict=True):
        _fit_layer(layer, target, ours, theirs)
        advance(1)


def _fit_layer(layer: Any, target: Any, ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Fit both output projections of one layer; the states [B, T, H] of each batch go through it."""
    fit = _Fit(layer.attention.output.dense)
    inner = []
    for index, states in enumerate(theirs):
        wanted = target.attention.output.dense(target.attention.self(states)[0]) + states
        inner.append(layer.attention.self(ours[index])[0])
        fit.add(inner[-1], wanted - ours[index])
        theirs[index] = target.attention.output.LayerNorm(wanted)
    fit.solve()
    fit = _Fit(layer.output.dense)
    for index, states in enumerate(theirs):
        ours[index] = layer.attention.output(inner[index], ours[index])
        inner[index] = layer.intermediate(ours[index])
        wanted = target.output.dense(target.intermediate(states)) + states
        fit.add(inner[index], wanted - ours[index])
        theirs[index] = target.output.LayerNorm(wanted)
    fit.solve()
    for index, states in enumerate(inner):
        ours[index] = layer.output(states, ours[index])


class _Fit:
    """Ridge regression of a linear module's outputs on its inputs, towards the weights it has."""

    def __init__(self, linear: Any) -> None:
        self._linear = linear
        size = linear.in_features + 1
        self._gram = torch.zeros(size, size, dtype=torch.float64)
        self._product = torch.zeros(size, linear.out_features, dtype=torch.float64)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Inputs [B, T, I] and what they should give [B, T, H]."""
        rows = torch.cat([inputs, torch.ones(*inputs.shape[:2], 1)], dim=2).flatten(0, 1)
        self._gram += (rows.T @ rows).double()
        self._product += (rows.T @ outputs.flatten(0, 1)).double()

    def solve(self) -> None:
        """Set the module's weight and bias."""
        before = torch.cat([self._linear.weight.T, self._linear.bias[None]]).double()
        ridge = _RIDGE * self._gram.diagonal().mean()
        gram = self._gram + ridge * torch.eye(len(self._gram), dtype=torch.float64)
        found = torch.linalg.solve(gram, self._product + ridge * before).float()
        self._linear.weight.copy_(found[:-1].T)
        self._linear.bias.copy_(found[-1])
