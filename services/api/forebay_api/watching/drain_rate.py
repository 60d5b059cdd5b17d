"""How fast the queue moves, for Retry-After and the estimated wait: measured where it is asked for, never polled."""

import itertools
import math
import time
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from forebay_contracts.queueing.status import ModelQueue

WINDOW_S = 60.0
SAMPLE_INTERVAL_S = 1.0
MIN_SPAN_S = 0.1
"""Over less, one request more or less would be any rate."""

MAX_RETRY_AFTER_S = 60


class DrainRate:
    """Places freed per second of work, from samples of how many requests have left ever.

    What is sampled is the server's own count, so it is the rate of the whole deployment, whichever api asks. Time that
    began with nothing to do says nothing of how fast it can be, and is left out.
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int, bool]] = deque()

    def sample(self, left: int, *, busy: bool = True) -> None:
        """Note that `left` requests have left so far, and whether there are any to leave; samples less than a second
        apart are kept as one."""
        now = time.monotonic()
        if len(self._samples) > 1 and self._samples[-1][0] - self._samples[-2][0] < SAMPLE_INTERVAL_S:
            # Of the two the one that work began with; what was idle before it counts for nothing.
            del self._samples[-1 if self._samples[-2][2] else -2]
        # The count begins anew where the stream was made anew.
        if self._samples and left < self._samples[-1][1]:
            self._samples.clear()
        self._samples.append((now, left, busy))
        while now - self._samples[0][0] > WINDOW_S:
            self._samples.popleft()

    def due(self) -> bool:
        """Whether the newest sample is old enough for another to be worth its cost."""
        if not self._samples:
            return True
        at, _, busy = self._samples[-1]
        # The first of a burst is when the measurement begins.
        return not busy or time.monotonic() - at >= SAMPLE_INTERVAL_S

    def wait_s(self, places: int) -> float | None:
        """Seconds until `places` more have left, or None where nothing has left lately."""
        if len(self._samples) < 2 or time.monotonic() - self._samples[-1][0] > WINDOW_S:
            return None
        worked_s, left = 0.0, 0
        for (start, left_then, busy), (end, left_now, _) in itertools.pairwise(self._samples):
            if busy:
                worked_s += end - start
                left += left_now - left_then
        if not left or worked_s < MIN_SPAN_S:
            return None
        return places * worked_s / left

    def retry_after_s(self) -> int | None:
        """Whole seconds until a place should be free, or None where nothing is known."""
        seconds = self.wait_s(1)
        return None if seconds is None else min(max(math.ceil(seconds), 1), MAX_RETRY_AFTER_S)


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast places in the queue get free, and how fast each model's line moves."""

    queue: DrainRate = field(default_factory=DrainRate)
    lines: defaultdict[str, DrainRate] = field(default_factory=lambda: defaultdict(DrainRate))

    def sample(self, left: int, messages: int, models: Iterable[ModelQueue]) -> None:
        """Note what the stream and the consumers of `models` tell."""
        self.queue.sample(left, busy=messages > 0)
        for line in models:
            self.lines[line.model].sample(line.delivered, busy=line.waiting > 0)
