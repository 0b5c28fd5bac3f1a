"""Which version answers: shares, stickiness, and how few keys move."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import InvalidRequest
from serving.traffic import check_weights, pick_by_count, pick_by_key, read_routing

VERSIONS = ("a", "b", "c", "d")
KEYS = [f"user-{number}".encode() for number in range(2000)]

weight = st.floats(min_value=0.05, max_value=20)
some_weights = st.dictionaries(st.sampled_from(VERSIONS), st.one_of(st.just(0.0), weight), min_size=1).filter(
    lambda weights: any(weights.values())
)


def shares(weights: dict[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {version: value / total for version, value in weights.items()}


@given(some_weights)
def test_keys_are_shared_out_by_weight(weights: dict[str, float]) -> None:
    counts = Counter(pick_by_key(weights, key) for key in KEYS)
    for version, share in shares(weights).items():
        # Five standard deviations of a fixed set of keys.
        assert abs(counts[version] / len(KEYS) - share) <= 5 * (share * (1 - share) / len(KEYS)) ** 0.5 + 1e-9


@given(some_weights, st.binary(max_size=40))
def test_key_keeps_its_version_whatever_the_order_and_scale_of_the_weights(
    weights: dict[str, float], key: bytes
) -> None:
    chosen = pick_by_key(weights, key)
    assert weights[chosen] > 0
    assert pick_by_key(dict(reversed(weights.items())), key) == chosen
    assert pick_by_key({version: 4 * value for version, value in weights.items()}, key) == chosen


@given(some_weights, st.sampled_from(VERSIONS), weight)
def test_weight_that_changes_moves_keys_to_or_from_its_version_only(
    weights: dict[str, float], changed: str, value: float
) -> None:
    after = weights | {changed: value}
    has_grown = value > weights.get(changed, 0)
    moved = 0
    for key in KEYS[:400]:
        old, new = pick_by_key(weights, key), pick_by_key(after, key)
        if old != new:
            moved += 1
            assert (new if has_grown else old) == changed
    difference = abs(shares(after)[changed] - shares(weights).get(changed, 0))
    assert moved / 400 <= difference + 5 * (difference / 400) ** 0.5 + 0.01


@given(some_weights, st.integers(0, 10**9))
def test_requests_without_a_key_are_spread_evenly_from_any_moment_on(weights: dict[str, float], start: int) -> None:
    counts = Counter(pick_by_count(weights, count) for count in range(start, start + 500))
    for version, share in shares(weights).items():
        assert abs(counts[version] - 500 * share) <= 8
        assert share > 0 or not counts[version]


def test_weights_are_checked_against_the_versions_served() -> None:
    assert check_weights({"a": 1}, ["a", "b"]) == {"a": 1.0, "b": 0.0}
    with pytest.raises(InvalidRequest, match="not served, served are a, b"):
        check_weights({"c": 1}, ["a", "b"])
    for wrong in (-1, float("nan"), 1e10):
        with pytest.raises(InvalidRequest, match="limits 0 and 1e9"):
            check_weights({"a": wrong}, ["a"])
    for none in ({}, {"a": 0}):
        with pytest.raises(InvalidRequest, match="all weights are 0"):
            check_weights(none, ["a"])


def test_routing_is_read_from_headers() -> None:
    headers = [(b"host", b"x"), (b"x-model-version", b"v1"), (b"x-traffic-key", b"me"), (b"x-user", b"you")]
    assert read_routing(headers, b"x-traffic-key") == ("v1", b"me")
    assert read_routing(headers, b"x-user") == ("v1", b"you")
    assert read_routing([], b"x-traffic-key") == (None, None)
