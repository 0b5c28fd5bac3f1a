from concurrent.futures import Future
from itertools import count, cycle, groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import EngineFailed
from serving.request_queue import BULK_SHARE, Item, Request, RequestQueue, put_rows

RATE = 1000.0


def make_request(count: int = 1, arrival: float = 0.0) -> tuple[Request, "Future[None]"]:
    waiter: Future[None] = Future()
    return Request(count, 4, arrival, waiter), waiter


numbers = count(1)


def push(queue: RequestQueue, *lengths: int, arrival: float = 0.0) -> tuple[Request, "Future[None]"]:
    """Texts that no other has."""
    request, waiter = make_request(len(lengths), arrival)
    queue.push(request, [np.full(length, next(numbers)) for length in lengths], RATE)
    return request, waiter


def push_ids(
    queue: RequestQueue, *ids: int, arrival: float = 0.0, recalled: tuple[int, ...] = ()
) -> tuple[Request, "Future[None]", int]:
    """Texts of one token each; also says how many share a row."""
    request, waiter = make_request(len(ids), arrival)
    return request, waiter, queue.push(request, [np.array([i]) for i in ids], RATE, recalled=recalled)


def owners(items: list[Item]) -> list[Request]:
    return [request for item in items for request, _ in item.places]


def test_queue_counts_texts_and_tokens() -> None:
    queue = RequestQueue(100, 10)
    push(queue, 3, 5)
    push(queue, 7)
    assert (len(queue), queue.num_tokens) == (3, 15)
    window = queue.peek(2)
    queue.remove(window, window, 0.0)
    assert (len(queue), queue.num_tokens) == (1, 15 - sum(item.length for item in window))


@pytest.mark.parametrize("is_bulk", [False, True])
def test_queue_is_full_at_either_limit_for_its_own_kind_and_counts_texts_still_being_tokenised(is_bulk: bool) -> None:
    queue = RequestQueue(max_tokens=8, max_size=5)
    push(queue, *([3, 4] if is_bulk else [7]))
    waiting = len(queue)
    assert not queue.is_full(is_bulk, num_coming=4 - waiting)
    assert queue.is_full(is_bulk, num_coming=5 - waiting)
    push(queue, *([1, 1] if is_bulk else [1]))
    assert queue.is_full(is_bulk)
    assert not queue.is_full(not is_bulk)


def test_queue_takes_any_request_it_is_given() -> None:
    queue = RequestQueue(max_tokens=1, max_size=1)
    assert not queue.is_full(True)
    push(queue, *[10] * 2048)
    assert len(queue) == 2048


def test_due_tokens_are_those_a_newcomer_cannot_overtake() -> None:
    queue = RequestQueue(10_000, 10_000)
    push(queue, *[10] * 100)
    assert queue.count_due_tokens(now=0.0) == 10
    # A tenth of a second at a quarter of a thousand tokens: the first text and two and a half more.
    assert queue.count_due_tokens(now=0.1) == 35
    assert queue.count_due_tokens(now=10.0) == 1000
    push(queue, 7, arrival=0.1)
    assert queue.count_due_tokens(now=0.1) == 42


def test_short_request_overtakes_the_tail_of_a_large_one() -> None:
    queue = RequestQueue(10_000, 10_000)
    large, _ = push(queue, *[10] * 100, arrival=0.0)
    late, _ = push(queue, 10, arrival=0.1)
    # By then the large request was owed a tenth of a second of a quarter of the engine.
    position = owners(queue.peek(101)).index(late)
    assert position == pytest.approx(0.1 * RATE * BULK_SHARE / 10, abs=1)
    assert owners(queue.peek(1)) == [large]


def test_large_requests_take_turns_the_first_being_owed_twice_as_much_as_the_second() -> None:
    queue = RequestQueue(10_000, 10_000)
    first, _ = push(queue, *[10] * 100)
    second, _ = push(queue, *[10] * 100)
    for size in (10, 50, 150):
        served = owners(queue.peek(size))
        assert abs(served.count(first) - 2 * served.count(second)) <= 2


def test_texts_of_a_large_request_have_their_turns_together_and_as_many_of_them_as_alone() -> None:
    queue = RequestQueue(10_000, 10_000, turn_size=8)
    first, _ = push(queue, *[10] * 96)
    second, _ = push(queue, *[10] * 96)
    served = owners(queue.peek(150))
    turns = [(owner, len(list(texts))) for owner, texts in groupby(served)]
    assert turns[0] == (first, 16), "two of its turns end before the first of the other"
    assert all(size % 8 == 0 for _, size in turns[:-1])
    assert abs(served.count(first) - 2 * served.count(second)) <= 16
    few, _ = push(queue, 10, 10)
    assert owners(queue.peek(2)) == [few, few], "fewer texts than have their turn together wait for no others"


def test_turns_in_the_lane_count_requests_that_are_still_there() -> None:
    queue = RequestQueue(100_000, 100_000)
    large = [push(queue, *[10] * 100) for _ in range(20)]
    for _, waiter in large[1:]:
        waiter.cancel()
    late, _ = push(queue, *[10] * 100, arrival=9.0)
    served = owners(queue.peek(90))
    assert served.count(late) == pytest.approx(30, abs=1)


many_texts = st.lists(st.integers(1, 30), min_size=2, max_size=30)


@given(st.lists(many_texts, min_size=1, max_size=60), st.lists(st.integers(1, 30), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_lane_gets_its_share_and_no_more_while_single_texts_wait_however_many_large_requests(
    large: list[list[int]], single: list[int]
) -> None:
    queue, now, lane_tokens = RequestQueue(10**9, 10**9), 0.0, 0
    for lengths in large:
        push(queue, *lengths)
    coming = cycle(single)
    while queue.num_bulk_tokens:
        while queue.num_single < 3:
            push(queue, next(coming), arrival=now)
        window = queue.peek(1)
        lane_tokens += sum(item.length for item in window if item.is_bulk)
        queue.remove(window, window, now)
        now += window[0].length / RATE
        owed = BULK_SHARE * RATE * now
        assert owed - 60 <= lane_tokens <= owed + 30  # the texts that wait, and the one that runs


@given(st.lists(many_texts, min_size=1, max_size=60))
@settings(max_examples=30, deadline=None)
def test_lane_owes_nothing_for_what_it_got_while_no_single_text_waited(large: list[list[int]]) -> None:
    queue, now = RequestQueue(10**9, 10**9), 100.0
    for lengths in large:
        push(queue, *lengths, arrival=now)
    while queue.num_bulk_tokens > 100:
        window = queue.peek(1)
        queue.remove(window, window, now)
        now += window[0].length / RATE
        (head,) = queue.peek(1)
        assert head.due <= now + 30 / (BULK_SHARE * RATE)


def test_lone_requests_leave_in_order_of_arrival() -> None:
    queue = RequestQueue(10_000, 10_000)
    requests = [push(queue, length, arrival=0.001 * length)[0] for length in (5, 1, 9, 3)]
    assert owners(queue.peek(4)) == sorted(requests, key=lambda request: request.arrival)


def test_texts_of_dead_requests_are_dropped() -> None:
    queue = RequestQueue(10_000, 10_000)
    _, waiter = push(queue, 5, 6)
    alive, _ = push(queue, 7, arrival=1.0)
    waiter.cancel()
    assert owners(queue.peek(10)) == [alive]
    assert (len(queue), queue.num_tokens) == (1, 7)


def test_oldest_arrival_is_of_the_text_due_first() -> None:
    queue = RequestQueue(10_000, 10_000)
    assert queue.oldest_arrival() is None
    push(queue, 5, arrival=2.0)
    push(queue, 5, arrival=1.0)
    assert queue.oldest_arrival() == 1.0


def test_request_resolves_once_when_its_last_vector_arrives() -> None:
    request, waiter = make_request(2)
    request.put(1, np.full(4, 2, dtype=np.float32))
    assert not waiter.done()
    request.put(0, np.full(4, 1, dtype=np.float32))
    assert waiter.result(0) is None
    assert request.vectors[:, 0].tolist() == [1, 2]
    request.fail(EngineFailed("too late"))
    assert waiter.exception(0) is None


def test_request_fails_once_and_ignores_later_vectors() -> None:
    request, waiter = make_request(2)
    request.fail(EngineFailed("first"))
    request.fail(EngineFailed("second"))
    request.put(0, np.zeros(4, dtype=np.float32))
    request.put(1, np.zeros(4, dtype=np.float32))
    assert str(waiter.exception(0)) == "first"
    assert request.is_dead


def vector(value: int) -> np.ndarray:
    return np.full(4, value, dtype=np.float32)


def test_identical_texts_in_flight_share_a_row() -> None:
    queue = RequestQueue(100, 100)
    first, first_waiter, _ = push_ids(queue, 5, 6, 5)
    second, second_waiter, num_shared = push_ids(queue, 6, arrival=1.0)
    assert (len(queue), queue.num_tokens, num_shared) == (2, 2, 1)
    window = queue.peek(9)
    queue.remove(window, window, 0.0)
    third, third_waiter, _ = push_ids(queue, 5, arrival=2.0)  # its twin runs already
    assert len(queue) == 0
    queue.forget(window)
    for item in window:
        put_rows([item], vector(int(item.ids[0]))[None])
    for waiter in (first_waiter, second_waiter, third_waiter):
        assert waiter.result(0) is None
    assert [request.vectors[:, 0].tolist() for request in (first, second, third)] == [[5, 6, 5], [6], [5]]
    assert push_ids(queue, 5, arrival=3.0)[2] == 0


def test_single_text_does_not_wait_for_its_twin_in_the_lane_but_brings_it_forward() -> None:
    queue = RequestQueue(100, 100)
    large, large_waiter, _ = push_ids(queue, *range(20))
    late, late_waiter, num_shared = push_ids(queue, 19, arrival=0.001)
    assert (num_shared, len(queue), queue.num_single_tokens, queue.num_bulk_tokens) == (1, 20, 1, 19)
    first, second = queue.peek(2)
    assert [owners([first]), owners([second])] == [[large], [large, late]]
    put_rows([second], vector(19)[None])
    assert late_waiter.result(0) is None
    assert not large_waiter.done()
    assert large.missing == 19


def test_text_of_a_large_request_does_not_wait_for_a_twin_with_a_later_turn() -> None:
    queue = RequestQueue(100, 100)
    push_ids(queue, *range(20))
    _, _, num_shared = push_ids(queue, 18, 19)
    assert num_shared == 0


def test_dead_waiter_does_not_take_the_row_from_others() -> None:
    queue = RequestQueue(100, 100)
    _, dead, _ = push_ids(queue, 5)
    alive, waiter, _ = push_ids(queue, 5, arrival=1.0)
    dead.cancel()
    (item,) = queue.peek(9)
    put_rows([item], vector(5)[None])
    assert waiter.result(0) is None
    assert alive.vectors[0, 0] == 5


def test_text_after_a_dropped_twin_gets_a_row_of_its_own() -> None:
    queue = RequestQueue(100, 100)
    push_ids(queue, 5)[1].cancel()
    assert queue.peek(9) == []
    assert push_ids(queue, 5, arrival=1.0)[2] == 0
    assert len(queue) == 1


def test_failure_of_a_shared_row_names_the_place_in_each_request() -> None:
    queue = RequestQueue(100, 100)
    _, first, _ = push_ids(queue, 5)
    _, second, _ = push_ids(queue, 7, 5, arrival=1.0)
    next(item for item in queue.peek(9) if item.ids[0] == 5).fail(EngineFailed, "it raised")
    assert str(first.exception(0)) == "text 0: it raised"
    assert str(second.exception(0)) == "text 1: it raised"


def test_recalled_texts_are_not_queued() -> None:
    queue = RequestQueue(100, 100)
    request, waiter, _ = push_ids(queue, 5, 6, 7, recalled=(0, 2))
    (item,) = queue.peek(9)
    for index in (0, 2):
        request.put(index, vector(index))
    put_rows([item], vector(6)[None])
    assert waiter.result(0) is None
    assert request.vectors[:, 0].tolist() == [0, 6, 2]


steps = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.lists(st.integers(1, 6), min_size=1, max_size=6)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("take"), st.integers(1, 4)),
        st.tuples(st.just("answer"), st.just(0)),
    ),
    max_size=40,
)


@given(steps)
@settings(max_examples=200, deadline=None)
def test_every_waiter_gets_its_vectors_whoever_shares_a_row_or_gives_up(steps: list[tuple[str, object]]) -> None:
    queue, pushed, running = RequestQueue(10**6, 10**6), [], []
    for now, (step, value) in enumerate([*steps, ("take", 10**6), ("answer", 0)]):
        if step == "push":
            request, waiter, _ = push_ids(queue, *value, arrival=now * 0.01)  # type: ignore[misc]
            pushed.append((request, waiter, value))
        elif step == "cancel" and pushed:
            pushed[value % len(pushed)][1].cancel()  # type: ignore[operator]
        elif step == "take":
            window = queue.peek(value)  # type: ignore[arg-type]
            queue.remove(window, window, 0.0)
            running.append(window)
        elif step == "answer":
            while running:
                window = running.pop(0)
                queue.forget(window)
                for item in window:
                    put_rows([item], vector(int(item.ids[0]))[None])
    for request, waiter, ids in pushed:
        assert waiter.cancelled() or waiter.result(0) is None
        if not waiter.cancelled():
            assert request.vectors[:, 0].tolist() == ids
        assert request.missing >= 0
    assert (len(queue), queue.num_tokens, queue._in_flight) == (0, 0, {})


def test_rows_of_a_batch_reach_all_who_wait_for_them_but_those_that_failed() -> None:
    waiters = [Future[None]() for _ in range(3)]
    first, second, third = (Request(count, 4, 0.0, waiter) for count, waiter in zip((3, 1, 2), waiters, strict=True))
    places = [[(first, 2)], [(second, 0), (third, 1)], [(first, 0), (third, 0)], [(first, 1)]]
    items = [Item(np.array([n]), 1, 0.0, b"%d" % n, 0.0, each) for n, each in enumerate(places)]
    vectors = np.stack([vector(n) for n in range(4)])
    assert set(put_rows(items, vectors, failed=(3,))) == {first, second, third}
    assert second.vectors[:, 0].tolist() == [1]
    assert third.vectors[:, 0].tolist() == [2, 1]
    assert [waiter.done() for waiter in waiters] == [False, True, True]
    put_rows(items[3:], vectors[3:])
    assert first.vectors[:, 0].tolist() == [2, 3, 0]
    assert waiters[0].done()
