"""Linear layers by the order of what ran, on made-up timelines."""

import pytest

from tasks.measurement.linears import place_linears
from tests.tasks.measurement.timelines import lay_out

# As the engine runs a layer: on its own GEMM, on that of Triton with cuBLAS's, and with the block in one kernel.
WIDE = ["gemm_wide", "attention_hopper", "gemm_wide", "gemm_wide", "gemm_wide"]
MIXED = ["_linear_kernel", "_attention_kernel", "Memset", "nvjet_sm90_hsh", "_add_norm_kernel", "_linear_kernel",
         "sm80_xmma_gemm_f16", "_add_norm_kernel"]  # fmt: skip
BLOCK = ["gemm_wide", "attention_hopper", "_linear_kernel", "feed_forward"]


@pytest.mark.parametrize(
    ("layer", "places"),
    [
        (WIDE, {0: "query", 2: "output", 3: "up", 4: "down"}),
        (MIXED, {0: "query", 3: "output", 5: "up", 6: "down"}),
        (BLOCK, {0: "query", 2: "output", 3: "block"}),
    ],
)
def test_products_are_placed_in_every_layer_of_every_run(layer: list[str], places: dict[int, str]) -> None:
    placed, unplaced = place_linears(lay_out(["_embed_norm_kernel", *layer * 3, "_pool_kernel"] * 2), 3)
    assert unplaced is None
    run = 3 * len(layer) + 2
    assert placed == {
        run * number + 1 + len(layer) * count + place: (count, linear)
        for number in range(2) for count in range(3) for place, linear in places.items()
    }  # fmt: skip


def test_layers_may_differ() -> None:
    placed, _ = place_linears(lay_out(BLOCK + WIDE), 2)
    assert [placed[number] for number in sorted(placed)] == [
        (0, "query"), (0, "output"), (0, "block"), (1, "query"), (1, "output"), (1, "up"), (1, "down"),
    ]  # fmt: skip


def test_what_finishes_a_product_belongs_to_it_and_attention_may_be_once_a_text() -> None:
    attention = ["aten::scaled_dot_product_attention"] * 3
    names = ["aten::linear", *attention, "aten::linear", "splitKreduce", "aten::linear", "aten::gelu", "aten::linear"]
    placed, unplaced = place_linears(lay_out(["aten::gelu", *names]), 1)
    assert unplaced is None
    assert {number - 1: linear for number, (_, linear) in placed.items()} == {
        0: "query", 4: "output", 5: "output", 6: "up", 7: "up", 8: "down",
    }  # fmt: skip


@pytest.mark.parametrize(
    "names",
    [
        WIDE + WIDE[1:],  # a query product under a name that nobody knows
        [*WIDE, *WIDE, "gemm_wide"],
        WIDE * 3,  # of two layers
        ["gemm_wide", *WIDE, *WIDE],
        ["attention_hopper"] * 2,
        ["gemm_wide", "attention_hopper", "feed_forward", "gemm_wide", "gemm_wide"] * 2,
    ],
)
def test_nothing_is_placed_where_the_order_does_not_fit(names: list[str]) -> None:
    placed, unplaced = place_linears(lay_out(names), 2)
    assert not placed
    assert unplaced is not None
    assert unplaced.endswith("does not fit 2 layers")


def test_a_run_without_products_has_nothing_to_place() -> None:
    assert place_linears(lay_out(["few_tokens_cluster"] * 3), 6) == ({}, None)
