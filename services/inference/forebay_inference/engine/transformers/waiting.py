"""How torch's threads wait for each other on a CPU: they spin, and yield while other processes want the CPUs.

Spinning makes a pass a third faster on CPUs of its own, and several times slower beside busy processes. libgomp decides
at each wait: it does not spin while it counts more threads than CPUs. A second team of threads, asleep, makes it so.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch

from forebay_inference.engine.transformers import SPINS_BY_DEMAND

_INTERVAL_S: Final = 0.25
_CONTENDED: Final = 0.15
"""Share of the threads' time, running or ready to run, in which they waited for a CPU."""
_CALM: Final = 4
"""Intervals in a row without contention after which the threads spin again."""


class SecondTeam:
    """As many idle threads as torch computes with, while it is `held`."""

    def __init__(self) -> None:
        self._released: threading.Event | None = None

    def hold(self, held: bool) -> None:
        """Start the threads or let them end."""
        if held and self._released is None:
            self._released = threading.Event()
            threading.Thread(target=_sleep_in_team, args=(self._released,), daemon=True, name="second-team").start()
        elif not held and self._released is not None:
            self._released.set()
            self._released = None


def _sleep_in_team(released: threading.Event) -> None:
    torch.zeros(1 << 20).add_(1)  # large enough for all threads
    released.wait()


def watch(processor: Any, team: SecondTeam) -> None:
    """Have the library's batch processor look before its passes whether threads are to yield, and hold `team` then."""
    if SPINS_BY_DEMAND and torch.get_num_threads() > 1:
        prepare, look = processor.prepare_next_batch, _every_interval(team.hold, cpu_times)

        def prepared() -> Any:
            look()
            return prepare()

        processor.prepare_next_batch = prepared


def _every_interval(
    yielding: Callable[[bool], None], times: Callable[[], tuple[int, int] | None]
) -> Callable[[], None]:
    """A function that calls `yielding` at most once an interval, by how `times` have grown since."""
    before, last, calm = times(), time.monotonic(), 0

    def look() -> None:
        nonlocal before, last, calm
        if (now := time.monotonic()) < last + _INTERVAL_S:
            return
        after, last = times(), now
        if before is None or after is None:
            calm = 0
        else:
            ran, waited = after[0] - before[0], after[1] - before[1]
            calm = 0 if waited > _CONTENDED * (ran + waited) else calm + 1
        before = after
        if calm in (0, _CALM):
            yielding(calm == 0)

    return look


def cpu_times() -> tuple[int, int] | None:
    """Nanoseconds for which the threads of this process ran, and for which they were ready and waited for a CPU. None
    where the kernel does not tell."""
    lines = []
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # this thread has ended
            lines.append(path.read_text().split())
    return (sum(int(line[0]) for line in lines), sum(int(line[1]) for line in lines)) if lines else None
