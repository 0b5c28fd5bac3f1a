"""The smallest files: few-bit weights, packed as planes of bits, that onnxruntime widens once while it loads."""

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import groupby

from serving.tokenizer import Ids, pad_batch
from tasks.graphs.graph import Graph
from tasks.graphs.table import TOKENS, list_tables, quantize_tables
from tasks.progress import Advance
from tasks.quantization.built import LayerDamage
from tasks.quantization.calibrate import Batches, observe
from tasks.quantization.few_bit_table import Split, round_table
from tasks.quantization.packed import put_packed, put_table
from tasks.quantization.rounding import FewBits, round_weight
from tasks.quantization.sensitivity import WeightProbe, choose_bits, measure_damage

_LEVELS = range(3, 7)
_OTHER_BITS, _OTHER_BLOCK = 8, 128  # of positions
_NUM_SEEN = 1000  # texts whose inputs rounding sees; of 200 it sees 5,000 tokens, for products of 1,536 channels


def squeeze(
    graph: Graph, budget: float, split: Split, batches: Batches, texts: Sequence[Ids], advance: Advance
) -> tuple[LayerDamage, ...]:
    """Store linear layers in 3 to 6 bits, the fewest bytes that are expected to cost `budget` of the mean cosine.

    The embedding table takes the bits of `split`. `texts` (token ids) are what is rounded for, and calibration texts
    what damage is measured on. In place; returns what each layer does and got.
    """
    linears = {linear.node: linear for linear in graph.linears}
    fitted = sorted(texts[:: max(1, len(texts) // _NUM_SEEN)], key=len)
    together = [pad_batch(list(rows)) for _, rows in groupby(fitted, key=len)]  # of one length: without padding
    names = [linear.input for linear in linears.values()]
    seen = observe(graph, names, together, lambda steps: None, with_products=True)
    advance(len(batches))

    @cache
    def rounded(node: str, bits: int) -> FewBits:
        products = seen[linears[node].input].products
        assert products is not None, "observed with products"
        return round_weight(graph.array(linears[node].weight), products, bits)

    damage = measure_damage(WeightProbe(graph, batches), {node: rounded(node, _LEVELS[0]).widen() for node in linears})
    sizes = {node: graph.array(linear.weight).size for node, linear in linears.items()}
    bits = choose_bits(damage, sizes, _LEVELS, lambda bits: _expect(damage, bits) <= budget)
    for node, linear in linears.items():
        put_packed(graph, linear, rounded(node, bits[node]))
    for lookup in list_tables(graph):
        if lookup.input[1] == TOKENS:
            put_table(graph, lookup, round_table(graph.array(lookup.input[0]), split, texts))
    quantize_tables(graph, _OTHER_BITS, _OTHER_BLOCK)
    graph.drop_unused()
    return tuple(
        LayerDamage(layer=linear.label, damage=damage[node], bits=bits[node]) for node, linear in linears.items()
    )


def _expect(damage: Mapping[str, float], bits: Mapping[str, int]) -> float:
    """What all layers cost together: each bit more leaves a quarter (docs/log.md)."""
    return sum(damage[node] / 4 ** (bits[node] - _LEVELS[0]) for node in damage)
