"""Moves requests from the waiting room into the queue while a model has nothing else to do.

A mover is told when to look: by a worker with an idle slot, by an admission into the room, and by the end of an attempt
at a moved request. Any number of apis may move at once. If two of them move one request, the queue stores it once.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Final

from forebay_api.clients.shares import Shares
from forebay_contracts.queueing.protocols import Room, StateStore
from forebay_contracts.telemetry.logs import fields
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import QueueError, StateUnreadable
from forebay_contracts.wire.heartbeats import Used, WorkerInfo, WorkerStatus
from forebay_contracts.wire.state import RequestStatus

LOOK_AGAIN_S: Final = 5.0
"""Pause until a mover looks again without being told, as long as something waits: what it is told can be lost, and
nobody tells of a consumer that was paused."""

log = logging.getLogger(__name__)


class Mover:
    """Moves by the idle slots of the `workers` that are alive, and by the `weight` of each key.

    `may_run` says whether a key has tokens left: without, its requests wait.

    Models are named by their tokens.
    """

    def __init__(
        self,
        room: Room,
        states: StateStore,
        workers: Callable[[], Iterable[WorkerInfo]],
        weight: Callable[[str | None], float],
        may_run: Callable[[str | None], bool],
    ) -> None:
        self._may_run = may_run
        self._room = room
        self._states = states
        self._workers = workers
        self._shares: defaultdict[str, Shares] = defaultdict(lambda: Shares(weight))
        self._busy: set[str] = set()
        """Models without an idle slot at the last look. Whoever gets one says so."""
        self._empty: set[str] = set()
        """Models for which nothing waited at the last look. The room may have waited longer than this api has run."""
        self._closed = False
        self._moving: dict[str, asyncio.Task[None]] = {}
        self._again: set[str] = set()
        self._timers: dict[str, asyncio.TimerHandle] = {}

    async def close(self) -> None:
        """Stop. What waits is moved by others."""
        self._closed = True
        for timer in self._timers.values():
            timer.cancel()
        tasks = list(self._moving.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def active(self) -> bool:
        """Whether it looks, or will look again without being told."""
        return bool(self._moving or self._timers)

    def idle(self, model: str, used: Used | None) -> None:
        """A slot of `model` is idle. One of the apis that are told also looks."""
        self._busy.discard(model)
        if used is not None:
            self._empty.discard(model)  # it may have given way
            self._shares[model].end(used)

    def deferred(self, model: str) -> None:
        """The room has taken a request. One of the apis that are told also looks, if a slot may be idle."""
        self._empty.discard(model)
        if model not in self._moving:
            self._look_later(model)

    def look_unless_busy(self, model: str) -> None:
        """Move what can be moved, unless whoever gets an idle slot will say so."""
        if model not in self._busy:
            self.look(model)

    def look_at_all(self) -> None:
        """After a start or an outage: look at every model that has a worker."""
        self._busy.clear()
        self._empty.clear()
        for model in {names.model_token(worker.model) for worker in self._workers()}:
            self.look(model)

    def look(self, model: str) -> None:
        """Move what can be moved. Asks nobody if nothing waits."""
        if (timer := self._timers.pop(model, None)) is not None:
            timer.cancel()
        if model in self._moving:
            self._again.add(model)
        elif model not in self._empty and not self._closed:
            self._moving[model] = asyncio.create_task(self._move(model))

    def _look_later(self, model: str) -> None:
        if model not in self._timers and not self._closed:
            self._timers[model] = asyncio.get_running_loop().call_later(LOOK_AGAIN_S, self.look, model)

    async def _move(self, model: str) -> None:
        try:
            self._again.add(model)
            while model in self._again:
                self._again.discard(model)
                await self._move_some(model)
        except QueueError as exc:
            self._empty.discard(model)
            log.debug("nothing is moved to %s now: %s", model, exc)
        finally:
            del self._moving[model]
            if model not in self._empty:
                self._look_later(model)

    async def _move_some(self, model: str) -> None:
        """Move a request for each idle slot."""
        # Before the look, so that what is told meanwhile is not overlooked.
        self._busy.add(model)
        self._empty.add(model)
        idle, found = await asyncio.gather(self._room.idle(model, self._slots(model)), self._room.backlog(model))
        backlog = dict(found)
        shares = self._shares[model]
        while idle > 0 and (able := {key: count for key, count in backlog.items() if self._may_run(key)}):
            key = shares.next(able)
            waiting = await self._room.first(model, key)
            backlog[key] -= 1
            if waiting is None or not backlog[key]:
                del backlog[key]
            if waiting is None:
                continue
            request_id, turn = names.turn_of(waiting.headers[names.HEADER_MSG_ID])
            if await self._is_due(request_id, turn):
                await self._room.move(waiting)
                shares.begin(request_id, key)
                idle -= 1
                log.info("[RequestQueue] %s moved into the queue", request_id, extra=fields(request_id=request_id))
            else:
                await self._room.drop(waiting)
        if idle > 0:
            self._busy.discard(model)
        if backlog:
            self._empty.discard(model)

    def _slots(self, model: str) -> int:
        ready = (one for one in self._workers() if one.status is WorkerStatus.READY)
        return sum(one.slots for one in ready if names.model_token(one.model) == model)

    async def _is_due(self, request_id: str, turn: int) -> bool:
        """Whether a message of this turn is still to be moved. It may be left of a move that broke off."""
        try:
            stored = await self._states.get(request_id)
        except StateUnreadable:
            stored = None  # its worker ends it
        if stored is None:
            return True
        state = stored.state
        if state.status is RequestStatus.QUEUED:
            return turn >= state.turn
        return not state.status.final and turn > state.turn
