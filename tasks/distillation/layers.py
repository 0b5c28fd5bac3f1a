"""Layers of a model as a list to choose from, whatever the architecture: found, taken, and their places kept right."""

from collections.abc import Sequence
from typing import Any

import torch

from tasks.errors import StepRejected

Layers = tuple[int, ...]


class LayerList:
    """The encoder's layers, in the model and in what its configuration says of each of them."""

    def __init__(self, model: Any) -> None:
        """`model` is as sentence-transformers loads it. Raises StepRejected where it has no list of layers."""
        self._encoder = model[0].auto_model
        self._holder, self._name = find_layers(self._encoder)
        self.layers = list(getattr(self._holder, self._name))
        self._settings = list_settings(self._encoder.config, len(self.layers))

    def fits(self, choice: Sequence[int]) -> bool:
        """Whether every chosen layer has the parameters of the one whose place it takes.

        The model is built by place when it is read again: ModernBERT's first layer has no norm of its own, T5's first
        alone has the position bias.
        """
        return all(
            self.layers[layer].state_dict().keys() == self.layers[place].state_dict().keys()
            for place, layer in enumerate(choice)
        )

    def take(self, choice: Sequence[int]) -> None:
        """Leave the model with these of its original layers."""
        kept = [self.layers[layer] for layer in choice]
        for place, layer in enumerate(kept):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):  # a decoder's place in its cache
                    module.layer_idx = place
        setattr(self._holder, self._name, torch.nn.ModuleList(kept))
        self._encoder.config.num_hidden_layers = len(kept)
        for name, values in self._settings.items():
            setattr(self._encoder.config, name, [values[layer] for layer in choice])


def list_settings(config: Any, num_layers: int) -> dict[str, list[Any]]:
    """What a configuration lists by layer: `layer_types` of ModernBERT, Qwen and Gemma, the widths of a pruned BERT."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if "layer" in name and isinstance(value, list) and len(value) == num_layers
    }


def find_layers(encoder: Any) -> tuple[Any, str]:
    """The module that holds the encoder's list of layers, and the list's name in it. Raises StepRejected."""
    for holder in encoder.modules():
        for name, child in holder.named_children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == encoder.config.num_hidden_layers:
                return holder, name
    raise StepRejected(
        f"a model of type {encoder.config.model_type!r} has no list of layers that distillation could choose from"
    )
