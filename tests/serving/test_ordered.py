from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from serving.ordered import Ordered


class Thing(NamedTuple):
    key: float
    number: int


@given(st.lists(st.one_of(st.lists(st.integers(0, 9), max_size=40), st.just("look"), st.just("take"))))
def test_things_are_in_order_and_behind_their_equals(steps: list[list[int] | str]) -> None:
    ordered, expected, number = Ordered[Thing](lambda thing: thing.key), list[Thing](), 0
    for step in steps:
        if step == "look":
            assert ordered.settle() == expected
        elif step == "take":
            del ordered.settle()[:3], expected[:3]
        else:
            things = [Thing(float(key), number + place) for place, key in enumerate(sorted(map(int, step)))]
            number += len(things)
            ordered.add(things)
            expected = sorted([*expected, *things], key=lambda thing: thing.key)
        assert len(ordered) == len(expected)
        first = ordered.first
        assert first == (expected[0] if expected else None)
    assert ordered.settle() == expected
