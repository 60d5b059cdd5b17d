"""The CPUs that this process may use."""

import math
import os
from pathlib import Path


def usable_cpus() -> int:
    """How many: its affinity, and its cgroup's quota, at which libraries do not look."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass
    return max(1, count)
