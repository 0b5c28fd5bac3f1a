"""The fewest bytes and operations of a run's parts."""

from dataclasses import replace

import pytest

from serving.engines.bert import name_linear
from tasks.measurement.work import Work, count_work
from tests.tasks.measurement.timelines import MINILM

TOKENS, HIDDEN, INNER = 512, 384, 1536


def test_linear_layers_add_up_to_the_products() -> None:
    work = count_work(MINILM, [64] * 8)
    linears = [own[linear] for own in work.linears for linear in ("query", "output", "up", "down")]
    assert sum(linears, Work()) == work.kinds["products"]
    assert work.kinds["products"].flops == 6 * 2 * TOKENS * (4 * HIDDEN**2 + 2 * HIDDEN * INNER)
    assert work.kinds["products"].narrow_flops == 0


@pytest.mark.parametrize(("compute", "size"), [("f16", 2), ("f32", 4)])
def test_a_linear_layer_reads_its_weight_and_input_and_writes_its_result(compute: str, size: int) -> None:
    own = count_work(MINILM, [64] * 8, "f16" if compute == "f16" else "f32").linears[0]
    assert own["query"].num_bytes == size * (3 * HIDDEN**2 + TOKENS * (HIDDEN + 3 * HIDDEN))
    assert own["up"].num_bytes == size * (HIDDEN * INNER + TOKENS * (HIDDEN + INNER))
    states = 2 if compute == "f16" else 1  # a kernel reads what it adds to
    assert own["down"].num_bytes == size * (HIDDEN * INNER + TOKENS * (INNER + states * HIDDEN))


def test_e4m3_takes_one_byte_where_it_is_read_and_float16_two() -> None:
    config = replace(MINILM, float16=frozenset({name_linear(0, 3)}))
    first, second = count_work(config, [64] * 8, "f8").linears[:2]
    assert second["query"].num_bytes == 3 * HIDDEN**2 + TOKENS * (HIDDEN + 2 * 3 * HIDDEN)
    assert second["up"].num_bytes == HIDDEN * INNER + TOKENS * (HIDDEN + INNER)
    assert first["up"].num_bytes == HIDDEN * INNER + TOKENS * (HIDDEN + 2 * INNER)
    assert first["down"].num_bytes == 2 * (HIDDEN * INNER + TOKENS * (INNER + 2 * HIDDEN))
    assert [own["down"].narrow_flops > 0 for own in (first, second)] == [False, True]
    assert first["up"].narrow_flops == first["up"].flops


def test_a_block_keeps_the_intermediate_to_itself() -> None:
    own = count_work(MINILM, [64] * 8, "f8").linears[0]
    assert own["block"].flops == own["up"].flops + own["down"].flops
    assert own["block"].num_bytes == 2 * HIDDEN * INNER + TOKENS * (HIDDEN + 2 * 2 * HIDDEN)
