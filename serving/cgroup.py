"""How much processor time the container's limits leave: quotas of control groups, which no affinity shows."""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def cpu_quota(process: Path = Path("/proc/self")) -> float:
    """Cores' worth of time that the process may take, by the tightest of its control group and those above it.

    Docker's `--cpus` and a Kubernetes limit are such quotas. Infinity where none is set, or none can be read.
    """
    return min(map(_read_quota, _list_groups(process)), default=math.inf)


def _list_groups(process: Path) -> Iterator[Path]:
    """Folders of the process's control groups that may limit its processor time, as they are mounted here."""
    try:
        lines, mounts = (_read_lines(process / name) for name in ("cgroup", "mountinfo"))
    except OSError:  # not Linux, or hidden
        return
    # `0::/path` is of version 2, `4:cpu,cpuacct:/path` of version 1.
    paths = {name: path for _, names, path in (line.split(":", 2) for line in lines) for name in names.split(",")}
    for mount in mounts:
        before, _, after = mount.partition(" - ")
        (root, point), (kind, _, options) = before.split(" ")[3:5], after.split(" ", 2)  # a source may be empty
        if kind == "cgroup2" and "" in paths:
            yield from _with_parents(Path(point), root, paths[""])
        elif kind == "cgroup" and "cpu" in options.split(",") and "cpu" in paths:
            yield from _with_parents(Path(point), root, paths["cpu"])


def _read_lines(path: Path) -> list[str]:
    """Lines with names of folders: bytes of any encoding, of which the kernel escapes spaces and newlines alone."""
    return [line for line in os.fsdecode(path.read_bytes()).split("\n") if line]


def _with_parents(point: Path, root: str, path: str) -> Iterator[Path]:
    """The folder of group `path` and those above it, of a hierarchy whose group `root` is mounted at `point`."""
    group = PurePosixPath(path)
    # A group outside of what is mounted is the host's name for the container's, which is all that can be seen.
    below = group.relative_to(root) if group.is_relative_to(root) and ".." not in group.parts else PurePosixPath()
    yield point / below
    yield from (point / parent for parent in below.parents)


def _read_quota(group: Path) -> float:
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf  # version 1 says -1
    except (OSError, ValueError, ZeroDivisionError):  # the root group has no such file; version 2 says max
        return math.inf
