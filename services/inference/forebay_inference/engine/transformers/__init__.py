"""Models of the Transformers library in one continuous batch. Its modules import torch and more; this one does not."""

import os
from typing import Final

from forebay_inference.engine.machine import allowed_cpus, usable_cpus

# torch's threads wait for each other hundreds of times in a pass. libgomp reads this once, when torch is loaded: they
# spin some 0.2 ms, and not at all while `waiting` makes them yield. Its default spins 6 ms and more.
_WAITS: Final = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
_MOST_THREADS: Final = 128
"""So many threads may be held twice without the limits that containers usually have: libgomp ends a process in which it
cannot start one."""


def waits(threads: int, cpus: int) -> dict[str, str]:
    """The variables by which so many threads wait for each other on so many CPUs. Where there are fewer threads,
    `waiting` cannot make them yield: then they always do."""
    return _WAITS if threads == cpus <= _MOST_THREADS else {"OMP_WAIT_POLICY": "PASSIVE"}


if not _WAITS.keys() & os.environ.keys():
    os.environ.update(waits(usable_cpus(), allowed_cpus()))

SPINS_BY_DEMAND: Final = _WAITS.items() <= os.environ.items()
"""False where the user has set how threads wait, or they always yield."""
