from concurrent.futures import Future

import numpy as np
import pytest

from serving.errors import EngineFailed, Overloaded
from serving.request_queue import FAIR_SHARE, Item, Request, RequestQueue

RATE = 1000.0


def make_request(count: int = 1, arrival: float = 0.0) -> tuple[Request, "Future[None]"]:
    waiter: Future[None] = Future()
    return Request(count, 4, arrival, waiter), waiter


def push(queue: RequestQueue, *lengths: int, arrival: float = 0.0) -> tuple[Request, "Future[None]"]:
    request, waiter = make_request(len(lengths), arrival)
    queue.push(request, [np.arange(length) for length in lengths], RATE)
    return request, waiter


def owners(items: list[Item]) -> list[Request]:
    return [item.request for item in items]


def test_queue_counts_texts_and_tokens() -> None:
    queue = RequestQueue(100, 10)
    push(queue, 3, 5)
    push(queue, 7)
    assert (len(queue), queue.num_tokens) == (3, 15)
    window = queue.peek(2)
    queue.remove(window, window)
    assert (len(queue), queue.num_tokens) == (1, 15 - sum(item.length for item in window))


def test_admission_lets_any_request_into_an_empty_queue() -> None:
    queue = RequestQueue(max_tokens=1, max_size=1)
    queue.admit(RATE)
    push(queue, *[10] * 2048)
    assert len(queue) == 2048


@pytest.mark.parametrize(("max_tokens", "max_size"), [(8, 100), (100, 1)])
def test_admission_refuses_at_either_limit(max_tokens: int, max_size: int) -> None:
    queue = RequestQueue(max_tokens, max_size)
    push(queue, 7) if max_size > 1 else None
    queue.admit(RATE)
    push(queue, 1)
    with pytest.raises(Overloaded):
        queue.admit(RATE)


def test_admission_counts_texts_still_being_tokenised() -> None:
    queue = RequestQueue(100, max_size=5)
    push(queue, 1)
    queue.admit(RATE, num_coming=3)
    with pytest.raises(Overloaded):
        queue.admit(RATE, num_coming=4)


@pytest.mark.parametrize(("tokens", "seconds"), [(10, 1), (4500, 5), (9000, 9)])
def test_overloaded_says_when_the_queue_will_be_empty(tokens: int, seconds: int) -> None:
    queue = RequestQueue(max_tokens=1, max_size=100)
    push(queue, tokens)
    with pytest.raises(Overloaded) as raised:
        queue.admit(RATE)
    assert raised.value.retry_after_seconds == seconds
    assert f"{tokens} tokens" in str(raised.value)


def test_short_request_overtakes_the_tail_of_a_large_one() -> None:
    queue = RequestQueue(10_000, 10_000)
    large, _ = push(queue, *[10] * 100, arrival=0.0)
    late, _ = push(queue, 10, arrival=0.1)
    # By then the large request was owed a tenth of a second of a quarter of the engine.
    position = owners(queue.peek(101)).index(late)
    assert position == pytest.approx(0.1 * RATE * FAIR_SHARE / 10, abs=1)
    assert owners(queue.peek(1)) == [large]


def test_two_large_requests_take_turns() -> None:
    queue = RequestQueue(10_000, 10_000)
    first, _ = push(queue, *[10] * 100)
    second, _ = push(queue, *[10] * 100)
    for count in (10, 50, 150):
        served = owners(queue.peek(count))
        assert abs(served.count(first) - served.count(second)) <= 1


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
