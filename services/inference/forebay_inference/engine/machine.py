"""The CPUs and the memory that this process may use, which its cgroups may bound. Libraries do not look at these."""

import contextlib
import math
import os
from pathlib import Path
from typing import Final

import psutil

_CGROUPS: Final = Path("/sys/fs/cgroup")
_OWN_CGROUP: Final = Path("/proc/self/cgroup")
_UNIFIED: Final = "0::/"


def allowed_cpus() -> int:
    """How many its affinity names."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cpus() -> int:
    """For how many threads: its affinity, the quotas of its cgroups, and OMP_NUM_THREADS."""
    count = allowed_cpus()
    for file in _cgroup_files("cpu.max"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = file.read_text().split()
            if quota != "max":
                count = min(count, math.ceil(int(quota) / int(period)))
    with contextlib.suppress(ValueError):
        # A list has a number for each level of nesting.
        count = min(count, int(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]))
    return max(1, count)


def available_memory() -> int:
    """Bytes of main memory that it may still take: the machine's, or its cgroups' where that is less."""
    available = int(psutil.virtual_memory().available)
    for file in _cgroup_files("memory.max"):
        with contextlib.suppress(OSError, ValueError):  # ValueError: there is no limit
            free = int(file.read_text()) - int(file.with_name("memory.current").read_text())
            available = min(available, max(0, free))
    return available


def _cgroup_files(name: str) -> list[Path]:
    """The files `name` of the cgroup (version 2) that this process is in and of those around it: each may limit it."""
    try:
        lines = _OWN_CGROUP.read_text().splitlines()
    except OSError:
        return []
    own = next((line.removeprefix(_UNIFIED) for line in lines if line.startswith(_UNIFIED)), "")
    folder = _CGROUPS / own
    return [one / name for one in (folder, *folder.parents) if one.is_relative_to(_CGROUPS)]
