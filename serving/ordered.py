"""Things in order of a key, where many come between two looks at the order. Pure."""

from bisect import insort
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

# Inserting one thing takes as long as sorting so many that are nearly in order.
_SORTED_PER_INSERTED = 32

_Thing = TypeVar("_Thing")


class Ordered(Generic[_Thing]):
    """What comes is put in its place when the order is next asked for, all of it at once.

    A thing goes behind its equals. Keys must not change while it is here.
    """

    def __init__(self, key: Callable[[_Thing], float]) -> None:
        self._key = key
        self._things: list[_Thing] = []  # in order
        self._added: list[_Thing] = []
        self._least: _Thing | None = None  # the first of those added

    def __len__(self) -> int:
        return len(self._things) + len(self._added)

    def add(self, things: Sequence[_Thing]) -> None:
        """Add things that are in order themselves."""
        if things and (self._least is None or self._key(things[0]) < self._key(self._least)):
            self._least = things[0]
        self._added += things

    @property
    def first(self) -> _Thing | None:
        """The first of all, None where there is none; sorts nothing."""
        least = self._least
        if not self._things:
            return least
        head = self._things[0]
        return head if least is None or self._key(head) <= self._key(least) else least

    def settle(self) -> list[_Thing]:
        """All of them in order: the list that is kept, from which things may be taken out."""
        if len(self._added) * _SORTED_PER_INSERTED < len(self):
            for thing in self._added:
                insort(self._things, thing, key=self._key)
        else:
            self._things += self._added
            self._things.sort(key=self._key)
        self._added, self._least = [], None
        return self._things
