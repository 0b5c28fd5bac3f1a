"""What an installation weighs: the files of a package and of everything it needs."""

import re
from collections.abc import Iterable, Sequence
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import Requirement


def installed_mb(requirement: str, distributions: Iterable[Distribution]) -> float:
    """Size in 10^6 bytes of what `requirement` (`name[extra]`) needs, itself included, of what is installed.

    Raises KeyError where a part of it is not installed.
    """
    by_name = {_normal(distribution.name): distribution for distribution in distributions}
    seen: dict[str, set[str]] = {}
    todo = [Requirement(requirement)]
    while todo:
        wanted = todo.pop()
        name = _normal(wanted.name)
        fresh = ({""} | wanted.extras) - seen.get(name, set())
        if fresh:
            seen.setdefault(name, set()).update(fresh)
            todo += _needs(by_name[name].requires or [], fresh)
    return sum(_size_bytes(by_name[name]) for name in seen) / 1e6


def _needs(lines: Sequence[str], extras: Iterable[str]) -> list[Requirement]:
    """Requirements that hold here, for any of `extras`."""
    wanted = [Requirement(line) for line in lines]
    return [
        need
        for need in wanted
        if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras)
    ]


def _size_bytes(distribution: Distribution) -> int:
    files = [Path(str(file.locate())) for file in distribution.files or ()]
    return sum(file.stat().st_size for file in files if file.is_file())


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
