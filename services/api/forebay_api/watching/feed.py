"""The live view of the queue: one reader of the states in an api process, however many listen.

While nobody listens, nothing is subscribed to, kept or asked for. While somebody does, new states are read from the
bucket as soon as one of its subjects is heard, and the queue's numbers once a second. All listeners are told at most
four times a second. No listener has a buffer: it is told what has changed since its last message. If that is more than
a message holds, or is no longer kept, it is told the newest requests instead, and to forget the others.

A KV watch would do the reading, but needs a consumer. A user that may create consumers can make them deliver to any
subject of its account, so an api may not create one (docs/security-nats.md). Therefore the subscription only says that
something has changed. Batched direct gets then read what it is, in the order of the bucket's revisions.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, takewhile
from typing import Any

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from pydantic import ValidationError

from forebay_api.clients.keys import Client
from forebay_contracts.nats import clock
from forebay_contracts.nats.connection import Connection
from forebay_contracts.queueing.recent_requests import recent_changes
from forebay_contracts.queueing.status import QueueStatus
from forebay_contracts.version import VERSION
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import InvalidApiKey, QueueError, QueueUnavailable, TooManyListeners
from forebay_contracts.wire.heartbeats import WorkerInfo
from forebay_contracts.wire.state import RequestState

MAX_LISTENERS = 100
"""Most listeners of one api process; one more gets 503."""

MAX_LISTENERS_OF_KEY = 10
"""Most listeners with one key that is no operator's."""

OPERATORS_LISTENERS = 10
"""Listeners reserved for operators."""

MIN_INTERVAL_S = 0.25
"""Least time between two messages to a listener."""

MAX_INTERVAL_S = 1.0
"""Most time between two messages, and how often the queue's numbers are read."""

SETTLE_S = 0.02
"""Time from hearing of a write until it is read: a cluster stores it a moment later."""

READ_TIMEOUT_S = 5.0
"""How long NATS may take to be read before listeners are told without its answer."""

MAX_REQUESTS = 50
"""Most requests in one message."""

MAX_KEPT = 6_000
"""Most requests kept: those that changed last, unfinished ones before others. Each takes 4 KB."""

MAX_CHANGES = 12_000
"""Most changes read at once, some two for each request."""

DECODED_AT_ONCE = 100
"""Changes decoded before other work of the event loop gets its turn; each takes 30 µs."""

LINGER_S = 10.0
"""How long the requests are kept after somebody listed them, if nobody listens."""

_NOTHING = -1
"""The revision of a listener that is to be told the newest requests."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Change:
    """A state at its revision in the bucket."""

    revision: int
    state: RequestState


class Feed:
    """Server-sent events: `event: queue` with the JSON that `get_queue_events` describes."""

    def __init__(
        self,
        connection: Connection,
        numbers: Callable[[], Awaitable[QueueStatus]],
        workers: Callable[[], Iterable[WorkerInfo]],
    ) -> None:
        self._connection = connection
        self._read_numbers = numbers
        self._workers = workers
        self._listening: list[Client] = []
        self._starting = asyncio.Lock()
        self._subscription: Subscription | None = None
        self._task: asyncio.Task[None] | None = None
        # Both in the order of their revisions.
        self._unfinished: OrderedDict[str, Change] = OrderedDict()
        self._ended: OrderedDict[str, Change] = OrderedDict()
        self._revision = 0
        """The newest revision read."""
        self._dropped = 0
        """The newest revision that is no longer kept, or was not read."""
        self._stale = True
        """Whether the revisions after the newest one may be of another bucket, or too many to read."""
        self.complete = False
        """Whether all requests of the bucket are kept."""
        self._numbers: QueueStatus | None = None
        self._numbers_at = 0.0
        self._heard_write = asyncio.Event()
        self._told = asyncio.Event()
        self._closed = False
        self._wanted_until = 0.0
        connection.on_reconnect.append(self._reconnected)

    @property
    def listeners(self) -> int:
        """How many listen now."""
        return len(self._listening)

    async def listen(self, caller: Callable[[], Client]) -> AsyncGenerator[bytes, None]:
        """Events until the api stops, the first with the newest requests. Whoever iterates must close it.

        `caller` says who listens, and is asked again before each event. Once it raises InvalidApiKey, the events end.
        If its rights have changed, the listener is told what it may see now.

        Raises:
            InvalidApiKey: the first call of `caller` raised it.
            TooManyListeners: there are as many listeners as there may be.
            QueueUnavailable: NATS does not answer.
        """
        client = admitted = caller()
        self._admit(client)
        self._listening.append(admitted)
        try:
            async with self._starting:
                if self._subscription is None:
                    await self._start()
            known = _NOTHING
            while True:
                # Taken before the event is sent: what changes meanwhile belongs to the next one.
                told, newest = self._told, self._revision
                yield self._event(known, client)
                known = newest
                await told.wait()
                if self._closed:
                    return
                try:
                    now = caller()
                except InvalidApiKey:
                    return
                if now != client:
                    client, known = now, _NOTHING
        finally:
            self._listening.remove(admitted)
            if not self._wanted:
                await self._stop()

    async def states(self, client: Client) -> Iterator[RequestState]:
        """The requests that are kept and that `client` may see. Raises QueueUnavailable: NATS does not answer."""
        if not self._connection.connected:
            raise QueueUnavailable("NATS is away")
        self._wanted_until = time.monotonic() + LINGER_S
        async with self._starting:
            if self._subscription is None:
                await self._start()
        return _visible(chain(self._unfinished.values(), self._ended.values()), client)

    async def close(self) -> None:
        """End every listener's events: the api stops."""
        self._closed = True
        self._tell()

    @property
    def _wanted(self) -> bool:
        return bool(self._listening) or time.monotonic() < self._wanted_until

    def _admit(self, client: Client) -> None:
        most = MAX_LISTENERS if client.operator else MAX_LISTENERS - OPERATORS_LISTENERS
        if self.listeners >= most:
            raise TooManyListeners(f"{self.listeners} listeners watch the queue already, try again later")
        if not client.operator and self._listening.count(client) >= MAX_LISTENERS_OF_KEY:
            raise TooManyListeners(f"{MAX_LISTENERS_OF_KEY} listeners with this key watch the queue already")

    async def _start(self) -> None:
        subject = names.bucket_subjects(names.REQUESTS_BUCKET)
        self._subscription = await self._connection.client.subscribe(subject, cb=self._heard)
        try:
            await self._read()
        except BaseException:
            await self._stop()
            raise
        self._task = asyncio.create_task(self._follow())

    async def _stop(self) -> None:
        subscription, self._subscription = self._subscription, None
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        self._stale, self._numbers_at = True, 0
        self._unfinished.clear()
        self._ended.clear()
        if subscription is not None:
            with contextlib.suppress(NatsError):
                await subscription.unsubscribe()

    async def _heard(self, _: Msg) -> None:
        self._heard_write.set()

    async def _reconnected(self) -> None:
        self._stale = True

    async def _follow(self) -> None:
        while self._wanted:
            # Also told without news: a client that hears nothing assumes that the connection is lost.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(MAX_INTERVAL_S):
                    await self._heard_write.wait()
                    await asyncio.sleep(SETTLE_S)
            self._heard_write.clear()
            try:
                async with asyncio.timeout(READ_TIMEOUT_S):
                    await self._read()
            except (QueueError, TimeoutError) as exc:
                self._numbers = None
                log.debug("the queue cannot be read: %r", exc)
            self._tell()
            await asyncio.sleep(MIN_INTERVAL_S)
        await self._stop()

    async def _read(self) -> None:
        """Read the changes since the last time, and the numbers if they are due."""
        if not self._connection.connected:
            raise QueueUnavailable("NATS is away")
        self._stale, stale = False, self._stale
        try:
            changes, older = await recent_changes(self._connection, MAX_CHANGES, 0 if stale else self._revision)
        except BaseException:
            self._stale = True
            raise
        newest = self._revision
        if changes:
            oldest, newest = _revision(changes[0]), _revision(changes[-1])
            stale = stale or oldest <= self._revision or newest - self._revision > MAX_CHANGES
        if stale:
            self._unfinished.clear()
            self._ended.clear()
            self.complete = not older
            # Until the newest one has been decoded, a listener is told all that is kept.
            self._dropped = newest
        for number, msg in enumerate(changes, start=1):
            self._keep((msg.headers or {})["Nats-Subject"].rsplit(".", 1)[1], _revision(msg), msg.data)
            if number % DECODED_AT_ONCE == 0:
                await asyncio.sleep(0)
        if time.monotonic() - self._numbers_at >= MAX_INTERVAL_S:
            self._numbers = await self._read_numbers()
            self._numbers_at = time.monotonic()

    def _keep(self, request_id: str, revision: int, data: bytes) -> None:
        self._revision = revision
        self._unfinished.pop(request_id, None)
        self._ended.pop(request_id, None)
        try:
            state = RequestState.model_validate_json(data)
        except ValidationError:  # deleted, or written by a newer version
            return
        kept = self._ended if state.status.final else self._unfinished
        kept[request_id] = Change(revision, state)
        if len(self._unfinished) + len(self._ended) > MAX_KEPT:
            _, dropped = (self._ended or self._unfinished).popitem(last=False)
            self._dropped = max(self._dropped, dropped.revision)
            self.complete = False

    def _tell(self) -> None:
        told, self._told = self._told, asyncio.Event()
        told.set()

    def _event(self, known: int, client: Client) -> bytes:
        reset = known < self._dropped or known > self._revision
        if not reset:
            told = list(islice(_visible(self._since(known), client), MAX_REQUESTS + 1))
            reset = len(told) > MAX_REQUESTS
        if reset:
            newest = sorted(
                chain(self._unfinished.values(), self._ended.values()),
                key=lambda change: change.state.queued_at,
                reverse=True,
            )
            told = list(islice(_visible(newest, client), MAX_REQUESTS))
        body = {
            "at": clock.now(),
            "version": VERSION,
            "client": {"name": client.name, "operator": client.operator},
            "connected": self._connection.connected,
            "nats": self._connection.server if client.operator else None,
            "status": self._numbers.model_dump() if self._numbers else None,
            "workers": [worker.model_dump(mode="json") for worker in self._workers()],
            "reset": reset,
            "requests": [without_faults(client, state.model_dump(mode="json")) for state in told],
        }
        return b"event: queue\ndata: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"

    def _since(self, revision: int) -> Iterator[Change]:
        """What has changed since `revision`: unfinished requests first, of each kind the newest change first."""
        for kept in (self._unfinished, self._ended):
            yield from takewhile(lambda change: change.revision > revision, reversed(kept.values()))


def without_faults(client: Client, state: dict[str, Any]) -> dict[str, Any]:
    """`state` as `client` may see it. A `fault` says what went wrong inside: that is for operators."""
    if client.operator:
        return state
    return state | {"fault": None, "attempts": [one | {"fault": None} for one in state["attempts"]]}


def _visible(changes: Iterable[Change], client: Client) -> Iterator[RequestState]:
    return (change.state for change in changes if client.may_see(change.state.key))


def _revision(msg: Msg) -> int:
    return int((msg.headers or {})["Nats-Sequence"])
