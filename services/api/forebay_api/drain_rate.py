"""How fast the queue moves, for Retry-After and the estimated wait: measured where it is asked for, never polled."""

import math
import time
from collections import deque

WINDOW_S = 60.0
SAMPLE_INTERVAL_S = 1.0
MIN_SPAN_S = 0.1
"""Over less, one request more or less would be any rate."""

MAX_RETRY_AFTER_S = 60


class DrainRate:
    """Places freed per second, from samples of how many requests have left ever.

    What is sampled is the server's own count, so it is the rate of the whole deployment, whichever api asks.
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def sample(self, left: int) -> None:
        """Note that `left` requests have left so far; samples less than a second apart are kept as one."""
        now = time.monotonic()
        if len(self._samples) > 1 and self._samples[-1][0] - self._samples[-2][0] < SAMPLE_INTERVAL_S:
            self._samples.pop()
        # The count begins anew where the stream was made anew.
        if self._samples and left < self._samples[-1][1]:
            self._samples.clear()
        self._samples.append((now, left))
        while now - self._samples[0][0] > WINDOW_S:
            self._samples.popleft()

    def due(self) -> bool:
        """Whether the newest sample is old enough for another to be worth its cost."""
        return not self._samples or time.monotonic() - self._samples[-1][0] >= SAMPLE_INTERVAL_S

    def wait_s(self, places: int) -> float | None:
        """Seconds until `places` more have left, or None where nothing has left lately."""
        if len(self._samples) < 2 or time.monotonic() - self._samples[-1][0] > WINDOW_S:
            return None
        (start, left_then), (end, left_now) = self._samples[0], self._samples[-1]
        if left_now <= left_then or end - start < MIN_SPAN_S:
            return None
        return places * (end - start) / (left_now - left_then)

    def retry_after_s(self) -> int | None:
        """Whole seconds until a place should be free, or None where nothing is known."""
        seconds = self.wait_s(1)
        return None if seconds is None else min(max(math.ceil(seconds), 1), MAX_RETRY_AFTER_S)
