"""The queue seam: requests go in once and come out one at a time, each with the verbs that end its delivery."""

import asyncio
import itertools
import json
import logging
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, Protocol

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.errors import APIError, NotFoundError

from forebay_contracts import names
from forebay_contracts.connection import Connection
from forebay_contracts.errors import QueueFull, QueueUnavailable
from forebay_contracts.messages import InferenceRequest

TTL_GRACE_S = 30
"""The server drops a message so long after its deadline: later than any worker still runs it."""

PUBLISH_TIMEOUT_S = 1.0
"""How long one try at a publish may take; another with the same Nats-Msg-Id makes its outcome known."""

PUBLISH_RETRY_S = 0.05
"""Pause between such tries."""

ADMISSION_PATIENCE_S = 10.0
"""How long a request waits for a NATS that is away, being restarted or electing a leader, before its 503."""

PULL_EXPIRES_S = 5.0
"""How long the server keeps a pull: short, since one that it forgot is only noticed by its end."""

_MAX_MSGS_EXCEEDED = 10077
_NO_LEADER = (10008, 10009)  # JetStream temporarily unavailable, cluster not available
_NO_SUCH_MESSAGE = 10057
_STATUS_HEADER = "Status"

log = logging.getLogger(__name__)


class Delivery(Protocol):
    """One attempt at one message. Exactly one of `ack`, `nak`, `term` ends it; `in_progress` keeps it."""

    data: bytes
    attempt: int
    sequence: int

    async def ack(self) -> None:
        """Done: the message is gone for good once this returns."""
        ...

    async def nak(self, delay_s: float = 0) -> None:
        """Not done: to be delivered again, after `delay_s`."""
        ...

    async def term(self) -> None:
        """Never to be delivered again."""
        ...

    async def in_progress(self) -> None:
        """Still at it: the ack wait starts anew."""
        ...


class RequestQueue(Protocol):
    """Holds requests until a worker has ended each; bounded by MAX_QUEUE_SIZE, waiting and out together."""

    async def publish(self, request: InferenceRequest) -> int:
        """Admit a request; its sequence in the queue.

        Publishing the same id again changes nothing and returns the same sequence.

        Raises:
            QueueFull: nothing was admitted.
            QueueUnavailable: nothing is known to be admitted.
        """
        ...

    async def remove(self, sequence: int) -> bool:
        """Take a message out, waiting or delivered; whether it was there."""
        ...

    async def pull(self) -> Delivery:
        """The next message; waits for ever."""
        ...

    async def stop_pulling(self) -> None:
        """No further message is delivered here; what came too late goes back at once. Pending pulls are cancelled."""
        ...


class JetStreamDelivery:
    """A delivery from the shared durable consumer."""

    def __init__(self, msg: Msg) -> None:
        metadata = msg.metadata
        self._msg = msg
        self.data: bytes = msg.data
        self.attempt: int = metadata.num_delivered
        self.sequence: int = metadata.sequence.stream

    async def ack(self) -> None:
        """Acknowledge and wait for the server to confirm it."""
        await self._msg.ack_sync()

    async def nak(self, delay_s: float = 0) -> None:
        """Give back; the server counts whole milliseconds."""
        await self._msg.nak(delay=delay_s or None)

    async def term(self) -> None:
        """End for good."""
        await self._msg.term()

    async def in_progress(self) -> None:
        """Restart the ack wait."""
        await self._msg.in_progress()


class JetStreamQueue:
    """The stream `INFERENCE`; with `model`, also its consumer.

    All pulls share one inbox. A message that is waited for is handed to the longest-waiting pull; how many
    messages the server has been asked for is counted in `_asked`, so that it is never asked for more than
    there are pulls waiting.
    """

    def __init__(self, connection: Connection, model: str | None = None) -> None:
        self._connection = connection
        self._model = model
        self._inbox = ""
        self._subscription: Any = None
        self._starting = asyncio.Lock()
        self._pulls: deque[asyncio.Future[Delivery]] = deque()
        self._asked = 0
        self._ask_again: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False

    async def publish(self, request: InferenceRequest) -> int:
        """Admit through the stream; see `RequestQueue.publish`.

        A publish that stays without an answer (the ack was lost, the stream has no leader just now, NATS is
        away) is repeated for ADMISSION_PATIENCE_S with the same Nats-Msg-Id, which tells whether an earlier one
        was stored. Where the outcome stays unknown, QueueUnavailable is raised, and should the message have
        been stored all the same, nobody waits for it: the worker is told so when it starts.
        """
        subject = names.request_subject(request.model, request.completion_type)
        headers = {
            names.HEADER_MSG_ID: request.id,
            names.HEADER_DEADLINE: f"{request.deadline:.3f}",
            names.HEADER_REPLY_TO: request.reply_to,
        }
        payload = request.encode()
        give_up_at = time.monotonic() + ADMISSION_PATIENCE_S
        while True:
            ttl_s = math.ceil(request.deadline - time.time()) + TTL_GRACE_S
            try:
                ack = await self._connection.jetstream.publish(
                    subject, payload, timeout=PUBLISH_TIMEOUT_S, headers=headers, msg_ttl=max(ttl_s, 1)
                )
                return int(ack.seq)
            except APIError as exc:
                if exc.err_code == _MAX_MSGS_EXCEEDED:
                    raise QueueFull("the queue is full, try again later") from exc
                if exc.err_code not in _NO_LEADER:
                    raise QueueUnavailable(f"the queue takes nothing now: {exc.description}") from exc
                failure: Exception = exc
            except (NatsError, TimeoutError) as exc:
                failure = exc
            patience_s = give_up_at - time.monotonic()
            if patience_s <= 0 or not await self._connection.wait_connected(patience_s):
                raise QueueUnavailable("the queue cannot be reached, try again later") from failure
            await asyncio.sleep(PUBLISH_RETRY_S)

    async def remove(self, sequence: int) -> bool:
        """Delete from the stream; see `RequestQueue.remove`."""
        try:
            await self._connection.jetstream.delete_msg(names.STREAM, sequence)
        except (APIError, NotFoundError):
            return False
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("the queue cannot be reached") from exc
        return True

    async def pull(self) -> Delivery:
        """The next message for the model, over reconnects and for ever."""
        if self._subscription is None:
            async with self._starting:
                if self._subscription is None:
                    await self._start()
        future: asyncio.Future[Delivery] = asyncio.get_running_loop().create_future()
        self._pulls.append(future)
        try:
            await self._ask()
            return await future
        finally:
            if future in self._pulls:
                self._pulls.remove(future)

    async def stop_pulling(self) -> None:
        """Unsubscribe: the server sees the lost interest and delivers nothing more here."""
        self._stopped = True
        if self._ask_again is not None:
            self._ask_again.cancel()
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await self._connection.client.flush(timeout=PUBLISH_TIMEOUT_S)
            await subscription.unsubscribe()
        for future in self._pulls:
            future.cancel()
        self._pulls.clear()

    async def _start(self) -> None:
        client = self._connection.client
        self._inbox = client.new_inbox()
        self._subscription = await client.subscribe(self._inbox, cb=self._arrived)
        self._connection.on_reconnect.append(self._pull_anew)

    async def _pull_anew(self) -> None:
        self._asked = 0
        await self._ask()

    async def _ask(self) -> None:
        """Ask the server for as many messages as are waited for and not yet asked for."""
        missing = len(self._pulls) - self._asked
        if missing <= 0 or self._stopped or self._model is None:
            return
        self._asked += missing
        order = {"batch": missing, "expires": int(PULL_EXPIRES_S * 1e9)}
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{names.STREAM}.{names.model_token(self._model)}"
        try:
            await self._connection.client.publish(subject, json.dumps(order).encode(), reply=self._inbox)
        except NatsError:
            self._asked -= missing
        # A pull that the server forgot gets no answer at all; this notices it.
        self._ask_later(2 * PULL_EXPIRES_S, forget=True)

    def _ask_later(self, delay_s: float, *, forget: bool) -> None:
        def again() -> None:
            if forget:
                self._asked = 0
            task = asyncio.ensure_future(self._ask())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        if self._ask_again is not None:
            self._ask_again.cancel()
        self._ask_again = asyncio.get_running_loop().call_later(delay_s, again)

    async def _arrived(self, msg: Msg) -> None:
        status = msg.headers.get(_STATUS_HEADER) if msg.headers else None
        if status is not None and not msg.data:
            await self._pull_ended(status, msg)
            return
        self._asked = max(self._asked - 1, 0)
        delivery = JetStreamDelivery(msg)
        while self._pulls:
            future = self._pulls.popleft()
            if not future.done():
                future.set_result(delivery)
                return
        await delivery.nak()

    async def _pull_ended(self, status: str, msg: Msg) -> None:
        headers = msg.headers or {}
        unserved = int(headers.get("Nats-Pending-Messages", self._asked))
        self._asked = max(self._asked - unserved, 0)
        if status == "408":  # the pull expired, nothing was there
            await self._ask()
            return
        # 409: the consumer was changed, deleted, or lost its leader; 503: it is not there.
        log.warning("[RequestQueue] pull ended: %s %s", status, headers.get("Description", "no such consumer"))
        self._ask_later(RETRY_PULL_S, forget=True)


RETRY_PULL_S = 0.5
"""Pause after a pull that the server refused."""


class InMemoryDelivery:
    """A delivery from `InMemoryQueue`."""

    def __init__(self, queue: "InMemoryQueue", sequence: int, data: bytes, attempt: int) -> None:
        self._queue = queue
        self.sequence = sequence
        self.data = data
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
