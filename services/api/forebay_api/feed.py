"""The live view of the queue for whoever watches: one subscription an api process, however many listen.

While nobody listens nothing is subscribed to, kept or asked for. While somebody does, changes of state are heard
from the bucket's subjects as they are written, the numbers are read once a second, and both are told to all
listeners together, at most four times a second. There is no buffer for a listener: what it has not been told yet
is what has changed since it was told last, of the newest requests alone.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from pydantic import ValidationError

from forebay_contracts import names
from forebay_contracts.connection import Connection
from forebay_contracts.errors import QueueError, TooManyListeners
from forebay_contracts.messages import RequestState, WorkerInfo
from forebay_contracts.recent import recent_states
from forebay_contracts.status import QueueStatus

MAX_LISTENERS = 100
"""Most listeners of one api process; one more gets 503."""

MIN_INTERVAL_S = 0.25
"""Least time between two messages to a listener."""

NUMBERS_INTERVAL_S = 1.0
"""How often the queue's numbers are read while somebody listens."""

MAX_REQUESTS = 50
"""How many requests are kept, those that changed last: what a new listener is told first."""

log = logging.getLogger(__name__)


class Feed:
    """Server-sent events of the queue: `event: queue` with JSON of `connected, status, workers, requests`."""

    def __init__(
        self,
        connection: Connection,
        numbers: Callable[[], Awaitable[QueueStatus]],
        workers: Callable[[], Iterable[WorkerInfo]],
    ) -> None:
        self._connection = connection
        self._read_numbers = numbers
        self._workers = workers
        self._listeners = 0
        self._starting = asyncio.Lock()
        self._subscription: Subscription | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._latest: OrderedDict[str, tuple[int, int, bytes]] = OrderedDict()
        self._version = 0
        self._numbers: QueueStatus | None = None
        self._news = asyncio.Event()
        self._told = asyncio.Event()
        self._closed = False
        connection.on_reconnect.append(self._reconnected)

    @property
    def listeners(self) -> int:
        """How many listen now."""
        return self._listeners

    async def listen(self, may_see: Callable[[str | None], bool]) -> AsyncGenerator[bytes, None]:
        """Events until the api stops; the first one tells all that is known. To be closed by who iterates.

        `may_see` says of the name of a key whether the listener may see requests that came with it.

        Raises:
            TooManyListeners: MAX_LISTENERS listen already.
            QueueUnavailable: NATS does not answer.
        """
        if self._listeners >= MAX_LISTENERS:
            raise TooManyListeners(f"{MAX_LISTENERS} listeners watch the queue already, try again later")
        self._listeners += 1
        try:
            async with self._starting:
                if self._subscription is None:
                    await self._start()
            version = 0
            while not self._closed:
                # Taken before the event is sent: what changes meanwhile is for the next one.
                told, newest = self._told, self._version
                yield self._event(version, may_see)
                version = newest
                await told.wait()
        finally:
            self._listeners -= 1
            if self._listeners == 0:
                await self._stop()

    async def close(self) -> None:
        """Let every listener end: the api stops."""
        self._closed = True
        self._tell()

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
        self._latest.clear()
        if subscription is not None:
            with contextlib.suppress(NatsError):
                await subscription.unsubscribe()

    async def _load(self) -> None:
        for state in await recent_states(self._connection, MAX_REQUESTS):
            # What was heard meanwhile is newer.
            if state.id not in self._latest:
                self._keep(state.id, state.encode())

    async def _reconnected(self) -> None:
        if self._subscription is not None:
            self._latest.clear()
            with contextlib.suppress(QueueError):
                await self._load()

    async def _heard(self, msg: Msg) -> None:
        if msg.data:
            request_id = msg.subject.rsplit(".", 1)[1]
            # Writes that lose their compare-and-set are heard too: they name a revision that another has named.
            over = int((msg.headers or {}).get("Nats-Expected-Last-Subject-Sequence", 0))
            if request_id not in self._latest or over > self._latest[request_id][1]:
                self._keep(request_id, msg.data, over)

    def _keep(self, request_id: str, data: bytes, over: int = 0) -> None:
        # Decoded only when it is told: of the changes of a busy second most are overtaken by then.
        self._version += 1
        self._latest[request_id] = (self._version, over, data)
        self._latest.move_to_end(request_id)
        if len(self._latest) > MAX_REQUESTS:
            self._latest.popitem(last=False)
        self._news.set()

    async def _tell_all(self) -> None:
        while True:
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
                self._numbers = await self._read_numbers()
            except QueueError as exc:
                self._numbers = None
                log.debug("the queue's numbers cannot be read: %s", exc)
            self._news.set()

    def _event(self, since: int, may_see: Callable[[str | None], bool]) -> bytes:
        changed = []
        for request_id, (version, _, data) in self._latest.items():
            if version > since:
                try:
                    state = RequestState.model_validate_json(data)
                except ValidationError:
                    log.debug("the state of %s cannot be read", request_id)
                    continue
                if may_see(state.key):
                    changed.append(state.model_dump(mode="json"))
        body = {
            "at": time.time(),
            "connected": self._connection.connected,
            "status": self._numbers.model_dump() if self._numbers else None,
            "workers": [worker.model_dump(mode="json") for worker in self._workers()],
            "requests": changed,
        }
        return b"event: queue\ndata: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
