"""Deferred attempts give way to requests that may not wait.

A worker that runs deferred attempts hears which requests the queue admits. One that is not delivered although no place
is free waits for one of these attempts: so the newest of them stops within a step of the engine, and goes on later.
Notices can be lost, and there is none of a request that is to be delivered again. So it also looks every second.
"""

import asyncio
import logging
from typing import Final

from forebay_contracts.queueing.protocols import Precedence
from forebay_contracts.wire.errors import QueueUnavailable
from forebay_contracts.wire.heartbeats import Used
from forebay_inference.attempt.attempt import Attempt
from forebay_inference.attempt.endings import End, Ended

LOOK_S: Final = 0.005
"""Pause between the first two looks whether a request that was heard of still waits."""

MAX_LOOK_S: Final = 0.05
"""Longest such pause. The model may be paused."""

LOOK_AGAIN_S: Final = 1.0
"""Pause between two looks at what nobody tells, as long as deferred attempts run here."""

log = logging.getLogger(__name__)


class GivingWay:
    """The deferred attempts of one worker."""

    def __init__(self, precedence: Precedence) -> None:
        self._precedence = precedence
        self._attempts: dict[str, Attempt] = {}
        """Those that can give way, the oldest first."""
        self._waiting: set[int] = set()
        """The sequences of requests that were heard of and not seen delivered."""
        self._hears = False
        self._making_way: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def begin(self, attempt: Attempt) -> None:
        """A deferred attempt begins, which the engine can go on with later. It may have overtaken a request."""
        self._attempts[attempt.request.id] = attempt
        if not self._hears:
            self._hears = True
            await self._precedence.hear(self._admitted)
        if self._looking is None:
            self._looking = asyncio.create_task(self._look_again())
        task = asyncio.create_task(self._look_back(attempt))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def end(self, attempt: Attempt) -> None:
        """A deferred attempt has ended: tell the apis, which account for it and move the next one."""
        request = attempt.request
        if self._attempts.get(request.id) is attempt:
            del self._attempts[request.id]
            if not self._attempts:
                self._hears = False
                passed, self._waiting = self._waiting, set()
                await self._precedence.pass_on(passed)
        used = Used(request_id=request.id, key=request.key, tokens=attempt.measured.used_tokens(attempt.turn))
        await self._precedence.say_idle(used)

    def _admitted(self, sequence: int) -> None:
        self._waiting.add(sequence)
        if self._making_way is None:
            self._making_way = asyncio.create_task(self._make_way())

    async def _make_way(self) -> None:
        """Until every request that was heard of is delivered, or runs no deferred attempt here any more."""
        pause_s = LOOK_S
        try:
            while self._waiting and self._attempts:
                line = await self._precedence.line()
                self._waiting = {sequence for sequence in self._waiting if sequence > line.delivered}
                if line.full:
                    self._stop(len(self._waiting))
                if self._waiting:
                    await asyncio.sleep(pause_s)
                    pause_s = min(1.5 * pause_s, MAX_LOOK_S)
        except QueueUnavailable as exc:
            self._waiting.clear()  # whoever waits is delivered once NATS is back, or heard of by the next look back
            log.debug("no attempt gives way: %s", exc)
        finally:
            self._making_way = None

    async def _look_back(self, attempt: Attempt) -> None:
        """Stop an attempt that has begun while others wait."""
        try:
            line = await self._precedence.line()
        except QueueUnavailable as exc:
            log.debug("%s: nobody says whether others wait: %s", attempt.request.id, exc)
            return
        if line.full and line.waiting:
            attempt.stop(Ended(End.YIELDED))

    async def _look_again(self) -> None:
        """As long as deferred attempts run here."""
        before = None
        while self._attempts:
            await asyncio.sleep(LOOK_AGAIN_S)
            try:
                line, again = await asyncio.gather(self._precedence.line(), self._precedence.awaiting_redelivery())
            except QueueUnavailable as exc:
                log.debug("nobody says whether others wait: %s", exc)
                continue
            stuck = line.waiting if line.full and line.delivered == before else 0
            before = line.delivered
            self._stop(stuck + again)
        self._looking = None

    def _stop(self, places: int) -> None:
        """Have so many attempts stopping, the newest first."""
        running = [attempt for attempt in self._attempts.values() if attempt.stopped is None]
        stopping = len(self._attempts) - len(running)
        for attempt in running[::-1][: max(places - stopping, 0)]:
            attempt.stop(Ended(End.YIELDED))
