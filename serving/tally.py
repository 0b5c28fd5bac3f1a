"""What a front process counts, until it is reported to the engine process, whose metrics are everybody's."""

from collections import Counter, defaultdict

from serving.frames import Counts
from serving.metrics import NO_MODEL


class Tally:
    """Counts of requests that this process answered."""

    def __init__(self) -> None:
        self._answers: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        self._failures: Counter[tuple[str, str, int, str]] = Counter()
        self._tls_reloads: list[str] = []

    def count_answer(self, model: str, version: str, seconds: float) -> None:
        """Count a request that was answered with vectors."""
        self._answers[model, version].append(seconds)

    def count_failure(self, model: str, version: str, status: int, error: str) -> None:
        """Count a request that failed; `error` is the error's code."""
        self._failures[model, version, status, error] += 1

    def count_refusal(self, status: int, error: str) -> None:
        """Count a request that failed before its model was known."""
        self.count_failure(NO_MODEL, NO_MODEL, status, error)

    def count_tls_reload(self, outcome: str) -> None:
        """Count a changed certificate that was read."""
        self._tls_reloads.append(outcome)

    def take(self) -> Counts | None:
        """All since the last time; None when there is nothing."""
        answers, self._answers = self._answers, defaultdict(list)
        failures, self._failures = self._failures, Counter()
        tls_reloads, self._tls_reloads = self._tls_reloads, []
        if not answers and not failures and not tls_reloads:
            return None
        return Counts(
            answers=tuple((*labels, tuple(seconds)) for labels, seconds in answers.items()),
            failures=tuple((*labels, number) for labels, number in failures.items()),
            tls_reloads=tuple(tls_reloads),
        )


class ModelTally:
    """Counts of one version of a model."""

    def __init__(self, tally: Tally, model: str, version: str) -> None:
        self._tally, self._labels = tally, (model, version)

    def count_answer(self, seconds: float) -> None:
        """See `Tally.count_answer`."""
        self._tally.count_answer(*self._labels, seconds)

    def count_failure(self, status: int, error: str) -> None:
        """See `Tally.count_failure`."""
        self._tally.count_failure(*self._labels, int(status), error)
