"""Sensitivity: what rounding each linear layer alone does to the embeddings, and which layers deserve more bits."""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from tasks.graphs.graph import Graph
from tasks.graphs.qdq import Format, Range, insert_qdq
from tasks.measurement.statistics import mean_interval
from tasks.quantization.built import FLOAT_BITS, QDQ_BITS, LayerDamage
from tasks.quantization.calibrate import Batches

_NUM_PROBES = 32  # calibration texts that layers are judged on

Cosines = NDArray[np.float64]
How = TypeVar("How")


class Probe(ABC, Generic[How]):
    """Embeds calibration texts with some layers rounded, each in a way of its own; others are as they were."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches[:: max(1, len(batches) // _NUM_PROBES)]
        self._expected = self._embed({})

    def cosines(self, rounded: Mapping[str, How]) -> Cosines:
        """Text by text, the cosine to the embeddings without any rounding; `rounded` is by node."""
        return np.asarray((self._embed(rounded) * self._expected).sum(axis=1, dtype=np.float64))

    def cosine(self, rounded: Mapping[str, How]) -> float:
        """Their mean."""
        return float(self.cosines(rounded).mean())

    @abstractmethod
    def _run(self, rounded: Mapping[str, How]) -> Callable[[dict[str, Any]], NDArray[np.float32]]:
        """What embeds a batch's inputs with these layers rounded."""

    def _embed(self, rounded: Mapping[str, How]) -> NDArray[np.float32]:
        run = self._run(rounded)
        embeddings = np.concatenate([run({"input_ids": ids, "attention_mask": mask}) for ids, mask in self._batches])
        return np.asarray(embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True))


class WeightProbe(Probe[NDArray[np.float32]]):
    """Other weights in place of the layers' own: one session, weights are inputs."""

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
        super().__init__(batches)

    def _run(self, rounded: Mapping[str, NDArray[np.float32]]) -> Callable[[dict[str, Any]], NDArray[np.float32]]:
        weights = {self._inputs[node]: rounded.get(node, own) for node, own in self._own.items()}
        return lambda feeds: np.asarray(self._session.run(None, weights | feeds)[0])


class QdqProbe(Probe[bool]):
    """Layers quantised explicitly: a session each time, on arithmetic that is exact on every processor."""

    def __init__(self, graph: Graph, ranges: Mapping[str, Range], kind: Format, batches: Batches) -> None:
        """Embed `batches` with the graph as it is."""
        self._graph, self._ranges, self._kind = graph, ranges, kind
        super().__init__(batches)

    def _run(self, rounded: Mapping[str, bool]) -> Callable[[dict[str, Any]], NDArray[np.float32]]:
        twin = self._graph.copy()
        skip = {linear.node for linear in twin.linears if not rounded.get(linear.node)}
        insert_qdq(twin, self._ranges, self._kind, skip)
        session = twin.open()
        return lambda feeds: np.asarray(session.run(None, feeds)[0])


def rank_layers(
    probe: Probe[bool], labels: Mapping[str, str], min_cosine: float, float_bits: int = FLOAT_BITS
) -> dict[str, LayerDamage]:
    """By node what quantising each layer alone does, and whether it stays in float; nothing where none has to.

    `labels` name the layers of `probe` for people. As in the gate the bad end of the mean cosine's interval has to
    reach `min_cosine`, on calibration texts here: to choose on what is judged would flatter.
    """
    rounded = dict.fromkeys(labels, True)

    def is_enough(mixed: Mapping[str, bool]) -> bool:
        return mean_interval(probe.cosines(mixed)).low >= min_cosine

    if is_enough(rounded):
        return {}
    damage = measure_damage(probe, rounded)
    kept = choose_layers(rounded, dict.fromkeys(rounded, False), damage, is_enough)
    return {
        node: LayerDamage(layer=label, damage=damage[node], bits=float_bits if node in kept else QDQ_BITS)
        for node, label in labels.items()
    }


def measure_damage(probe: Probe[How], fewer: Mapping[str, How]) -> dict[str, float]:
    """Each layer's own damage to the embeddings, by node."""
    return {node: 1 - probe.cosine({node: how}) for node, how in fewer.items()}


def choose_layers(
    fewer: Mapping[str, How],
    more: Mapping[str, How],
    damage: Mapping[str, float],
    is_enough: Callable[[Mapping[str, How]], bool],
) -> set[str]:
    """The fewest layers, most damaging first, that need `more` bits for `is_enough`; all at worst."""
    ranked = sorted(damage, key=lambda node: -damage[node])
    low, high = 0, len(ranked)
    while low < high:
        count = (low + high) // 2
        if is_enough({node: (more if rank < count else fewer)[node] for rank, node in enumerate(ranked)}):
            high = count
        else:
            low = count + 1
    return set(ranked[:low])


def choose_bits(
    damage: Mapping[str, float],
    sizes: Mapping[str, int],
    levels: range,
    is_enough: Callable[[Mapping[str, int]], bool],
) -> dict[str, int]:
    """Bits for each layer, from those of `levels`, so that the layers are `is_enough` at fewest bytes; all at worst.

    `damage` is at the fewest bits; each bit more leaves a quarter of it (docs/log.md). What mends most for each byte
    that it costs comes first.
    """
    steps = [(node, bits) for node in damage for bits in levels[:-1]]
    steps.sort(key=lambda step: -damage[step[0]] / sizes[step[0]] / 4 ** (step[1] - levels[0]))

    def spend(count: int) -> dict[str, int]:
        taken = Counter(node for node, _ in steps[:count])
        return {node: levels[0] + taken[node] for node in damage}

    return spend(bisect_left(range(len(steps)), True, key=lambda count: is_enough(spend(count))))
