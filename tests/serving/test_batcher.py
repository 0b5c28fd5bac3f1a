from concurrent.futures import Future
from itertools import count
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.batcher import Batch, Batcher, Limits, choose_run
from serving.request_queue import Item, Request, RequestQueue, put_rows
from serving.shapes import EXACT, ShapeGrid
from tests.serving.latency import make_latency_model

RATE = 1000.0
LIMITS = Limits(max_batch_size=8, max_batch_tokens=64)

requests = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=20), min_size=1, max_size=12)


def make_batcher(
    limits: Limits = LIMITS, overhead_tokens: float = 4.0, grid: ShapeGrid = EXACT, num_runs: int = 1
) -> Batcher:
    return Batcher(RequestQueue(10**9, 10**9), limits, make_latency_model(overhead_tokens, RATE), grid, num_runs)


numbers = count(1)


class Pushed(NamedTuple):
    request: Request
    waiter: "Future[None]"
    ids: list[int]


def push(batcher: Batcher, lengths: list[int], arrival: float = 0.0) -> Pushed:
    """Texts of these lengths, each of an id of its own: none shares another's row, and a swapped answer shows."""
    waiter: Future[None] = Future()
    request = Request(len(lengths), 1, arrival, waiter)
    ids = [next(numbers) for _ in lengths]
    batcher.queue.push(request, [np.full(length, i) for length, i in zip(lengths, ids, strict=True)], RATE)
    return Pushed(request, waiter, ids)


def answer(batch: Batch) -> None:
    input_ids, _ = batch.pad()
    put_rows(batch.items, input_ids[:, :1].astype(np.float32))


def owner(item: Item) -> Request:
    ((request, _),) = item.places
    return request


@given(requests, st.floats(0, 1000), st.booleans(), st.booleans(), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_batcher_loses_nothing_and_answers_each_text_once_in_its_place(
    lengths: list[list[int]], overhead: float, is_late: bool, is_coarse: bool, num_runs: int
) -> None:
    batcher = make_batcher(overhead_tokens=overhead, grid=ShapeGrid(40, is_coarse), num_runs=num_runs)
    pushed = [push(batcher, each, arrival=0.01 * place) for place, each in enumerate(lengths)]
    seen: list[int] = []
    while (batch := batcher.take(100.0 if is_late else 0.2)) is not None:
        assert len(batch.items) <= LIMITS.max_batch_size
        assert batch.padded_tokens <= LIMITS.max_batch_tokens
        assert batch.pad()[0].size == batch.padded_tokens
        assert batch.num_tokens == sum(item.length for item in batch.items)
        seen += [int(item.ids[0]) for item in batch.items]
        answer(batch)
    assert len(seen) == len(set(seen)) == sum(map(len, lengths))
    assert (len(batcher.queue), batcher.queue.num_tokens) == (0, 0)
    for request, waiter, ids in pushed:
        assert waiter.result(0) is None
        assert request.vectors[:, 0].tolist() == ids


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.floats(0, 1000))
@settings(max_examples=100, deadline=None)
def test_engine_that_packs_gets_texts_in_the_order_they_are_due_whatever_their_lengths(
    lengths: list[int], overhead: float
) -> None:
    batcher = make_batcher(overhead_tokens=overhead, grid=ShapeGrid(40, is_coarse=False, is_packed=True))
    for place, length in enumerate(lengths):
        push(batcher, [length], arrival=0.001 * place)
    first = 0
    while (batch := batcher.take(0.2)) is not None:
        last = first + len(batch.items)
        assert sorted(item.length for item in batch.items) == sorted(lengths[first:last])
        assert batch.padded_tokens == batch.num_tokens == sum(lengths[first:last])
        assert batch.pad()[0].shape == (last - first, max(lengths[first:last]))
        more = lengths[last : last + 1]
        is_full = last - first == LIMITS.max_batch_size or not more
        assert is_full or batch.num_tokens + more[0] > LIMITS.max_batch_tokens
        assert batch.num_tokens <= LIMITS.max_batch_tokens
        first = last
    assert first == len(lengths)


def test_packed_run_that_is_mostly_overhead_takes_texts_of_large_requests_along() -> None:
    batcher = make_batcher(Limits(64, 10_000), overhead_tokens=50, grid=ShapeGrid(256, False, is_packed=True))
    push(batcher, [30] * 8, arrival=0.0)
    single = push(batcher, [10], arrival=0.0)
    batch = batcher.take(0.0)
    assert batch is not None
    assert single.request in {owner(item) for item in batch.items}
    assert sorted(item.length for item in batch.items) == [10, 30]  # a second one would make it more than twice as long


@given(requests, st.floats(0, 5))
@settings(max_examples=150, deadline=None)
def test_batcher_takes_the_text_due_first_and_nothing_young_while_something_is_old(
    lengths: list[list[int]], now: float
) -> None:
    batcher = make_batcher()
    for place, each in enumerate(lengths):
        push(batcher, each, arrival=0.1 * place)
    while head := batcher.queue.peek(1):
        batch = batcher.take(now)
        assert batch is not None
        assert head[0] in batch.items
        if now - head[0].due > LIMITS.max_age_seconds:
            assert all(now - item.due > LIMITS.max_age_seconds for item in batch.items)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.lists(st.integers(1, 40), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_batcher_serves_the_nth_waiting_text_within_n_batches_whatever_arrives(
    waiting: list[int], arriving: list[int]
) -> None:
    batcher, now = make_batcher(), 0.0
    targets = {id(push(batcher, [length]).request) for length in waiting}
    for _ in waiting:
        now += 0.01
        for length in arriving:
            push(batcher, [length], arrival=now)
        batch = batcher.take(now)
        assert batch is not None
        targets -= {id(owner(item)) for item in batch.items}
    assert not targets


def test_batcher_serves_a_late_short_request_before_a_large_one_ends() -> None:
    batcher = make_batcher()
    push(batcher, [8] * 500)
    for _ in range(3):
        assert batcher.take(0.05) is not None
    late = push(batcher, [8], arrival=0.1).request
    batch = batcher.take(0.1)
    assert batch is not None
    assert late in [owner(item) for item in batch.items]


@given(
    st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=40), min_size=1, max_size=40),
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.floats(0, 200),
)
@settings(max_examples=60, deadline=None)
def test_batch_holds_nothing_that_is_not_due_while_single_texts_wait_but_what_makes_it_no_longer(
    large: list[list[int]], single: list[int], overhead: float
) -> None:
    batcher, now = make_batcher(overhead_tokens=overhead), 0.0
    for lengths in large:
        push(batcher, lengths)
    for _ in range(3):
        for length in single:
            push(batcher, [length], arrival=now)
        while batcher.queue.num_single:
            batch = batcher.take(now)
            assert batch is not None
            due = [item.length for item in batch.items if item.due <= now]
            assert max(due) == batch.padded_length
            assert len(due) == len(batch.items) or batch.padded_tokens <= overhead
            now += (overhead + batch.padded_tokens) / RATE
        if batch := batcher.take(now):  # the lane alone fills its batches
            now += (overhead + batch.padded_tokens) / RATE


def test_batch_that_is_mostly_overhead_takes_along_what_makes_it_no_longer() -> None:
    batcher = make_batcher(Limits(64, 10_000), overhead_tokens=60)
    push(batcher, [8] * 5 + [9] * 5 + [11] * 5)
    batcher.take(0.0)
    push(batcher, [8] * 20 + [9] * 20 + [11] * 20)
    single = push(batcher, [10], arrival=0.001).request
    batch = batcher.take(0.001)
    assert batch is not None
    assert [item.length for item in batch.items] == [9] * 5 + [10]  # six times ten tokens, as much as the overhead
    assert single in [owner(item) for item in batch.items]


def test_batcher_groups_texts_of_similar_length() -> None:
    batcher = make_batcher(Limits(32, 10_000), overhead_tokens=8)
    for place in range(16):
        push(batcher, [10], arrival=place * 1e-6)
        push(batcher, [200], arrival=place * 1e-6)
    batches = [batcher.take(0.1), batcher.take(0.1)]
    assert [(len(batch.items), batch.reason, batch.padded_tokens - batch.num_tokens) for batch in batches if batch] == [
        (16, "length", 0),
        (16, "queue", 0),
    ]


def test_batcher_joins_all_lengths_when_a_run_of_its_own_costs_more() -> None:
    batcher = make_batcher(Limits(32, 10_000), overhead_tokens=5000)
    push(batcher, [10] * 8)
    push(batcher, [200] * 8)
    batch = batcher.take(0.1)
    assert batch is not None
    assert (len(batch.items), batch.padded_tokens) == (16, 3200)


@pytest.mark.parametrize(
    ("lengths", "limits", "expected"),
    [
        ([5], Limits(8, 64), (0, 1, "queue")),
        ([5] * 9, Limits(8, 64), (0, 8, "size")),
        ([20] * 9, Limits(8, 64), (0, 3, "tokens")),
        ([100], Limits(8, 64), (0, 1, "queue")),
        ([100, 100], Limits(8, 64), (0, 1, "tokens")),
        ([5, 60], Limits(8, 1000), (0, 1, "length")),
    ],
)
def test_choose_run_says_why_it_ended(lengths: list[int], limits: Limits, expected: tuple[int, int, str]) -> None:
    assert choose_run(lengths, 0, limits.max_batch_size, limits.max_batch_tokens, overhead_tokens=1) == expected


def test_choose_run_grows_to_both_sides_of_the_head() -> None:
    assert choose_run([1, 9, 10, 11, 60], 2, max_size=8, max_tokens=1000, overhead_tokens=4) == (1, 4, "length")


def test_batcher_drops_dead_clients_and_may_be_left_with_nothing() -> None:
    batcher = make_batcher()
    push(batcher, [5, 5]).waiter.cancel()
    assert batcher.take(0.0) is None


def test_wait_is_zero_without_a_timer_and_none_when_nothing_is_queued() -> None:
    batcher = make_batcher()
    assert batcher.wait_seconds(0.0) is None
    push(batcher, [5], arrival=3.0)
    assert batcher.wait_seconds(3.0) == 0.0


def test_wait_counts_from_the_oldest_arrival_and_ends_when_a_batch_is_full() -> None:
    batcher = make_batcher(Limits(4, 64, max_wait_seconds=0.010))
    push(batcher, [5], arrival=1.0)
    assert batcher.wait_seconds(1.004) == pytest.approx(0.006)
    assert batcher.wait_seconds(1.020) == 0.0
    push(batcher, [5] * 3, arrival=1.003)
    assert batcher.wait_seconds(1.004) == 0.0


def test_batch_stays_within_what_a_run_may_take() -> None:
    # (4 + tokens) / 1000 s, and up to 1.25 times that: 76 tokens in a tenth of a second.
    batcher = make_batcher(Limits(64, 10_000, max_run_seconds=0.1))
    push(batcher, [10] * 20)
    sizes = []
    while (batch := batcher.take(0.0)) is not None:
        sizes.append((len(batch.items), batch.reason))
    assert sizes == [(7, "latency"), (7, "latency"), (6, "queue")]


def test_text_that_takes_longer_than_a_run_may_goes_alone() -> None:
    batcher = make_batcher(Limits(64, 10_000, max_run_seconds=0.001))
    push(batcher, [40, 40])
    assert batcher.is_full()
    batches = [batcher.take(0.0), batcher.take(0.0)]
    assert [len(batch.items) for batch in batches if batch] == [1, 1]


def test_batch_leaves_their_parts_to_others_that_are_free() -> None:
    batcher = make_batcher(Limits(64, 10_000))
    push(batcher, [10] * 7)
    sizes = []
    for num_takers in (2, 1):
        batch = batcher.take(0.0, num_takers)
        assert batch is not None
        sizes.append(len(batch.items))
    assert sizes == [4, 3]


@pytest.mark.parametrize(
    ("overhead_tokens", "sizes"),
    [
        (0, [4, 2, 1, 1]),  # half of what waits, as often as a run begins
        (4, [4, 2, 2]),  # 16 tokens are worth a run: two texts
        (20, [8]),  # all of them are not
    ],
)
def test_batch_leaves_a_share_that_is_worth_a_run_to_the_runs_that_end_next(
    overhead_tokens: float, sizes: list[int]
) -> None:
    batcher = make_batcher(Limits(64, 10_000), overhead_tokens, num_runs=2)
    push(batcher, [10] * 8)
    batches = []
    while (batch := batcher.take(0.0)) is not None:
        batches.append(len(batch.items))
    assert batches == sizes


def test_batch_keeps_to_the_grid_and_the_text_due_first() -> None:
    batcher = make_batcher(Limits(64, 10_000), overhead_tokens=1000, grid=ShapeGrid(256, is_coarse=True))
    first = push(batcher, [30]).request
    push(batcher, [13] * 10, arrival=0.001)
    batch = batcher.take(0.01)
    assert batch is not None
    assert batch.pad()[0].shape == (10, 32)
    assert (batch.padded_tokens, batch.num_tokens) == (320, 30 + 9 * 13)
    assert first in [owner(item) for item in batch.items]
    assert len(batcher.queue) == 1


def test_batcher_keeps_to_what_the_engines_memory_holds() -> None:
    batcher = make_batcher()
    push(batcher, [10] * 8)
    batcher.limit_tokens(25)
    assert batcher.max_tokens == 25
    first = batcher.take(0.0)
    assert first is not None
    assert (len(first.items), first.reason) == (2, "tokens")
    batcher.limit_tokens(None)
    second = batcher.take(0.0)
    assert second is not None
    assert len(second.items) == 6
