"""The queue in one process: dispatcher, attempt runners and the simulated engine on the in-memory twins."""

import asyncio
import contextlib
import math
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from forebay_api.in_flight.dispatcher import Dispatcher
from forebay_api.in_flight.mover import Mover
from forebay_contracts.queueing.cancellation import Cancellation
from forebay_contracts.queueing.failed import FailedRequest
from forebay_contracts.queueing.logged_reply import LoggedReplyChannel
from forebay_contracts.queueing.memory import (
    InMemoryAnswerLog,
    InMemoryCancelNotices,
    InMemoryQueue,
    InMemoryReplyChannel,
    InMemoryStateStore,
)
from forebay_contracts.queueing.memory_room import InMemoryPrecedence
from forebay_contracts.queueing.protocols import ReplyChannel
from forebay_contracts.wire import names
from forebay_contracts.wire.frames import Delta, Frame, Resume
from forebay_contracts.wire.heartbeats import Used, WorkerInfo, WorkerStatus
from forebay_contracts.wire.request import CompletionType, InferenceRequest
from forebay_contracts.wire.state import RequestState, RequestStatus
from forebay_inference.attempt.endings import End, Ended
from forebay_inference.attempt.giving_way import GivingWay
from forebay_inference.attempt.runner import AttemptRunner
from forebay_inference.engine.text.model import TextModel
from forebay_inference.idle import IdleSlots
from forebay_inference.worker_metrics import WorkerMetrics
from support.engine import simulated_model

MODEL = "m"
API = "api-1"


def request(orders: str = "", **fields: Any) -> InferenceRequest:
    """A streamed chat for the simulated engine, of an api named API."""
    now, request_id = time.time(), str(uuid.uuid4())
    return InferenceRequest(
        **{
            "id": request_id,
            "completion_type": CompletionType.CHAT,
            "model": MODEL,
            "created_at": now,
            "deadline": now + 30,
            "reply_to": f"inference.replies.{API}.{request_id}",
            "stream": True,
            "messages": ({"role": "user", "content": f"[[{orders}]]" if orders else "hi"},),
            **fields,
        }
    )


def worker_info(worker: str, slots: int, model: str = MODEL) -> WorkerInfo:
    """The heartbeat of a ready worker."""
    return WorkerInfo(
        id=worker,
        version="1",
        started_at=0,
        heartbeat_at=0,
        model=model,
        status=WorkerStatus.READY,
        slots=slots,
        engine="simulated",
    )


async def kept(request: InferenceRequest, delivery: Any) -> bool:
    return False


class Twins:
    """One api and any number of workers, of which `max_concurrent` requests are out at once.

    `alive` says whether the api's heartbeat is heard, and `away` whether it lapsed for the api itself. NATS was not
    away for `connected_for_s`.
    """

    def __init__(self, *, max_queue_size: int = 100, max_deliveries: int = 3, max_concurrent: int = 10) -> None:
        self.queue = InMemoryQueue(max_queue_size, max_concurrent)
        self.states = InMemoryStateStore()
        self.notices = InMemoryCancelNotices()
        self.answers = InMemoryAnswerLog()
        self.cancellation = Cancellation(self.states, self.queue, self.notices, self.answers)
        self.dispatcher = Dispatcher(
            API, self.queue, self.states, self.cancellation, contextlib.nullcontext, lambda: self.away
        )
        self.weights: dict[str | None, float] = {}
        self.spent: set[str | None] = set()
        """Keys that have used their tokens."""
        self.movers: list[Mover] = []
        self.used: list[Used] = []
        self._workers: list[WorkerInfo] = []
        self.queue.room.on_deferred.append(self._deferred)
        self.queue.room.on_idle.append(self._idle)
        self.alive, self.away = True, False
        self.connected_for_s = math.inf
        self.channels: list[InMemoryReplyChannel] = []
        self.failed: list[FailedRequest] = []
        self._max_deliveries = max_deliveries
        self._slots: list[asyncio.Task[None]] = []
        self.notices.on_ask.append(self._hear)
        self.notices.on_tell.append(self._hear)

    def runner(self, worker: str = "w1", engine: TextModel | None = None, taken: Any = kept) -> AttemptRunner:
        """A runner that is given deliveries by hand; without `engine`, it has the simulated one."""
        runner = AttemptRunner(
            worker=worker,
            states=self.states,
            engine=engine or simulated_model(),
            channel=self._channel,
            api_alive=lambda api: not api or self.alive,
            connected_for_s=lambda: self.connected_for_s,
            max_deliveries=self._max_deliveries,
            metrics=WorkerMetrics(MODEL),
            put_back=self.queue.put_back,
            giving_way=GivingWay(InMemoryPrecedence(self.queue, self.queue.room, MODEL)),
            keep=self._keep,
            taken=taken,
        )

        async def told(request_id: str, reason: str) -> None:
            if (attempt := runner.running.get(request_id)) is not None:
                attempt.stop(Ended(End.CANCELLED, reason=reason))

        self.notices.on_tell.append(told)
        return runner

    def worker(self, name: str = "w1", slots: int = 4, engine: TextModel | None = None) -> AttemptRunner:
        """A runner whose slots pull."""
        runner = self.runner(name, engine)
        idle = IdleSlots(InMemoryPrecedence(self.queue, self.queue.room, MODEL).say_idle)
        self._workers.append(worker_info(name, slots))

        async def slot() -> None:
            # A worker whose engine is broken pulls no more.
            while engine is None or engine.status().fault is None:
                with idle.waits():
                    delivery = await self.queue.pull()
                await runner.run(delivery)

        self._slots += [asyncio.create_task(slot()) for _ in range(slots)]
        return runner

    def mover(self) -> Mover:
        """The mover of another api. The first one looks when something is told to one of them."""
        self.movers.append(
            Mover(
                self.queue.room,
                self.states,
                lambda: self._workers,
                lambda key: self.weights.get(key, 1.0),
                lambda key: key not in self.spent,
            )
        )
        return self.movers[-1]

    def _deferred(self, model: str) -> None:
        for mover in self.movers:
            mover.deferred(model)
        for mover in self.movers[:1]:
            mover.look_unless_busy(model)

    def _idle(self, model: str, used: Used | None) -> None:
        self.used += [] if used is None else [used]
        for mover in self.movers:
            mover.idle(model, used)
        for mover in self.movers[:1]:
            mover.look(model)

    async def text(self, wanted: InferenceRequest) -> str:
        """Submit, and read the answer to its end."""
        async with self.dispatcher.submit(wanted) as answer:
            return "".join([delta.text async for some in answer.deltas() for delta in some])

    async def state(self, request_id: str) -> RequestState:
        """The state that is stored."""
        stored = await self.states.get(request_id)
        assert stored is not None
        return stored.state

    async def reaches(self, request_id: str, *statuses: RequestStatus) -> RequestState:
        """Wait until it has one of these."""
        async with asyncio.timeout(30):
            while True:
                stored = await self.states.get(request_id)
                if stored is not None and stored.state.status in statuses:
                    return stored.state
                await asyncio.sleep(0)

    async def empty(self) -> None:
        """Wait until nothing is in the queue."""
        async with asyncio.timeout(30):
            while len(self.queue):  # noqa: ASYNC110 - a queue tells nobody that it is empty
                await asyncio.sleep(0)

    async def close(self) -> None:
        """End the slots."""
        for slot in self._slots:
            slot.cancel()
        await asyncio.gather(*self._slots, return_exceptions=True)
        for mover in self.movers:
            await mover.close()
        await self.dispatcher.close()

    async def _keep(self, failed: FailedRequest) -> None:
        self.failed.append(failed)

    def _channel(self, reply_to: str, deadline: float) -> ReplyChannel:
        request_id = names.id_of(reply_to)
        if names.is_logged(reply_to):
            return LoggedReplyChannel(self.answers, request_id, deadline)

        def receive(frame: Frame) -> Resume:
            answer = self.dispatcher.waiting.get(request_id)
            if answer is None:
                return self.dispatcher.ended(request_id)
            answer.receive(frame)
            # Nobody looks at what a delta is answered, and it would be all tokens each time.
            return Resume() if isinstance(frame, Delta) else answer.have(frame)

        self.channels.append(InMemoryReplyChannel(receive))
        return self.channels[-1]

    async def _hear(self, request_id: str, reason: str) -> None:
        self.dispatcher.cancelled(request_id, reason)


@contextlib.asynccontextmanager
async def twins(**options: Any) -> AsyncIterator[Twins]:
    """Twins for the length of a block."""
    made = Twins(**options)
    try:
        yield made
    finally:
        await made.close()
