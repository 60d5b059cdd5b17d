"""The queue seam: requests go in once and come out one at a time, each with the verbs that end its delivery."""

import asyncio
import math
import time
from collections.abc import Mapping
from typing import Protocol

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.errors import APIError, NotFoundError

from forebay_contracts.nats.connection import Connection
from forebay_contracts.queueing.pulls import Pulls
from forebay_contracts.telemetry import tracing
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import QueueFull, QueueUnavailable
from forebay_contracts.wire.request import InferenceRequest

TTL_GRACE_S = 30
"""The server drops a message so long after its deadline: later than any worker still runs it."""

PUBLISH_TIMEOUT_S = 1.0
"""How long one try at a publish may take; another with the same Nats-Msg-Id makes its outcome known."""

ACK_TIMEOUT_S = 1.0
"""How long the server may take to confirm an ack; without it the message may come again, and finds that it is done."""

PUBLISH_RETRY_S = 0.05
"""Pause between such tries."""

_STORE_FAILED = 10077
_NO_RESOURCES = 10023
_NOT_NOW = (409, 429, 503)
"""Codes of answers that another try may better: an earlier try is still being agreed on by the cluster (409), its
queue of proposals is long (429), JetStream is stopping, not up yet, or no longer the leader (503)."""


class Delivery(Protocol):
    """One attempt at one message. Exactly one of `ack`, `nak`, `term` ends it; `in_progress` keeps it."""

    data: bytes
    headers: Mapping[str, str]
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

    def __init__(self, connection: Connection, msg: Msg) -> None:
        metadata = msg.metadata
        self._requests = connection.requests
        self._msg = msg
        self.data: bytes = msg.data
        self.headers: Mapping[str, str] = msg.headers or {}
        self.attempt: int = metadata.num_delivered
        self.sequence: int = metadata.sequence.stream

    async def ack(self) -> None:
        """Acknowledge and wait for the server to confirm it."""
        await self._requests.request(self._msg.reply, b"+ACK", timeout_s=ACK_TIMEOUT_S)

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

    A publish waits `patience_s` for a NATS that is away, being restarted or electing a leader.
    """

    def __init__(self, connection: Connection, model: str | None = None, *, patience_s: float = 0) -> None:
        self._connection = connection
        self._patience_s = patience_s
        self._pulls = Pulls(connection, model) if model is not None else None

    async def publish(self, request: InferenceRequest) -> int:
        """Admit through the stream; see `RequestQueue.publish`.

        A publish that stays without an answer (the ack was lost, the stream has no leader just now, NATS is
        away) is repeated for `patience_s` with the same Nats-Msg-Id, which tells whether an earlier one was
        stored. Where the outcome stays unknown, QueueUnavailable is raised, and should the message have
        been stored all the same, nobody waits for it: the worker is told so when it starts.
        """
        subject = names.request_subject(request.model, request.completion_type)
        headers = {
            names.HEADER_MSG_ID: request.id,
            names.HEADER_DEADLINE: f"{request.deadline:.3f}",
            names.HEADER_REPLY_TO: request.reply_to,
        }
        tracing.inject(headers)
        payload = request.encode()
        # A request that would only time out is not waited for.
        give_up_at = time.monotonic() + min(self._patience_s, request.deadline - time.time())
        while True:
            ttl_s = math.ceil(request.deadline - time.time()) + TTL_GRACE_S
            try:
                headers[names.HEADER_TTL] = str(max(ttl_s, 1))
                return await self._connection.requests.store(
                    subject, payload, timeout_s=PUBLISH_TIMEOUT_S, headers=headers
                )
            except APIError as exc:
                # A store that is being closed fails with the same code, and says so in words alone.
                if exc.err_code == _STORE_FAILED and "exceeded" in (exc.description or ""):
                    raise QueueFull("the queue is full, try again later") from exc
                if exc.code not in _NOT_NOW or exc.err_code == _NO_RESOURCES:
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
        if self._pulls is None:
            raise RuntimeError("a queue without a model can only be published to")
        return JetStreamDelivery(self._connection, await self._pulls.next())

    async def stop_pulling(self) -> None:
        """See `RequestQueue.stop_pulling`."""
        if self._pulls is not None:
            await self._pulls.stop(PUBLISH_TIMEOUT_S)
