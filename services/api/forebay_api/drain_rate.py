"""How fast the queue drains, for Retry-After: measured where it is asked for, never polled."""

import math
import time
from collections import deque

WINDOW_S = 60.0
MAX_RETRY_AFTER_S = 60


class DrainRate:
    """Places freed per second, from samples of how many messages have left the stream ever."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def sample(self, left: int) -> None:
        """Note that `left` messages have left the stream so far."""
        now = time.monotonic()
        self._samples.append((now, left))
        while now - self._samples[0][0] > WINDOW_S:
            self._samples.popleft()

    def due(self) -> bool:
        """Whether the newest sample is older than a second."""
        return not self._samples or time.monotonic() - self._samples[-1][0] >= 1

    def retry_after_s(self) -> int | None:
        """Whole seconds until a place should be free, or None where nothing is known."""
        if len(self._samples) < 2:
            return None
        (start, left_then), (end, left_now) = self._samples[0], self._samples[-1]
        if left_now <= left_then or end <= start:
            return None
        return min(max(math.ceil((end - start) / (left_now - left_then)), 1), MAX_RETRY_AFTER_S)
