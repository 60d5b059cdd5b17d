"""The queue in one process, without durability: for tests of what stands on a queue."""

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from forebay_contracts.queueing.queue import Delivery
from forebay_contracts.wire.errors import QueueFull
from forebay_contracts.wire.request import InferenceRequest


class InMemoryDelivery:
    """A delivery from `InMemoryQueue`."""

    def __init__(self, queue: "InMemoryQueue", sequence: int, data: bytes, attempt: int) -> None:
        self._queue = queue
        self.sequence = sequence
        self.data = data
        self.headers: Mapping[str, str] = {}
        self.attempt = attempt

    async def ack(self) -> None:
        """Done."""
        self._queue.end(self.sequence)

    async def nak(self, delay_s: float = 0) -> None:
        """Back into the queue after `delay_s`."""
        self._queue.give_back(self.sequence, delay_s)

    async def term(self) -> None:
        """End for good."""
        self._queue.end(self.sequence)

    async def in_progress(self) -> None:
        """In one process nobody else takes it."""


class InMemoryQueue:
    """The same promises in one process, without durability: for tests of what stands on a queue."""

    def __init__(self, max_queue_size: int, max_concurrent: int) -> None:
        self._max_queue_size = max_queue_size
        self._concurrency = asyncio.Semaphore(max_concurrent)
        self._sequences = itertools.count(1)
        self._by_id: dict[str, int] = {}
        self._messages: OrderedDict[int, bytes] = OrderedDict()
        self._attempts: dict[int, int] = {}
        self._out: set[int] = set()
        self._ready: asyncio.Queue[int] = asyncio.Queue()
        self._pulls: set[asyncio.Task[Any]] = set()

    async def publish(self, request: InferenceRequest) -> int:
        """See `RequestQueue.publish`."""
        if request.id in self._by_id:
            return self._by_id[request.id]
        if len(self._messages) >= self._max_queue_size:
            raise QueueFull("the queue is full, try again later")
        sequence = next(self._sequences)
        self._by_id[request.id] = sequence
        self._messages[sequence] = request.encode()
        self._ready.put_nowait(sequence)
        return sequence

    async def remove(self, sequence: int) -> bool:
        """See `RequestQueue.remove`."""
        present = sequence in self._messages
        self.end(sequence)
        return present

    async def pull(self) -> Delivery:
        """See `RequestQueue.pull`."""
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
        self._attempts[sequence] = self._attempts.get(sequence, 0) + 1
        return InMemoryDelivery(self, sequence, self._messages[sequence], self._attempts[sequence])

    async def _next_sequence(self) -> int:
        while (sequence := await self._ready.get()) not in self._messages:
            pass  # it was taken out while it waited
        return sequence

    async def stop_pulling(self) -> None:
        """See `RequestQueue.stop_pulling`."""
        for task in self._pulls:
            task.cancel()

    def end(self, sequence: int) -> None:
        """Forget a message and free its place."""
        self._messages.pop(sequence, None)
        self._free(sequence)

    def give_back(self, sequence: int, delay_s: float) -> None:
        """Make a message available again after `delay_s`."""
        self._free(sequence)
        loop = asyncio.get_running_loop()
        put: Callable[[int], None] = self._ready.put_nowait
        if delay_s:
            loop.call_later(delay_s, put, sequence)
        else:
            put(sequence)

    def _free(self, sequence: int) -> None:
        if sequence in self._out:
            self._out.discard(sequence)
            self._concurrency.release()
