"""How many cores this process may use, where the machine, the scheduler or a container allows fewer than there are."""

import math
import os
from pathlib import Path


def count_cores(root: Path = Path("/")) -> int:
    """Cores of the process's affinity, or as many as its control groups' CPU quota pays for if those are fewer.

    Args:
        root: where /proc and /sys are.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min([cores, *map(math.ceil, _quotas(root))]), 1)


def _quotas(root: Path) -> list[float]:
    """What each control group above the process allows, in cores: version 2's cpu.max, version 1's quota and period."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    quotas = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / ("sys/fs/cgroup/cpu" if controllers else "sys/fs/cgroup")
        # A container sees its own group as the top one, whatever path the line says.
        folder = top / group.lstrip("/")
        for place in (folder, *(parent for parent in folder.parents if parent.is_relative_to(top))):
            quotas += _quota(place)
    return quotas


def _quota(place: Path) -> list[float]:
    try:
        if (place / "cpu.max").is_file():
            quota, period = (place / "cpu.max").read_text().split()
        else:
            quota = (place / "cpu.cfs_quota_us").read_text().strip()
            period = (place / "cpu.cfs_period_us").read_text().strip()
        return [] if quota in ("max", "-1") else [int(quota) / int(period)]
    except (OSError, ValueError, ZeroDivisionError):  # no such group here
        return []
