"""Which services are alive: each writes a heartbeat into a KV bucket, and others keep a live view of it."""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from nats.js.errors import NotFoundError
from pydantic import ValidationError

from forebay_contracts.nats import direct_get
from forebay_contracts.nats.connection import Connection
from forebay_contracts.nats.streams import HEARTBEAT_TTL_S
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import QueueUnavailable
from forebay_contracts.wire.heartbeats import ServiceInfo

HEARTBEAT_INTERVAL_S = 1.0

MAX_STRANGERS = 10_000
"""Most members without a heartbeat that are remembered."""

MAX_PAUSE_S = 2 * HEARTBEAT_INTERVAL_S
"""After a longer pause of this process its view is out of date, and for HEARTBEAT_TTL_S it takes nobody for dead."""

STALL_TTL_S = 30
"""A member with a connection to NATS and without a heartbeat may be busy, and is taken for dead only after this."""

QUESTION_TIMEOUT_S = 0.25
"""How long NATS may take to say that a member has no connection."""

Info = TypeVar("Info", bound=ServiceInfo)

log = logging.getLogger(__name__)


class Heartbeat(Generic[Info]):
    """Writes `describe()` into `bucket` every second, and at once on `beat`. Removes it on `stop`."""

    def __init__(self, connection: Connection, bucket: str, describe: Callable[[], Info]) -> None:
        self._connection = connection
        self._bucket = bucket
        self._describe = describe
        self._now = asyncio.Event()
        self._stopping = False
        self._stored_at = deque([time.monotonic()] * 2, maxlen=2)
        self._task: asyncio.Task[None] | None = None

    @property
    def lapsed(self) -> bool:
        """Whether others may have taken this service for dead: not both of the last two heartbeats are recent.

        After an absence it stays so until the second heartbeat. By then, what arrived meanwhile has been read.
        """
        return time.monotonic() - self._stored_at[0] > HEARTBEAT_TTL_S

    async def start(self) -> None:
        """Write the first heartbeat, and the others in the background."""
        await self._put()
        self._task = asyncio.create_task(self._run())

    def beat(self) -> None:
        """Write a heartbeat now, since what it describes has changed."""
        self._now.set()

    async def stop(self) -> None:
        """Stop and remove the heartbeat, so that nobody waits for it to expire."""
        if self._task is None:
            return
        # A flag and no cancel: up to Python 3.11 `wait_for` can swallow a cancellation.
        self._stopping = True
        self._now.set()
        await self._task
        with contextlib.suppress(NatsError, TimeoutError):
            subject = names.bucket_subject(self._bucket, self._describe().id)
            await self._connection.jetstream.publish(subject, headers={"KV-Operation": "DEL"})

    async def _run(self) -> None:
        while not self._stopping:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_INTERVAL_S):
                    await self._now.wait()
            self._now.clear()
            await self._put()

    async def _put(self) -> None:
        info, began = self._describe(), time.monotonic()
        subject = names.bucket_subject(self._bucket, info.id)
        with contextlib.suppress(NatsError, TimeoutError):
            await self._connection.jetstream.publish(subject, info.encode(), timeout=HEARTBEAT_INTERVAL_S)
            self._stored_at.append(began)


class Presence(Generic[Info]):
    """A live view of a heartbeat bucket.

    It subscribes to the bucket's subjects and needs no consumer. Every living service writes again within a second, so
    nothing must be recovered after an outage of NATS.

    Without `asked`, a member is dead after HEARTBEAT_TTL_S without a heartbeat. `asked` gives the subject to which a
    member subscribes. A message there tells whether a silent member still has a connection, which ends with its
    process. As long as it has one, its event loop may be busy, and it is dead only after STALL_TTL_S. A process that is
    stopped or deadlocked is found then.
    """

    def __init__(
        self, connection: Connection, bucket: str, kind: type[Info], asked: Callable[[str], str] | None = None
    ) -> None:
        self._connection = connection
        self._bucket = bucket
        self._kind = kind
        self._asked = asked
        self._disconnected: set[str] = set()
        self._prefix = names.bucket_subject(bucket, "")
        self._seen: dict[str, tuple[float, Info]] = {}
        self._strangers: dict[str, float] = {}
        self._attentive_at = 0.0
        self._blind_until = 0.0
        self._task: asyncio.Task[None] | None = None
        self.on_lost: list[Callable[[], None]] = []
        """Called when a member is gone, within a second."""

    async def start(self) -> None:
        """Subscribe, and read the heartbeats that are stored.

        A cluster that has just made the bucket may not answer yet. Then the next heartbeats fill the view.
        """
        await self._connection.client.subscribe(names.bucket_subjects(self._bucket), cb=self._heard)
        self._task = asyncio.create_task(self._stay_attentive())
        with contextlib.suppress(QueueUnavailable):
            for info in await read(self._connection, self._bucket, self._kind):
                self._seen.setdefault(info.id, (time.monotonic(), info))

    async def stop(self) -> None:
        """Stop checking this process and its connection."""
        if self._task is not None:
            self._task.cancel()

    def alive(self) -> list[Info]:
        """All services that are alive, by id."""
        for member in [member for member in self._seen if not self.is_alive(member)]:
            self._lost(member)
        return [info for _, (_, info) in sorted(self._seen.items())]

    def is_alive(self, member: str) -> bool:
        """Whether a heartbeat of `member` came within HEARTBEAT_TTL_S, it is only busy, or this process heard nothing.

        The silence of a member without any heartbeat begins with the first call: its request can arrive before its
        first heartbeat.
        """
        now = time.monotonic()
        if now < self._blind_until or self._missed_some(now):
            return True
        if member not in self._seen:
            self._remember(member, now)
        silent_s = self._silent_s(member, now)
        if silent_s <= HEARTBEAT_TTL_S:
            return True
        return self._asked is not None and silent_s <= STALL_TTL_S and member not in self._disconnected

    def _silent_s(self, member: str, now: float) -> float:
        return now - (self._seen[member][0] if member in self._seen else self._strangers[member])

    def _lost(self, member: str) -> None:
        """Take a member for dead: it had a heartbeat, so no first one is waited for."""
        known = self._seen.pop(member, None)
        self._strangers.pop(member, None)
        self._remember(member, -float("inf"))
        for listener in self.on_lost if known else ():
            listener()

    def _remember(self, member: str, since: float) -> None:
        self._strangers.setdefault(member, since)
        if len(self._strangers) > MAX_STRANGERS:
            del self._strangers[next(iter(self._strangers))]

    def _missed_some(self, now: float) -> bool:
        """Whether this process stood still or was without NATS since it last looked, however shortly."""
        return now - self._attentive_at > MAX_PAUSE_S or self._connection.since > self._attentive_at

    async def _stay_attentive(self) -> None:
        """Notice a pause of this process or its connection. After it, others only seem dead. Ask who is silent."""
        self._attentive_at = time.monotonic()
        while True:
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)
            now = time.monotonic()
            if self._missed_some(now) or not self._connection.connected:
                self._blind_until = now + HEARTBEAT_TTL_S
            self._attentive_at = now
            if self._asked is not None:
                await self._ask_the_silent(self._asked, now)
            if self.on_lost:
                self.alive()

    async def _ask_the_silent(self, asked: Callable[[str], str], now: float) -> None:
        async def ask(member: str) -> None:
            try:
                await self._connection.requests.request(asked(member), timeout_s=QUESTION_TIMEOUT_S)
            except NoRespondersError:
                self._disconnected.add(member)
            except (NatsError, TimeoutError):
                self._disconnected.discard(member)

        # From a second before HEARTBEAT_TTL_S on: then the answer is there when it counts.
        silent = [
            member
            for member in {*self._seen, *self._strangers}
            if HEARTBEAT_TTL_S - HEARTBEAT_INTERVAL_S < self._silent_s(member, now) <= STALL_TTL_S
        ]
        self._disconnected.intersection_update(silent)
        await asyncio.gather(*map(ask, silent))

    async def _heard(self, msg: Msg) -> None:
        member = msg.subject.removeprefix(self._prefix)
        if not msg.data:
            self._lost(member)
            return
        try:
            self._seen[member] = (time.monotonic(), self._kind.model_validate_json(msg.data))
        except ValidationError as exc:
            log.warning("[RequestQueue] heartbeat of %s cannot be read: %s", member, exc)


async def read(connection: Connection, bucket: str, kind: type[Info]) -> list[Info]:
    """The heartbeats in `bucket` now, by id; none if there is no bucket yet.

    Raises:
        QueueUnavailable: NATS does not answer.
    """
    prefix = names.bucket_subject(bucket, "")
    found: dict[str, Info] = {}
    try:
        messages = await direct_get.messages(connection, names.bucket_stream(bucket), names.bucket_subjects(bucket))
    except NotFoundError:
        return []
    except (NatsError, TimeoutError, OSError) as exc:
        raise QueueUnavailable("NATS did not answer") from exc
    for msg in messages:
        with contextlib.suppress(ValidationError):
            found[(msg.headers or {})["Nats-Subject"].removeprefix(prefix)] = kind.model_validate_json(msg.data)
    return [found[member] for member in sorted(found)]
