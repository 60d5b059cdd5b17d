"""The live view of the queue for whoever watches: one subscription an api process, however many listen.

While nobody listens nothing is subscribed to, kept or asked for. While somebody does, changes of state are heard
from the bucket's subjects as they are written, the numbers are read once a second, and both are told to all
listeners together, at most four times a second. There is no buffer for a listener: what it has not been told yet
is what has changed since it was told last. Where that is more than a message holds, or is kept no more, it is told
the newest requests anew, to be shown instead of what it knows.
"""

import asyncio
import contextlib
import functools
import json
import logging
import re
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, takewhile
from operator import attrgetter

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from pydantic import ValidationError

from forebay_api.clients.keys import Client
from forebay_contracts.nats.connection import Connection
from forebay_contracts.queueing.recent_requests import recent_changes
from forebay_contracts.queueing.status import QueueStatus
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import InvalidApiKey, QueueError, TooManyListeners
from forebay_contracts.wire.heartbeats import WorkerInfo
from forebay_contracts.wire.state import RequestState

MAX_LISTENERS = 100
"""Most listeners of one api process; one more gets 503."""

MAX_LISTENERS_OF_KEY = 10
"""Most of them with one key that is no operator's."""

OPERATORS_LISTENERS = 10
"""How many of them are left to operators, whoever else listens."""

MIN_INTERVAL_S = 0.25
"""Least time between two messages to a listener."""

NUMBERS_INTERVAL_S = 1.0
"""How often the queue's numbers are read while somebody listens, and the most time between two messages."""

MAX_REQUESTS = 50
"""How many requests a message tells of."""

MAX_KEPT = 1_000
"""How many requests are kept, those that changed last and rather unfinished ones: a key sees few of them."""

LOADED_CHANGES = 2_000
"""How many of the bucket's latest changes the first listener has read, about two for each request."""

MAX_REVISIONS = 10_000
"""Of how many requests it is known which writes can be no news any more, kept or not."""

FIRST_WRITE_S = 10.0
"""How old a request may be of which nothing is known, for what claims to be its first write to be believed."""

_NOTHING = -1
"""The version that a listener has been told who is to be told the newest requests."""

_QUEUED_AT = re.compile(rb'"queued_at":(\d+(?:\.\d+)?)')
_UNFINISHED = (b'"status":"queued"', b'"status":"processing"')

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Change:
    """A state as it was heard. Decoded when it is told: of the changes of a busy second most are overtaken by then."""

    request_id: str
    version: int
    queued_at: float
    data: bytes

    @functools.cached_property
    def state(self) -> RequestState | None:
        """The state, None where it cannot be read."""
        try:
            return RequestState.model_validate_json(self.data)
        except ValidationError:
            log.debug("the state of %s cannot be read", self.request_id)
            return None


class Feed:
    """Server-sent events: `event: queue` with JSON of `connected, status, workers, reset, requests`."""

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
        self._tasks: list[asyncio.Task[None]] = []
        # Both in the order of their versions. What has been dropped has no version above the floor.
        self._unfinished: OrderedDict[str, Change] = OrderedDict()
        self._ended: OrderedDict[str, Change] = OrderedDict()
        self._version = self._floor = 0
        self._revisions: OrderedDict[str, int] = OrderedDict()
        self._stale = False
        self._numbers: QueueStatus | None = None
        self._news = asyncio.Event()
        self._told = asyncio.Event()
        self._closed = False
        connection.on_reconnect.append(self._reconnected)

    @property
    def listeners(self) -> int:
        """How many listen now."""
        return len(self._listening)

    async def listen(self, caller: Callable[[], Client]) -> AsyncGenerator[bytes, None]:
        """Events until the api stops; the first one tells the newest requests. To be closed by who iterates.

        `caller` says who listens, and is asked again before each event: once it raises InvalidApiKey, there are no
        more; with other rights than before, it is told what it may see now.

        Raises:
            InvalidApiKey: as `caller` does at once.
            TooManyListeners: as many listen already as may.
            QueueUnavailable: NATS does not answer.
        """
        client = admitted = caller()
        self._admit(client)
        self._listening.append(admitted)
        try:
            async with self._starting:
                if self._subscription is None:
                    await self._start()
            version = _NOTHING
            while True:
                # Taken before the event is sent: what changes meanwhile is for the next one.
                told, newest = self._told, self._version
                yield self._event(version, client)
                version = newest
                await told.wait()
                if self._closed:
                    return
                try:
                    now = caller()
                except InvalidApiKey:
                    return
                if now != client:
                    client, version = now, _NOTHING
        finally:
            self._listening.remove(admitted)
            if not self._listening:
                await self._stop()

    async def close(self) -> None:
        """Let every listener end: the api stops."""
        self._closed = True
        self._tell()

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
            await self._load()
            self._numbers = await self._read_numbers()
        except BaseException:
            await self._stop()
            raise
        self._tasks = [asyncio.create_task(self._tell_all()), asyncio.create_task(self._keep_counting())]

    async def _stop(self) -> None:
        subscription, self._subscription = self._subscription, None
        for task in self._tasks:
            task.cancel()
        self._tasks = []
        self._forget()
        if subscription is not None:
            with contextlib.suppress(NatsError):
                await subscription.unsubscribe()

    def _forget(self) -> None:
        self._unfinished.clear()
        self._ended.clear()
        self._revisions.clear()
        self._version += 1
        self._floor = self._version

    async def _load(self) -> None:
        """Read what there is, in place of what was known before."""
        before, self._stale = self._version, False
        try:
            stored = await recent_changes(self._connection, LOADED_CHANGES)
        except QueueError:
            self._stale = True
            raise
        heard = [(change, self._revisions.get(change.request_id, 0)) for change in self._since(before)]
        self._forget()
        for msg in stored:
            if msg.data and msg.headers:
                self._keep(_request_id(msg.headers["Nats-Subject"]), int(msg.headers["Nats-Sequence"]), msg.data)
        # What was heard meanwhile is newer, unless it is what was read, or a write that lost to it.
        for change, revision in reversed(heard):
            if revision > self._revisions.get(change.request_id, 0):
                self._keep(change.request_id, revision, change.data)

    async def _reconnected(self) -> None:
        # What was written meanwhile was not heard. It is read by who asks once a second, until there is an answer.
        self._stale = True

    async def _heard(self, msg: Msg) -> None:
        if not msg.data:
            return
        request_id = _request_id(msg.subject)
        # Writes that lose their compare-and-set are heard too: they name a revision that another has named.
        over = int((msg.headers or {}).get("Nats-Expected-Last-Subject-Sequence", 0))
        known = self._revisions.get(request_id)
        if known is None and not over and time.time() - _queued_at(msg.data) > FIRST_WRITE_S:
            return  # Most likely it lost to a first write that was not heard here, or is remembered no more.
        if over >= (known or 0):
            self._keep(request_id, over + 1, msg.data)

    def _keep(self, request_id: str, revision: int, data: bytes) -> None:
        """Keep a state whose revision is `revision` or more."""
        self._version += 1
        self._revisions[request_id] = revision
        self._revisions.move_to_end(request_id)
        if len(self._revisions) > MAX_REVISIONS:
            self._revisions.popitem(last=False)
        self._unfinished.pop(request_id, None)
        self._ended.pop(request_id, None)
        # Within a string the quotes would be escaped.
        kept = self._unfinished if any(status in data for status in _UNFINISHED) else self._ended
        kept[request_id] = Change(request_id, self._version, _queued_at(data), data)
        if len(self._unfinished) + len(self._ended) > MAX_KEPT:
            _, dropped = (self._ended or self._unfinished).popitem(last=False)
            self._floor = max(self._floor, dropped.version)
        self._news.set()

    async def _tell_all(self) -> None:
        while True:
            # Also without news: who hears nothing takes the connection for lost, and keys are looked at again.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(NUMBERS_INTERVAL_S):
                    await self._news.wait()
            self._news.clear()
            self._tell()
            await asyncio.sleep(MIN_INTERVAL_S)

    def _tell(self) -> None:
        told, self._told = self._told, asyncio.Event()
        told.set()

    async def _keep_counting(self) -> None:
        while True:
            await asyncio.sleep(NUMBERS_INTERVAL_S)
            try:
                if self._stale:
                    await self._load()
                self._numbers = await self._read_numbers()
            except QueueError as exc:
                self._numbers = None
                log.debug("the queue's numbers cannot be read: %s", exc)
            self._news.set()

    def _event(self, since: int, client: Client) -> bytes:
        reset = since < self._floor
        if not reset:
            told = list(islice(_visible(self._since(since), client), MAX_REQUESTS + 1))
            reset = len(told) > MAX_REQUESTS
        if reset:
            newest = sorted(
                chain(self._unfinished.values(), self._ended.values()), key=attrgetter("queued_at"), reverse=True
            )
            told = list(islice(_visible(newest, client), MAX_REQUESTS))
        body = {
            "at": time.time(),
            "connected": self._connection.connected,
            "status": self._numbers.model_dump() if self._numbers else None,
            "workers": [worker.model_dump(mode="json") for worker in self._workers()],
            "reset": reset,
            "requests": [
                # What went wrong inside is for who runs it.
                state.model_dump(mode="json") | ({} if client.operator else {"fault": None})
                for state in told
            ],
        }
        return b"event: queue\ndata: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"

    def _since(self, version: int) -> Iterator[Change]:
        """What has changed since then, of the unfinished and of the others the last first."""
        for kept in (self._unfinished, self._ended):
            yield from takewhile(lambda change: change.version > version, reversed(kept.values()))


def _visible(changes: Iterable[Change], client: Client) -> Iterator[RequestState]:
    return (state for change in changes if (state := change.state) is not None and client.may_see(state.key))


def _request_id(subject: str) -> str:
    return subject.rsplit(".", 1)[1]


def _queued_at(data: bytes) -> float:
    """When the request of a state was queued, without reading all of it; 0 where it does not say."""
    found = _QUEUED_AT.search(data)
    return float(found[1]) if found else 0.0
