"""Who is let in: a request that could not be answered within the latency objective is refused at once. Pure.

What a newcomer waits for is the rest of the running batches and the texts due before it, at the speed the engine shows.
The prediction is checked against what requests really took, so that what it leaves out (the event loop's own share,
other processes on the cores) is learned too.
"""

import math
from dataclasses import dataclass

from serving.errors import Overloaded, RequestTooLarge
from serving.latency_model import Quantile

# A request predicted to take less than this part of the objective says little about a long queue.
_LEARN_SHARE = 0.2
# What is learned swings around its value: aim below the objective, so as to stay within it.
_HEADROOM = 0.8
# Of the tokens that an idle engine could compute in time, what to send in one request: tokenising and others count too.
_ADVISED_SHARE = 0.5
# A refusal stands this long unless a run ends: by no more can the wait it speaks of have shrunk.
_STANDING_SECONDS = 0.002
# After a refusal for the wait others are likely for this long.
_FLOOD_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Backlog:
    """What a newcomer finds: texts and tokens waiting, and the seconds until its own text has run."""

    size: int
    tokens: int
    is_full: bool
    due_tokens: int
    seconds: float


class StandingRefusal:
    """A refusal that the next requests get as well, unseen: a flood is turned away before it is parsed."""

    def __init__(self) -> None:
        self._refusal: Overloaded | None = None
        self._until = 0.0

    def hold(self, refusal: Overloaded, now: float) -> None:
        """Let `refusal` stand."""
        self._refusal, self._until = refusal, now + _STANDING_SECONDS

    def drop(self) -> None:
        """A run has ended: the next request is looked at anew."""
        self._refusal = None

    def get(self, now: float) -> Overloaded | None:
        """Why the next request is refused, whatever it asks, the same object as long as it stands; None: look at it."""
        return self._refusal if now < self._until else None


class Admission:
    """One rule for requests of one text and of many: whether the first text would be answered in time."""

    def __init__(self, objective_seconds: float) -> None:
        self._objective_seconds = objective_seconds
        self._tail = Quantile(0.95, start=1.25, low=0.5, high=4.0)
        self.standing = StandingRefusal()
        self._flooded_until = 0.0

    def is_flooded(self, now: float) -> bool:
        """Whether requests were refused for the wait just now, so that it pays to look at the next ones unread."""
        return now < self._flooded_until

    @property
    def max_wait_seconds(self) -> float:
        """The longest predicted wait that is still let in."""
        return _HEADROOM * self._objective_seconds / self._tail.value

    def check(self, backlog: Backlog, now: float) -> None:
        """Let a request in, however many texts it has itself. Raises Overloaded, which says when to come back.

        A queue without a text that is due lets anybody in: whatever the objective, the engine is never left idle.
        """
        if not backlog.is_full and (backlog.due_tokens == 0 or backlog.seconds <= self.max_wait_seconds):
            return
        seconds = max(1.0, math.ceil(backlog.seconds))
        why = (
            "the queue is full"
            if backlog.is_full
            else f"the limit is a wait of {self._objective_seconds * 1000:.0f} ms"
        )
        refusal = Overloaded(
            f"{backlog.size} texts with {backlog.tokens} tokens are waiting and {why}: try again in {seconds:.0f} s",
            retry_after_seconds=seconds,
        )
        if not backlog.is_full:  # that one kind of request fills its queue says nothing about the other
            self.standing.hold(refusal, now)
            self._flooded_until = now + _FLOOD_SECONDS
        raise refusal

    @staticmethod
    def check_size(num_tokens: int, engine_seconds: float, timeout_seconds: float) -> None:
        """Raises RequestTooLarge for a request that an engine with nothing else to do would be too slow for.

        It would be computed for the whole timeout, at the cost of all others, to be answered with a failure.
        """
        if engine_seconds > timeout_seconds:
            advised = int(_ADVISED_SHARE * num_tokens * timeout_seconds / engine_seconds)
            raise RequestTooLarge(
                f"the texts have {num_tokens} tokens, which take the engine about {engine_seconds:.3g} s, limit "
                f"{timeout_seconds:g} s: send at most {advised} in a request"
            )

    def observe(self, predicted_seconds: float, seconds: float) -> None:
        """Learn from a request of one text: what it was predicted to take, and what it took."""
        if predicted_seconds >= _LEARN_SHARE * self._objective_seconds:
            self._tail.observe(seconds / predicted_seconds)
