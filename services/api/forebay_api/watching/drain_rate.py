"""How fast the queue moves, for Retry-After and the estimated wait. Measured when somebody asks, never polled."""

import itertools
import math
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field

from forebay_contracts.queueing.status import QueueStatus

WINDOW_S = 60.0
SAMPLE_INTERVAL_S = 1.0
MIN_SPAN_S = 0.1
"""Over less time, one request more or less makes any rate."""

MAX_RETRY_AFTER_S = 60


class DrainRate:
    """Places freed per second of work, from samples of how many requests have left so far.

    The samples are the server's own count, so every api finds the rate of the whole deployment. Time that began with an
    empty queue is left out: it does not tell how fast the queue can be.
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int, bool]] = deque()

    def sample(self, left: int, *, busy: bool = True) -> None:
        """Note that `left` requests have left so far, and whether any are there. Of samples less than a second apart
        one is kept."""
        now = time.monotonic()
        if len(self._samples) > 1 and self._samples[-1][0] - self._samples[-2][0] < SAMPLE_INTERVAL_S:
            # Of the two, the one at which work began: idle time before it does not count.
            del self._samples[-1 if self._samples[-2][2] else -2]
        # The stream has been created anew.
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
        # The measurement begins with the first request of a burst.
        return not busy or time.monotonic() - at >= SAMPLE_INTERVAL_S

    def wait_s(self, places: int) -> float | None:
        """Seconds until `places` more have left, None if none has left lately."""
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
        """Whole seconds until a place should be free, None if unknown."""
        seconds = self.wait_s(1)
        return None if seconds is None else min(max(math.ceil(seconds), 1), MAX_RETRY_AFTER_S)


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast places in the queue get free, and how fast each model's line moves."""

    queue: DrainRate = field(default_factory=DrainRate)
    lines: defaultdict[str, DrainRate] = field(default_factory=lambda: defaultdict(DrainRate))

    def sample(self, numbers: QueueStatus) -> None:
        """Note the counts of the stream and of the models' consumers."""
        self.queue.sample(numbers.total_queued - numbers.active_requests, busy=numbers.active_requests > 0)
        for line in numbers.models:
            self.lines[line.model].sample(line.delivered, busy=line.waiting > 0)
