"""How a process lives: its end, its limits, its garbage collection."""

import ctypes
import gc
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent`, which started it, is gone, however that ends.

    Linux only (prctl(2), PR_SET_PDEATHSIG); elsewhere nothing happens. It holds over an exec, and not for
    children of this process, which must call it themselves.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    # A parent that died before that sends no signal any more.
    if os.getppid() != parent:
        sys.exit(1)


def raise_file_limit(wanted: int) -> None:
    """Let this process have `wanted` files and connections open, or as many as the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def calm_collector() -> None:
    """Call when everything that stays is built: what there is now is left out of every later collection.

    The young generation is collected every 10,000 allocations instead of 700, since a request allocates
    hundreds of objects that die with it, by reference counting.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
