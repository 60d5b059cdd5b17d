"""Whose turn it is in the waiting room: the key that has used the fewest tokens for its weight.

This is weighted fair queueing by virtual time (Demers, Keshav and Shenker, 1989): the length of a job is its tokens.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Final

from forebay_contracts.wire.heartbeats import Used

FIRST_ESTIMATE: Final = 100.0
"""Tokens that an attempt is taken to use as long as none of its key has ended."""

NEWEST: Final = 0.2
"""How much the newest attempt of a key counts in the estimate of its next one."""

MAX_OUT: Final = 10_000
"""Most attempts whose end is waited for. The end of an attempt is never told if its worker dies."""


class Shares:
    """The account of one model: what each key has used of it, in tokens divided by the key's weight.

    What waits for its turn is charged by an estimate when it gets it, and by what it used at its end. A key that comes
    back after a pause begins where the others are: it has saved nothing up.
    """

    def __init__(self, weight: Callable[[str | None], float]) -> None:
        self._weight = weight
        self._used: dict[str | None, float] = {}
        self._now = 0.0
        self._waiting: frozenset[str | None] = frozenset()
        self._out: OrderedDict[str, tuple[str | None, float]] = OrderedDict()
        self._estimates: dict[str | None, float] = {}

    def next(self, backlog: Mapping[str | None, int]) -> str | None:
        """The key of which one is to be moved; `backlog` holds those that wait, at least one."""
        for key in backlog:
            if key not in self._waiting:
                self._used[key] = max(self._used.get(key, 0.0), self._now)
        self._waiting = frozenset(backlog)
        key = min(backlog, key=lambda one: (self._used[one], one or ""))
        self._now = max(self._now, self._used[key])
        return key

    def begin(self, request_id: str, key: str | None) -> None:
        """One of a key's requests got its turn."""
        estimate = self._estimates.get(key, FIRST_ESTIMATE)
        self._charge(key, estimate)
        self._out[request_id] = key, estimate
        if len(self._out) > MAX_OUT:
            self._out.popitem(last=False)

    def end(self, used: Used) -> None:
        """An attempt has ended, or given way; any api may have moved it."""
        _, estimate = self._out.pop(used.request_id, (None, 0.0))
        self._charge(used.key, used.tokens - estimate)
        before = self._estimates.get(used.key, float(used.tokens))
        self._estimates[used.key] = before + NEWEST * (used.tokens - before)

    def _charge(self, key: str | None, tokens: float) -> None:
        self._used[key] = self._used.get(key, self._now) + tokens / self._weight(key)
