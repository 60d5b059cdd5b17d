"""Deliveries from the durable consumer that all workers of a model share. All slots of a worker use one inbox."""

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Mapping
from typing import Final

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from forebay_contracts.nats.connection import Connection
from forebay_contracts.queueing.protocols import Delivery
from forebay_contracts.wire import names

PULL_EXPIRES_S: Final = 5.0
"""How long the server keeps a pull. Short, since a pull that the server forgot is noticed only when it expires."""

PULL_GRACE_S: Final = 1.0
"""A pull that was not answered so long after it expired is forgotten."""

PULL_RETRY_S: Final = 0.5
"""Pause after a pull that the server refused."""

ACK_TIMEOUT_S: Final = 1.0
"""How long the server may take to confirm an ack. Without it the message may come again, and is then only acked."""

FLUSH_TIMEOUT_S: Final = 1.0
"""How long `stop` waits for messages that are on their way."""

_EXPIRED = "408"

log = logging.getLogger(__name__)


class JetStreamDelivery:
    """A delivery from the shared durable consumer; see `Delivery`."""

    def __init__(self, connection: Connection, msg: Msg) -> None:
        metadata = msg.metadata
        self._requests = connection.requests
        self._msg = msg
        self.data: bytes = msg.data
        self.headers: Mapping[str, str] = msg.headers or {}
        self.num_delivered: int = metadata.num_delivered
        self.sequence: int = metadata.sequence.stream

    @property
    def ack_subject(self) -> str:
        """Where any connection may acknowledge it."""
        return str(self._msg.reply)

    async def ack(self) -> None:
        """Acknowledge, and wait until the server confirms."""
        await self._requests.request(self._msg.reply, b"+ACK", timeout_s=ACK_TIMEOUT_S)

    async def nak(self, delay_s: float = 0) -> None:
        """Give the message back; the server counts whole milliseconds."""
        await self._msg.nak(delay=delay_s or None)

    async def term(self) -> None:
        """Have it never delivered again."""
        await self._msg.term()

    async def in_progress(self) -> None:
        """Restart the ack wait."""
        await self._msg.in_progress()


class JetStreamDeliveries:
    """Hands each message of `model` to the slot that has waited longest; see `Deliveries`.

    With another `stream`, `model` is the name of its consumer.

    The server is never asked for more messages than slots wait. `_asked` holds the pulls that it has not answered yet,
    as pairs: when the pull expires, and how many messages it still asks for. A pull can be lost without an answer (its
    server died, its consumer moved to another server). Then it expires in `_asked`.
    """

    def __init__(self, connection: Connection, model: str, stream: str = names.STREAM) -> None:
        self._connection = connection
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{names.model_token(model)}"
        self._inbox = ""
        self._stopped = False
        self._subscription: Subscription | None = None
        self._starting = asyncio.Lock()
        self._waiting: deque[asyncio.Future[Msg]] = deque()
        self._asked: deque[list[float]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def pull(self) -> Delivery:
        """The next message; waits for ever, also over reconnects."""
        async with self._starting:
            if self._stopped:
                raise asyncio.CancelledError
            if self._subscription is None:
                await self._start()
        future: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            await self._ask()
            return JetStreamDelivery(self._connection, await future)
        finally:
            if future in self._waiting:
                self._waiting.remove(future)

    def reserve(self) -> asyncio.Future[Msg] | None:
        """The slot that has waited longest, for a message that comes by another way; None if no slot waits.

        The server may still send a message for it. If no slot waits then, that message goes back at once.
        """
        while self._waiting:
            if not (slot := self._waiting.popleft()).done():
                return slot
        return None

    def release(self, slot: asyncio.Future[Msg]) -> None:
        """Have a reserved slot wait again."""
        if self._stopped:
            slot.cancel()
        elif not slot.done():
            self._waiting.appendleft(slot)
            self._ask_at(time.monotonic())  # a message may have come for it, and gone back

    async def stop(self) -> None:
        """Unsubscribe, so that the server sends nothing more here, and cancel the pulls that wait."""
        self._stopped = True
        async with self._starting:
            subscription, self._subscription = self._subscription, None
        if self._timer is not None:
            self._timer.cancel()
        try:
            if subscription is not None:
                await self._connection.client.flush(FLUSH_TIMEOUT_S)
                await subscription.unsubscribe()
        except (NatsError, TimeoutError) as exc:
            log.debug("the pulls could not be withdrawn: %r", exc)
        for future in self._waiting:
            future.cancel()
        self._waiting.clear()

    async def _start(self) -> None:
        client = self._connection.client
        self._inbox = client.new_inbox()
        self._subscription = await client.subscribe(self._inbox, cb=self._arrived)
        self._connection.on_reconnect.append(self._pull_anew)

    async def _pull_anew(self) -> None:
        self._asked.clear()
        await self._ask()

    async def _ask(self) -> None:
        """Ask the server for a message for each slot that waits without one."""
        now = time.monotonic()
        while self._asked and self._asked[0][0] <= now:
            self._asked.popleft()
        missing = len(self._waiting) - int(sum(messages for _, messages in self._asked))
        if missing > 0 and self._subscription is not None:
            self._asked.append([now + PULL_EXPIRES_S + PULL_GRACE_S, missing])
            order = {"batch": missing, "expires": int(PULL_EXPIRES_S * 1e9)}
            try:
                await self._connection.client.publish(self._subject, json.dumps(order).encode(), reply=self._inbox)
            except NatsError as exc:
                log.debug("pull not sent, it will be after the reconnect: %r", exc)
        if self._asked and self._timer is None:
            self._ask_at(self._asked[0][0])

    def _ask_at(self, when: float) -> None:
        def again() -> None:
            self._timer = None
            task = asyncio.ensure_future(self._ask())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(max(when - time.monotonic(), 0), again)

    def _answered(self, messages: int) -> None:
        """Take `messages` that the server has sent or declined off `_asked`, the oldest first."""
        while messages > 0 and self._asked:
            oldest = self._asked[0]
            taken = min(messages, int(oldest[1]))
            oldest[1] -= taken
            messages -= taken
            if oldest[1] <= 0:
                self._asked.popleft()

    async def _arrived(self, msg: Msg) -> None:
        status = msg.headers.get("Status") if msg.headers else None
        if status is not None and not msg.data:
            await self._declined(status, msg)
            return
        self._answered(1)
        if (slot := self.reserve()) is not None:
            slot.set_result(msg)
            return
        # No slot waits for it any more. No attempt has begun, so another worker may have it at once.
        await self._connection.client.publish(msg.reply, b"-NAK")

    async def _declined(self, status: str, msg: Msg) -> None:
        headers = msg.headers or {}
        if status == _EXPIRED:
            self._answered(int(headers.get("Nats-Pending-Messages", 1)))
            await self._ask()
            return
        # 409: the consumer was changed or deleted, or lost its leader. 503: there is none. Each waiting pull gets such
        # an answer, so all are forgotten and made again a moment later.
        if self._asked:
            log.warning("[RequestQueue] pull ended: %s %s", status, _reason(headers))
        self._asked.clear()
        self._ask_at(time.monotonic() + PULL_RETRY_S)


def _reason(headers: dict[str, str]) -> str:
    return headers.get("Description", "no such consumer").splitlines()[0]
