import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.vector_cache import VectorCache


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int64)


def vector(value: float) -> np.ndarray:
    return np.full(8, value, dtype=np.float32)


def test_cache_gives_the_vector_of_exactly_these_ids() -> None:
    cache = VectorCache(10_000)
    cache.put(ids(2, 6, 3), vector(1))
    found = cache.get(ids(2, 6, 3))
    assert found is not None
    assert found.tolist() == [1] * 8
    assert cache.get(ids(2, 6)) is None
    assert cache.get(ids(2, 6, 3, 0)) is None


def test_cache_keeps_no_batch_alive() -> None:
    cache, batch = VectorCache(10_000), np.ones((64, 8), dtype=np.float32)
    cache.put(ids(1), batch[3])
    batch[3] = 7
    found = cache.get(ids(1))
    assert found is not None
    assert found.base is None
    assert found.tolist() == [1] * 8


def test_cache_of_no_bytes_keeps_nothing() -> None:
    cache = VectorCache(0)
    cache.put(ids(1), vector(1))
    assert (len(cache), cache.num_bytes) == (0, 0)


def test_text_least_recently_asked_for_leaves() -> None:
    cache = VectorCache(700)  # two of 332 bytes
    cache.put(ids(1), vector(1))
    cache.put(ids(2), vector(2))
    assert cache.get(ids(1)) is not None
    cache.put(ids(3), vector(3))
    assert [cache.get(ids(i)) is not None for i in (1, 2, 3)] == [True, False, True]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=60), st.integers(0, 2000))
@settings(max_examples=100, deadline=None)
def test_cache_stays_within_its_bytes_and_never_answers_with_another_vector(
    steps: list[tuple[bool, int]], max_bytes: int
) -> None:
    cache = VectorCache(max_bytes)
    for is_put, token in steps:
        if is_put:
            cache.put(ids(token), vector(token))
        elif (found := cache.get(ids(token))) is not None:
            assert found.tolist() == [token] * 8
        assert cache.num_bytes == 332 * len(cache) <= max_bytes
