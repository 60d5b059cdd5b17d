"""The seams in one process, without durability, for tests of their users. `protocols` describes each method."""

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

from forebay_contracts.queueing.memory_room import InMemoryRoom
from forebay_contracts.queueing.protocols import PAGE, Delivery, Line, Record, Stored
from forebay_contracts.queueing.state_store import OUTCOMES
from forebay_contracts.queueing.usage import UsageRow, counter_of, used_of, value_of
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import AnswerLogFull, AnswerTaken, QueueConflict, QueueFull
from forebay_contracts.wire.event import Event, event_of
from forebay_contracts.wire.frames import Frame, Resume, decode_frame
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import RequestState, RequestStatus


class InMemoryDelivery:
    """A delivery from `InMemoryQueue`. `verbs` holds the verbs called so far."""

    def __init__(self, queue: "InMemoryQueue", sequence: int, data: bytes, headers: Mapping[str, str]) -> None:
        self._queue = queue
        self.sequence = sequence
        self.data = data
        self.headers = headers
        self.num_delivered = queue.delivered[sequence]
        self.verbs: list[str] = []

    async def ack(self) -> None:
        """Done."""
        self.verbs.append("ack")
        self._queue.end(self.sequence)

    async def nak(self, delay_s: float = 0) -> None:
        """Back into the queue after `delay_s`."""
        self.verbs.append("nak")
        self._queue.deliver_again(self.sequence, delay_s)

    async def term(self) -> None:
        """End for good."""
        self.verbs.append("term")
        self._queue.end(self.sequence)

    async def in_progress(self) -> None:
        """Nothing to do: nobody else can take it."""
        self.verbs.append("in_progress")


class InMemoryQueue:
    """`Admission` and `Deliveries` in one; `room` is the waiting room before it.

    `on_admitted` is called with the sequence of each message that is not deferred.
    """

    def __init__(self, max_queue_size: int = 100, max_concurrent: int = 10, max_deferred: int = 100) -> None:
        self.room = InMemoryRoom(self, max_deferred)
        self.on_admitted: list[Callable[[int], None]] = []
        self.max_concurrent = max_concurrent
        self._max_queue_size = max_queue_size
        self._concurrency = asyncio.Semaphore(max_concurrent)
        self._sequences = itertools.count(1)
        self._by_id: dict[str, int] = {}
        self._messages: dict[int, tuple[bytes, Mapping[str, str]]] = {}
        self._out: set[int] = set()
        self._ready: asyncio.Queue[int] = asyncio.Queue()
        self._pulls: set[asyncio.Task[Any]] = set()
        self._stopped = False
        self.delivered: Counter[int] = Counter()

    async def publish(self, request: InferenceRequest) -> int:
        """Admit."""
        if request.deferred:
            return self.room.admit(request)
        if request.id in self._by_id:
            return self._by_id[request.id]
        headers = {names.HEADER_MSG_ID: request.id, names.HEADER_REPLY_TO: request.reply_to}
        return self.put(request.encode(), headers)

    async def put_back(self, request: InferenceRequest, turn: int, trace: Mapping[str, str]) -> int:
        """Into the room."""
        return self.room.admit(request, turn)

    def put(self, data: bytes, headers: Mapping[str, str]) -> int:
        """Admit a message as it is, readable or not."""
        if len(self._messages) >= self._max_queue_size:
            raise QueueFull("the queue is full, try again later")
        sequence = next(self._sequences)
        self._by_id[headers[names.HEADER_MSG_ID]] = sequence
        self._messages[sequence] = data, headers
        self._ready.put_nowait(sequence)
        if names.HEADER_DEFERRED not in headers:
            for listener in self.on_admitted[:1]:
                listener(sequence)
        return sequence

    async def holds(self, request_id: str, sequence: int, *, deferred: bool = False) -> bool:
        """Whether it is this request's."""
        if deferred:
            return self.room.holds(request_id, sequence)
        if sequence not in self._messages:
            return False
        return names.turn_of(self._messages[sequence][1][names.HEADER_MSG_ID])[0] == request_id

    async def remove(self, request_id: str, sequence: int, *, deferred: bool = False) -> bool:
        """Remove it if it is this request's."""
        if not await self.holds(request_id, sequence, deferred=deferred):
            return False
        if deferred:
            self.room.waiting.pop(sequence)
        else:
            self.end(sequence)
        return True

    def move(self, data: bytes, headers: Mapping[str, str]) -> None:
        """Admit a message of the waiting room, once."""
        if headers[names.HEADER_MSG_ID] not in self._by_id:
            self.put(data, headers)

    def line(self) -> Line:
        """Where the deliveries are."""
        full = len(self._out) >= self.max_concurrent or not self._pulls
        return Line(max(self.delivered, default=0), len(self._messages) - len(self._out), full)

    @property
    def redeliveries(self) -> int:
        """How many wait to be delivered again while no slot waits."""
        again = [one for one in self._messages if self.delivered[one] and one not in self._out]
        return 0 if self._pulls else len(again)

    @property
    def out(self) -> int:
        """How many are out."""
        return len(self._out)

    async def pull(self) -> Delivery:
        """The next message, once there is capacity."""
        if self._stopped:
            raise asyncio.CancelledError
        task = asyncio.current_task()
        assert task is not None
        self._pulls.add(task)
        try:
            await self._concurrency.acquire()
            try:
                sequence = await self._next_sequence()
            except asyncio.CancelledError:
                self._concurrency.release()
                raise
        finally:
            self._pulls.discard(task)
        self._out.add(sequence)
        self.delivered[sequence] += 1
        data, headers = self._messages[sequence]
        return InMemoryDelivery(self, sequence, data, headers)

    async def stop(self) -> None:
        """Cancel the pulls that wait."""
        self._stopped = True
        for task in self._pulls:
            task.cancel()

    def end(self, sequence: int) -> None:
        """Remove a message and free its place."""
        self._messages.pop(sequence, None)
        self._free(sequence)

    def deliver_again(self, sequence: int, delay_s: float = 0) -> None:
        """Redeliver a message, as after a nak or a passed ack wait."""
        self._free(sequence)
        asyncio.get_running_loop().call_later(delay_s, self._ready.put_nowait, sequence)

    def lose(self, sequence: int) -> None:
        """Act like a store that lost a message: its id may be published again."""
        self.end(sequence)
        self._by_id = {request_id: known for request_id, known in self._by_id.items() if known != sequence}

    def forget_deliveries(self) -> None:
        """Act like a killed server: redeliver everything that is out, each with a count of 1."""
        self.delivered.clear()
        for sequence in sorted(self._out):
            self.deliver_again(sequence)

    def __len__(self) -> int:
        return len(self._messages)

    async def _next_sequence(self) -> int:
        while (sequence := await self._ready.get()) not in self._messages:
            pass  # it was removed while it waited
        return sequence

    def _free(self, sequence: int) -> None:
        if sequence in self._out:
            self._out.discard(sequence)
            self._concurrency.release()


class InMemoryStateStore:
    """`StateStore`."""

    def __init__(self) -> None:
        self._states: dict[str, Stored] = {}
        self._counted: set[str] = set()
        self._totals: Counter[RequestStatus] = Counter()
        self._used: Counter[str] = Counter()
        self._revisions = itertools.count(1)
        self.history: list[RequestState] = []
        self.events: dict[str, Event] = {}
        """What was announced, by the event's id."""

    async def get(self, request_id: str) -> Stored | None:
        """The state."""
        return self._states.get(request_id)

    async def write(self, state: RequestState, revision: int) -> int:
        """Compare and set."""
        if (event := event_of(state)) is not None:
            self.events[event.id] = event
        stored = self._states.get(state.id)
        if (stored.revision if stored else 0) != revision:
            raise QueueConflict(f"request {state.id}: another write changed its state first")
        self._states[state.id] = Stored(state, next(self._revisions))
        self.history.append(state)
        return self._states[state.id].revision

    def lose(self, request_id: str, older: Stored | None) -> None:
        """Act like a store that lost its last records: the state is the `older` one again."""
        self._states.pop(request_id)
        if older is not None:
            self._states[request_id] = older

    async def count(self, outcome: RequestStatus, request_id: str, state: RequestState | None = None) -> None:
        """Once a request."""
        if request_id not in self._counted:
            self._counted.add(request_id)
            self._totals[outcome] += 1
            if state is not None:
                self._used[counter_of(state)] += value_of(state)

    async def totals(self) -> Mapping[RequestStatus, int]:
        """By outcome."""
        return {outcome: self._totals[outcome] for outcome in OUTCOMES}

    async def usage(self, days: Collection[str], keys: Collection[str | None] | None = None) -> list[UsageRow]:
        """Of these days and keys."""
        found = [used_of(counter, value) for counter, value in self._used.items()]
        return [used for used in found if used.day in days and (keys is None or used.key in keys)]


class InMemoryReplyChannel:
    """`ReplyChannel` to a receiver in this process.

    `frames` holds what has arrived. The next `losing` frames that `send` gets are lost.
    """

    lossless = False

    def __init__(self, receive: Callable[[Frame], Resume]) -> None:
        self._receive = receive
        self.frames: list[Frame] = []
        self.losing = 0

    async def send(self, frame: bytes) -> None:
        """Lose it, or have it received at once."""
        if self.losing:
            self.losing -= 1
        else:
            self._received(frame)

    async def flush(self) -> None:
        """Nothing waits here."""

    async def ask(self, frame: bytes) -> Resume:
        """Confirmed at once."""
        return self._received(frame)

    def _received(self, frame: bytes) -> Resume:
        decoded = decode_frame(frame)
        self.frames.append(decoded)
        return self._receive(decoded)


class InMemoryAnswerLog:
    """`AnswerLog`. `full` refuses every record, and `room` says whether new answers may begin."""

    def __init__(self) -> None:
        self._answers: dict[str, list[Record]] = {}
        self._names: dict[str, int] = {}
        self._sequences = itertools.count(1)
        self._changed = asyncio.Event()
        self.full = False
        self.room = True

    async def append(self, request_id: str, frames: Sequence[bytes], last: int, name: str) -> int:
        """Once for each name."""
        if self.full:
            raise AnswerLogFull("the answer log is full, try again later")
        records = self._answers.setdefault(request_id, [])
        if (records[-1].sequence if records else 0) != last:
            if records and self._names.get(f"{request_id}.{name}") == records[-1].sequence:
                return records[-1].sequence
            raise AnswerTaken(f"{request_id}: another record follows {last}")
        records.append(Record(next(self._sequences), tuple(frames), time.time()))
        self._names[f"{request_id}.{name}"] = records[-1].sequence
        self._changed.set()
        self._changed = asyncio.Event()
        return records[-1].sequence

    async def read(self, request_id: str, after: int = 0, most: int | None = None) -> list[Record]:
        """What is there."""
        return [record for record in self._answers.get(request_id, ()) if record.sequence > after][:most]

    @contextlib.asynccontextmanager
    async def follow(self, request_id: str, *, fresh: bool = False) -> AsyncIterator[AsyncIterator[list[Record]]]:
        """What is there, and what comes."""

        async def coming() -> AsyncIterator[list[Record]]:
            last = 0
            while True:
                changed = self._changed
                records = await self.read(request_id, last, PAGE)
                last = records[-1].sequence if records else last
                yield records
                if not records:
                    await changed.wait()

        yield coming()

    async def has_room(self) -> bool:
        """As `room` says."""
        return self.room

    async def purge(self, request_id: str, keep: int = 0) -> None:
        """Remove it."""
        records = self._answers.pop(request_id, [])
        self._answers[request_id] = records[len(records) - keep :]
        self._changed.set()
        self._changed = asyncio.Event()


class InMemoryCancelNotices:
    """`CancelNotices`. `asked` and `told` hold the request ids; `on_ask` and `on_tell` are the listeners."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.told: list[str] = []
        self.on_ask: list[Callable[[str, str], Awaitable[None]]] = []
        self.on_tell: list[Callable[[str, str], Awaitable[None]]] = []

    async def ask(self, request_id: str, reason: str) -> None:
        """Call `on_ask`."""
        self.asked.append(request_id)
        for listener in self.on_ask:
            await listener(request_id, reason)

    async def tell(self, request_id: str, reason: str) -> None:
        """Call `on_tell`."""
        self.told.append(request_id)
        for listener in self.on_tell:
            await listener(request_id, reason)
