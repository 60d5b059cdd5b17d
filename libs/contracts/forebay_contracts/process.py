"""Settings of the process itself: its end with its parent, its file limit, its garbage collection."""

import ctypes
import gc
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process `number` when its parent process `parent` ends, in whatever way.

    This works on Linux only (prctl(2), PR_SET_PDEATHSIG). It lasts over an exec. Children of this process must call it
    themselves.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    # If the parent died before the call above, no signal comes.
    if os.getppid() != parent:
        sys.exit(1)


def raise_file_limit(wanted: int) -> None:
    """Allow this process `wanted` open files and connections, or as many as the system permits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def collect_seldom() -> None:
    """Collect the young generation every 10,000 allocations instead of 700.

    A request allocates hundreds of objects, which reference counting frees. Imports allocate millions, which stay:
    without the collections between them, a worker is ready 0.7 s earlier.
    """
    gc.set_threshold(10_000, 10, 40)


def calm_collector() -> None:
    """Make garbage collection cheap; call it when all long-lived objects exist. Later collections skip them."""
    gc.collect()
    gc.freeze()
    collect_seldom()
