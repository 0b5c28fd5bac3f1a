"""Sensitivity: what rounding each linear layer alone does to the embeddings, and which layers deserve more bits."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tasks.calibrate import Batches
from tasks.graph import Graph

Weights = Mapping[str, NDArray[np.float32]]


class WeightProbe:
    """Embeds calibration texts with any weights in place of a graph's own: one session, weights are inputs."""

    def __init__(self, graph: Graph, batches: Batches) -> None:
        """Open the graph and embed `batches` with its own weights."""
        import onnx  # noqa: PLC0415  a cached run need not load it
        import onnxruntime as ort  # noqa: PLC0415

        twin = graph.copy()
        self._own, self._inputs = {}, {}
        for linear in twin.linears:
            weight = self._own[linear.node] = graph.array(linear.weight)
            twin.replace_weight(linear, weight)
            self._inputs[linear.node] = name = twin.node(linear.node).input[1]
            twin.model.graph.input.append(
                onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, weight.shape)
            )
        twin.drop_unused(but=set(self._inputs.values()))
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self._session = twin.open(options)
        self._batches = batches
        self._expected = self._embed({})

    def cosine(self, weights: Weights) -> float:
        """Mean cosine to the graph's own embeddings with `weights`, by node, in place of the graph's."""
        return float((self._embed(weights) * self._expected).sum(axis=1).mean())

    def _embed(self, weights: Weights) -> NDArray[np.float32]:
        feeds = {self._inputs[node]: weights.get(node, own) for node, own in self._own.items()}
        rows = [
            self._session.run(None, {**feeds, "input_ids": ids, "attention_mask": mask})[0]
            for ids, mask in self._batches
        ]
        embeddings = np.concatenate(rows)
        return np.asarray(embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True))


def measure_damage(probe: WeightProbe, fewer: Weights) -> dict[str, float]:
    """Each layer's own damage to the embeddings, by node."""
    return {node: 1 - probe.cosine({node: weight}) for node, weight in fewer.items()}


def choose_layers(
    probe: WeightProbe, fewer: Weights, more: Weights, damage: Mapping[str, float], target: float
) -> set[str]:
    """The fewest layers, most damaging first, that need `more` bits for a mean cosine of `target`; all at worst."""
    ranked = sorted(damage, key=lambda node: -damage[node])
    low, high = 0, len(ranked)
    while low < high:
        count = (low + high) // 2
        mixed = {node: (more if rank < count else fewer)[node] for rank, node in enumerate(ranked)}
        if probe.cosine(mixed) >= target:
            high = count
        else:
            low = count + 1
    return set(ranked[:low])
