"""Sensitivity: what rounding each linear layer alone does to the embeddings, and which layers deserve more bits."""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from serving.tokenizer import pad_batch
from tasks.graphs.graph import Graph
from tasks.graphs.qdq import Format, Range, insert_qdq
from tasks.measurement.statistics import mean_interval
from tasks.quantization.built import FLOAT_BITS, QDQ_BITS, CurvePoint, LayerDamage, Ranking
from tasks.quantization.calibrate import Batches

_NUM_PROBES = 32  # calibration texts that layers are judged on
_NUM_TOGETHER = 8  # of them in a run: weights that are inputs are packed in every run

Cosines = NDArray[np.float64]
How = TypeVar("How")


class Probe(ABC, Generic[How]):
    """Embeds calibration texts with some layers rounded, each in a way of its own; others are as they were."""

    def __init__(self, batches: Batches, together: int = 1) -> None:
        probes = batches[:: max(1, len(batches) // _NUM_PROBES)]
        parts = (probes[start : start + together] for start in range(0, len(probes), together))
        self._batches = [
            pad_batch([ids[mask > 0] for pair in part for ids, mask in zip(*pair, strict=True)]) for part in parts
        ]
        self._expected = self._embed({})

    def cosines(self, rounded: Mapping[str, How]) -> Cosines:
        """Text by text, the cosine to the embeddings without any rounding; `rounded` is by node."""
        pairs = zip(self._embed(rounded), self._expected, strict=True)
        return np.concatenate([(own * expected).sum(axis=1, dtype=np.float64) for own, expected in pairs])

    def few(self) -> Self:
        """The same on texts of one run alone, of those in the middle."""
        fewer, middle = copy(self), (len(self._batches) - 1) // 2
        fewer._batches, fewer._expected = self._batches[middle : middle + 1], self._expected[middle : middle + 1]
        return fewer

    def cosine(self, rounded: Mapping[str, How]) -> float:
        """Their mean."""
        return float(self.cosines(rounded).mean())

    @abstractmethod
    def _run(self, rounded: Mapping[str, How]) -> Callable[[dict[str, Any]], NDArray[np.float32]]:
        """What embeds a batch's inputs with these layers rounded."""

    def _embed(self, rounded: Mapping[str, How]) -> list[NDArray[np.float32]]:
        run = self._run(rounded)
        found = [run({"input_ids": ids, "attention_mask": mask}) for ids, mask in self._batches]
        return [embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True) for embeddings in found]


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
    """Layers quantised explicitly, on arithmetic that is exact on every processor.

    One session: a switch for each layer's input, and its weight, as it was or rounded, is an input too.
    """

    def __init__(self, graph: Graph, ranges: Mapping[str, Range], kind: Format, batches: Batches) -> None:
        """Embed `batches` with the graph as it is."""
        import onnx  # noqa: PLC0415  a cached run need not load it

        twin, linears = graph.copy(), graph.linears
        insert_qdq(twin, ranges, kind)
        self._weights, inputs = {}, twin.model.graph.input
        for linear in linears:
            node, own = twin.node(linear.node), graph.array(linear.weight)
            widening = twin.node(f"{linear.node}_weight_DequantizeLinear")
            rounded = twin.array(widening.input[0]).astype(np.float32) * twin.array(widening.input[1])
            twin.model.graph.node.remove(widening)
            self._weights[linear.node] = own, rounded
            switch, chosen = _switch_of(linear.node), f"{linear.node}_chosen"
            choose = onnx.helper.make_node("Where", [switch, node.input[0], linear.input], [chosen], name=chosen)
            twin.insert([choose], node)
            node.input[:] = [chosen, _weight_of(linear.node)]
            inputs.append(onnx.helper.make_tensor_value_info(switch, onnx.TensorProto.BOOL, []))
            inputs.append(onnx.helper.make_tensor_value_info(node.input[1], onnx.TensorProto.FLOAT, own.shape))
        twin.drop_unused()
        self._session = twin.open()
        super().__init__(batches, together=_NUM_TOGETHER)

    def _run(self, rounded: Mapping[str, bool]) -> Callable[[dict[str, Any]], NDArray[np.float32]]:
        layers: dict[str, Any] = {}
        for node, weights in self._weights.items():
            is_rounded = rounded.get(node, False)
            layers[_switch_of(node)], layers[_weight_of(node)] = np.array(is_rounded), weights[is_rounded]
        return lambda feeds: np.asarray(self._session.run(None, layers | feeds)[0])


def _switch_of(node: str) -> str:
    return f"{node}_is_rounded"


def _weight_of(node: str) -> str:
    return f"{node}_weight_given"


def rank_layers(
    probe: Probe[bool],
    labels: Mapping[str, str],
    min_cosine: float,
    float_bits: int = FLOAT_BITS,
    is_drawn: bool = False,
) -> Ranking:
    """By node what quantising each layer alone does, and whether it stays in float; and the cosine by layers kept.

    `labels` name the layers of `probe` for people. As in the gate the bad end of the mean cosine's interval has to
    reach `min_cosine`, on calibration texts here: to choose on what is judged would flatter. Where none has to stay in
    float the layers are measured to be drawn alone, if `is_drawn`, and on few texts.
    """
    rounded, points = dict.fromkeys(labels, True), {}

    def is_enough(mixed: Mapping[str, bool]) -> bool:
        measured, num_kept = mean_interval(probe.cosines(mixed)), list(mixed.values()).count(False)
        points[num_kept] = CurvePoint(num_kept=num_kept, cosine=measured.value, low=measured.low)
        return measured.low >= min_cosine

    passes = is_enough(rounded)
    if passes and is_drawn:
        probe = probe.few()
        is_enough(rounded)
    damage = {} if passes and not is_drawn else measure_damage(probe, rounded)
    kept = set() if passes else choose_layers(rounded, dict.fromkeys(rounded, False), damage, is_enough)
    ranked = sorted(damage, key=lambda node: -damage[node])
    for count in (1 << power for power in range(len(ranked).bit_length())):
        if count not in points:
            is_enough(rounded | dict.fromkeys(ranked[:count], False))
    damages = {
        node: LayerDamage(layer=labels[node], damage=damage[node], bits=float_bits if node in kept else QDQ_BITS)
        for node in damage
    }
    return Ranking(damages, tuple(points[count] for count in sorted(points)))


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
