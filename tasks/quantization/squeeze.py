"""The smallest files: few-bit weights, packed as planes of bits, that onnxruntime widens once while it loads."""

from collections.abc import Mapping
from functools import cache

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


def squeeze(graph: Graph, target: float, split: Split, batches: Batches, advance: Advance) -> tuple[LayerDamage, ...]:
    """Store linear layers in 3 to 6 bits, the fewest bytes whose mean cosine on calibration texts is `target`.

    The embedding table takes the bits of `split`. In place; returns what each layer does and got.
    """
    linears = {linear.node: linear for linear in graph.linears}
    seen = observe(graph, [linear.input for linear in linears.values()], batches, advance, with_products=True)
    probe = WeightProbe(graph, batches)

    @cache
    def rounded(node: str, bits: int) -> FewBits:
        products = seen[linears[node].input].products
        assert products is not None, "observed with products"
        return round_weight(graph.array(linears[node].weight), products, bits)

    def is_enough(bits: Mapping[str, int]) -> bool:
        return probe.cosine({node: rounded(node, b).widen() for node, b in bits.items()}) >= target

    damage = measure_damage(probe, {node: rounded(node, _LEVELS[0]).widen() for node in linears})
    sizes = {node: graph.array(linear.weight).size for node, linear in linears.items()}
    bits = choose_bits(damage, sizes, _LEVELS, is_enough)
    for node, linear in linears.items():
        put_packed(graph, linear, rounded(node, bits[node]))
    for lookup in list_tables(graph):
        if lookup.input[1] == TOKENS:
            put_table(graph, lookup, round_table(graph.array(lookup.input[0]), split, [ids for ids, _ in batches]))
    quantize_tables(graph, _OTHER_BITS, _OTHER_BLOCK)
    graph.drop_unused()
    return tuple(
        LayerDamage(layer=linear.label, damage=damage[node], bits=bits[node]) for node, linear in linears.items()
    )
