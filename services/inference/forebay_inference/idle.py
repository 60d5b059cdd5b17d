"""Says that slots are idle, so that the apis move work from the waiting room."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

IDLE_S: Final = 0.02
"""How long a slot waits, at least, until the apis are told: between two requests of a busy model nobody is."""


class IdleSlots:
    """Calls `say` when slots have waited for a while, at most once in IDLE_S, and not again as long as they wait on."""

    def __init__(self, say: Callable[[], Awaitable[None]]) -> None:
        self._say = say
        self._waiting = 0
        self._timer: asyncio.TimerHandle | None = None
        self._saying: asyncio.Future[None] | None = None

    @contextmanager
    def waits(self) -> Iterator[None]:
        """A slot waits for the length of the block."""
        self._waiting += 1
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(IDLE_S, self._due)
        try:
            yield
        finally:
            self._waiting -= 1

    def _due(self) -> None:
        self._timer = None
        if self._waiting:
            self._saying = asyncio.ensure_future(self._say())
