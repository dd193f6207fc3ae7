"""Limits of Linux's control groups, version 2 or 1: the resources that containers and batch systems grant a process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that the groups of this process can still take; None: no group limits it.

    Parameters
    ----------
    root : Path
        Where the system's ``proc`` and ``sys`` are.
    """
    version_1, version_2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")
    bounds = []
    for group, is_version_2 in _own_groups("memory", root):
        limit, used = version_2 if is_version_2 else version_1
        try:
            free = int((group / limit).read_text()) - int((group / used).read_text())
            counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # there is no such group, or its limit is "max"
            continue
        # The page cache counts as used, but the kernel reclaims it when memory is needed. In version 1 the total_
        # entries include the groups below.
        reclaimable = (counts.get(f"total_{name}", counts.get(name, 0)) for name in ("inactive_file", "active_file"))
        bounds.append(max(0, free + sum(map(int, reclaimable))))
    return min(bounds, default=None)


def processor_share(root: Path = Path("/")) -> float | None:
    """How many processors' time the groups of this process get; None: no group limits it.

    Parameters
    ----------
    root : Path
        Where the system's ``proc`` and ``sys`` are.
    """
    shares = []
    for group, is_version_2 in _own_groups("cpu", root):
        try:
            if is_version_2:
                quota, period = (group / "cpu.max").read_text().split()
            else:
                quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0:  # version 1 has -1 where there is no limit
                shares.append(int(quota) / int(period))
        except (OSError, ValueError):  # there is no such group, or its quota is "max"
            continue
    return min(shares, default=None)


def _own_groups(controller: str, root: Path) -> Iterator[tuple[Path, bool]]:
    """Folders of the groups that this process is in and of their ancestors, and whether they are of version 2."""
    try:
        memberships = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        names = Path(path).parts[1:]  # in a container, they may name groups that only its host sees
        for depth in range(len(names) + 1):
            yield top.joinpath(*names[:depth]), not controllers
