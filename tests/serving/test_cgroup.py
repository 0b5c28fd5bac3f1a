"""Quotas of control groups, read from files as Docker, Kubernetes and systemd lay them out."""

import math
import os
from pathlib import Path

import pytest

from serving.cgroup import cpu_quota
from serving.engines import num_cores


def make_process(folder: Path, groups: str, *mounts: str) -> Path:
    """A process's folder below /proc; `mounts` are root, mount point, kind and options, parted by spaces."""
    process = folder / "proc"
    process.mkdir()
    (process / "cgroup").write_text(groups)
    lines = ["22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw"]
    for mount in mounts:
        root, point, kind, options = mount.split()
        lines.append(f"29 22 0:26 {root} {folder / point} rw,nosuid master:9 - {kind} {kind} {options}")
    (process / "mountinfo").write_text("\n".join(lines) + "\n")
    return process


def limit(group: Path, value: str) -> None:
    """Write a quota of version 2."""
    group.mkdir(parents=True, exist_ok=True)
    (group / "cpu.max").write_text(value + "\n")


def limit_v1(group: Path, quota: int, period: int = 100_000) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (group / "cpu.cfs_period_us").write_text(f"{period}\n")


@pytest.mark.parametrize(
    ("value", "quota"), [("200000 100000", 2), ("150000 100000", 1.5), ("max 100000", math.inf), ("nonsense", math.inf)]
)
def test_container_with_a_namespace_of_its_own_has_its_quota_at_the_root(
    tmp_path: Path, value: str, quota: float
) -> None:
    limit(tmp_path / "cgroup", value)
    assert cpu_quota(make_process(tmp_path, "0::/\n", "/ cgroup cgroup2 rw")) == quota


def test_quota_of_a_group_above_counts_when_it_is_tighter(tmp_path: Path) -> None:
    process = make_process(tmp_path, "0::/kubepods/pod1/worker\n", "/ cgroup cgroup2 rw")
    root = tmp_path / "cgroup"  # which has no file cpu.max
    limit(root / "kubepods", "max 100000")
    limit(root / "kubepods" / "pod1", "300000 100000")
    limit(root / "kubepods" / "pod1" / "worker", "max 100000")
    assert cpu_quota(process) == 3
    limit(root / "kubepods" / "pod1" / "worker", "250000 100000")
    assert cpu_quota(process) == 2.5
    limit(root / "kubepods" / "pod2", "100000 100000")  # somebody else's
    assert cpu_quota(process) == 2.5


def test_quota_of_version_1_is_found_by_its_controller(tmp_path: Path) -> None:
    groups = "9:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n1:name=systemd:/docker/a\n0::/\n"
    # Docker mounts the container's own group, and shows the host's name for it.
    mounts = ("/docker/a memory cgroup rw,memory", "/docker/a cpu cgroup rw,cpu,cpuacct", "/ unified cgroup2 rw")
    process = make_process(tmp_path, groups, *mounts)
    limit_v1(tmp_path / "memory", 100_000)
    limit_v1(tmp_path / "cpu", -1)
    assert cpu_quota(process) == math.inf
    limit_v1(tmp_path / "cpu", 25_000, 50_000)
    assert cpu_quota(process) == 0.5


@pytest.mark.parametrize("path", ["/../other", "/elsewhere/a"])
def test_group_outside_of_what_is_mounted_has_the_mounted_one_s_quota(tmp_path: Path, path: str) -> None:
    limit(tmp_path / "other", "100000 100000")
    limit(tmp_path / "cgroup", "400000 100000")
    assert cpu_quota(make_process(tmp_path, f"0::{path}\n", "/docker/a cgroup cgroup2 rw")) == 4


@pytest.mark.parametrize(
    "mount",
    [
        b"30 22 0:27 / /scratch rw,relatime - tmpfs  rw",  # mounted from an empty name, as some runtimes do
        b"30 22 0:27 / /scratch rw,relatime shared:2 - tmpfs - rw",
        b"30 22 8:2 / /media/caf\xe9 rw,relatime - vfat /dev/sdb1 rw",  # a name in latin-1
        "30 22 8:2 / /media/a\u2028b rw,relatime - vfat /dev/sdb1 rw".encode(),
    ],
)
def test_other_mounts_may_be_odd(tmp_path: Path, mount: bytes) -> None:
    limit(tmp_path / "cgroup", "200000 100000")
    process = make_process(tmp_path, "0::/\n", "/ cgroup cgroup2 rw")
    with (process / "mountinfo").open("ab") as file:
        file.write(mount + b"\n")
    assert cpu_quota(process) == 2


def test_process_whose_groups_cannot_be_read_has_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "nowhere") == math.inf


@pytest.mark.parametrize(
    ("quota", "affinity", "cores"), [(2.0, 64, 2), (1.5, 64, 2), (0.25, 64, 1), (math.inf, 8, 8), (16.0, 4, 4)]
)
def test_num_cores_is_the_lesser_of_affinity_and_quota_rounded_up(
    monkeypatch: pytest.MonkeyPatch, quota: float, affinity: int, cores: int
) -> None:
    monkeypatch.setattr("serving.engines.cpu_quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)))
    assert num_cores() == cores
