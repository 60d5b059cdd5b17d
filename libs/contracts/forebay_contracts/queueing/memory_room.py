"""The waiting room in one process, without durability, for tests of its users. `protocols` describes each method."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from forebay_contracts.queueing.protocols import Line, Waiting
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import WaitingRoomFull
from forebay_contracts.wire.heartbeats import Used
from forebay_contracts.wire.request import InferenceRequest


class _Queue(Protocol):
    """What the room needs of `InMemoryQueue`."""

    max_concurrent: int
    on_admitted: list[Callable[[int], None]]

    def move(self, data: bytes, headers: Mapping[str, str]) -> None: ...

    def line(self) -> Line: ...

    @property
    def redeliveries(self) -> int: ...

    @property
    def out(self) -> int: ...


class InMemoryRoom:
    """`Room`. `on_deferred` is called with the model's token of each request that it takes, `on_idle` by `say_idle`.

    While `dying`, a move stops between its two steps, like an api that dies there.
    """

    def __init__(self, queue: _Queue, max_deferred: int) -> None:
        self._queue = queue
        self._max_deferred = max_deferred
        self._sequences = itertools.count(1)
        self._known: dict[str, int] = {}
        self.waiting: dict[int, Waiting] = {}
        self.on_deferred: list[Callable[[str], None]] = []
        self.on_idle: list[Callable[[str, Used | None], None]] = []
        self.dying = False

    def admit(self, request: InferenceRequest, turn: int = 0) -> int:
        """Put a request into the room; returns its sequence."""
        message_id = names.message_id(request.id, turn)
        if message_id in self._known:
            return self._known[message_id]
        subject = (names.yielded_subject if turn else names.deferred_subject)(request.model, request.key)
        if sum(one.subject == subject for one in self.waiting.values()) >= self._max_deferred:
            raise WaitingRoomFull("the waiting room is full, try again later")
        headers = {
            names.HEADER_MSG_ID: message_id,
            names.HEADER_REPLY_TO: request.reply_to,
            names.HEADER_DEFERRED: request.completion_type.value,
        }
        sequence = self._known[message_id] = next(self._sequences)
        self.waiting[sequence] = Waiting(sequence, subject, headers, request.encode())
        for listener in self.on_deferred:
            listener(names.model_token(request.model))
        return sequence

    def lose(self, sequence: int) -> None:
        """Act like a store that lost a message: its id may be published again."""
        del self.waiting[sequence]
        self._known = {known: one for known, one in self._known.items() if one != sequence}

    def holds(self, request_id: str, sequence: int) -> bool:
        """Whether it is this request's."""
        found = self.waiting.get(sequence)
        return found is not None and names.turn_of(found.headers[names.HEADER_MSG_ID])[0] == request_id

    async def idle(self, model: str, slots: int) -> int:
        """What is left of the limit."""
        return max(min(self._queue.max_concurrent, slots) - self._queue.out - self._queue.line().waiting, 0)

    async def backlog(self, model: str) -> Mapping[str | None, int]:
        """By key."""
        mine = (one.subject for one in self.waiting.values() if one.subject.split(".")[2] == model)
        return Counter(map(names.key_of_subject, mine))

    async def first(self, model: str, key: str | None) -> Waiting | None:
        """Those that gave way go first."""
        for subject in (names.yielded_subject(model, key), names.deferred_subject(model, key)):
            for one in self.waiting.values():
                if one.subject == subject:
                    return one
        return None

    async def move(self, waiting: Waiting) -> None:
        """Publish, then delete."""
        self._queue.move(waiting.data, waiting.headers)
        if not self.dying:
            await self.drop(waiting)

    async def drop(self, waiting: Waiting) -> None:
        """Remove it."""
        self.waiting.pop(waiting.sequence, None)


class InMemoryPrecedence:
    """`Precedence` of one worker of `model`."""

    def __init__(self, queue: _Queue, room: InMemoryRoom, model: str) -> None:
        self._queue = queue
        self._room = room
        self._model = model
        self._admitted: Callable[[int], None] | None = None

    async def hear(self, admitted: Callable[[int], None]) -> None:
        """The first of several listeners hears."""
        self._admitted = admitted
        self._queue.on_admitted.append(admitted)

    async def pass_on(self, sequences: Iterable[int]) -> None:
        """To the next listener."""
        if self._admitted is not None:
            self._queue.on_admitted.remove(self._admitted)
            self._admitted = None
        for sequence in sequences:
            for listener in self._queue.on_admitted[:1]:
                listener(sequence)

    async def line(self) -> Line:
        """Where the deliveries are."""
        return self._queue.line()

    async def awaiting_redelivery(self) -> int:
        """What waits at the queue, if no slot does."""
        return self._queue.redeliveries

    async def say_idle(self, used: Used | None = None) -> None:
        """Call `on_idle`."""
        for listener in self._room.on_idle:
            listener(self._model, used)
