"""The answer log: the stream `INFERENCE_ANSWERS`, one subject an answer.

The server fences the writers: each record names the last sequence of its subject, and only one can follow it. What is
stored, and nothing else, the server publishes again on `inference.answered.<id>`, with the sequence and the one before
it. So a reader needs no consumer: it reads what is there by direct gets, and notices a message that it missed.
"""

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from typing import Final, NamedTuple

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.js.errors import APIError

from forebay_contracts.nats import direct_get
from forebay_contracts.nats.connection import Connection
from forebay_contracts.queueing.protocols import PAGE, Record
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import AnswerLogFull, AnswerTaken, QueueUnavailable

LOG_TIMEOUT_S: Final = 2.0
"""How long one try at a request to the log may take."""

CHECK_S: Final = 10.0
"""How often a reader that hears nothing looks whether it missed the end."""

READ_RETRY_S: Final = 0.05
"""Pause between two reads of a replica that lags behind, or while NATS is away."""

MAX_HEARD: Final = 1_000
"""Most messages that a reader holds and has not read. It reads the others from the log."""

MAX_LAGS: Final = 100
"""How often such a read is tried until the next look."""

ROOM: Final = 0.9
"""The part of the log that new answers may fill. The rest is for answers under way."""

ROOM_CHECK_S: Final = 1.0
"""How long a look at the log's size counts."""

_STORE_FAILED = 10077
_WRONG_LAST_SEQUENCE = (10071, 10164)

log = logging.getLogger(__name__)


class LogSize(NamedTuple):
    """Bytes that stored requests and answers take, and the most that they may take: inf if that is unbounded."""

    used: int
    most: float


class JetStreamAnswerLog:
    """See `AnswerLog`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._requests = connection.requests
        self._room = True
        self._looked_at = float("-inf")

    async def append(self, request_id: str, frames: Sequence[bytes], last: int, name: str) -> int:
        """See `AnswerLog.append`."""
        subject = names.answer_subject(request_id)
        headers = {"Nats-Expected-Last-Subject-Sequence": str(last), names.HEADER_MSG_ID: f"{request_id}.{name}"}
        try:
            return await self._requests.store(subject, b"\n".join(frames), timeout_s=LOG_TIMEOUT_S, headers=headers)
        except APIError as exc:
            if exc.err_code in _WRONG_LAST_SEQUENCE:
                return await self._stored_before(subject, headers, last)
            if exc.err_code == _STORE_FAILED and "exceeded" in (exc.description or ""):
                raise AnswerLogFull("the answer log is full, try again later") from exc
            raise QueueUnavailable(f"the answer was not stored: {exc.description}") from exc
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("the answer was not stored") from exc

    async def _stored_before(self, subject: str, headers: Mapping[str, str], last: int) -> int:
        """The sequence of a record whose confirmation was lost. Raises AnswerTaken if another one follows `last`."""
        msg = await self._last(subject)
        found = msg.headers or {} if msg is not None else {}
        sequence = int(found.get("Nats-Sequence", 0))
        if found.get(names.HEADER_MSG_ID) == headers[names.HEADER_MSG_ID]:
            return sequence
        if sequence == last:
            raise QueueUnavailable("a replica of the answer log lags behind")
        raise AnswerTaken(f"{subject}: another record follows {last}")

    async def _last(self, subject: str) -> Msg | None:
        try:
            msg = await self._requests.request(f"$JS.API.DIRECT.GET.{names.ANSWERS}.{subject}", timeout_s=LOG_TIMEOUT_S)
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("the answer cannot be read") from exc
        return msg if "Nats-Sequence" in (msg.headers or {}) else None

    async def read(self, request_id: str, after: int = 0, most: int | None = None) -> list[Record]:
        """See `AnswerLog.read`."""
        try:
            found = await direct_get.messages(
                self._connection, names.ANSWERS, names.answer_subject(request_id), after + 1, most
            )
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("the answer cannot be read") from exc
        return [_record(msg) for msg in found]

    @contextlib.asynccontextmanager
    async def follow(self, request_id: str, *, fresh: bool = False) -> AsyncIterator[AsyncIterator[list[Record]]]:
        """See `AnswerLog.follow`."""
        heard = _Heard()
        if not fresh:
            heard.put(None)

        async def look() -> None:
            heard.put(None)

        subscription = await self._subscribed(request_id, heard)
        self._connection.on_reconnect.append(look)
        try:
            yield self._coming(request_id, heard)
        finally:
            self._connection.on_reconnect.remove(look)
            with contextlib.suppress(NatsError):
                await subscription.unsubscribe()

    async def _coming(self, request_id: str, heard: "_Heard") -> AsyncIterator[list[Record]]:
        last = 0
        while True:
            messages = await heard.all()
            records = following(messages, last)
            if records:
                last = records[-1].sequence
                yield records
            if records is not None:
                continue
            # A server that lost power gives the sequences of its last records out again, so after an outage all is
            # read. Whoever reads drops the tokens that it has.
            known, newest = 0 if None in messages else last, _newest(messages)
            while True:
                records = await self._read_up_to(newest, request_id, known)
                if records:
                    known = last = records[-1].sequence
                yield records
                if len(records) < PAGE:
                    break

    async def _subscribed(self, request_id: str, heard: "_Heard") -> Subscription:
        async def hear(msg: Msg) -> None:
            heard.put(msg)

        while True:
            try:
                return await self._connection.client.subscribe(names.answered_subject(request_id), cb=hear)
            except NatsError as exc:
                log.debug("%s: not followed yet: %r", request_id, exc)
                await asyncio.sleep(READ_RETRY_S)

    async def _read_up_to(self, sequence: int, request_id: str, after: int) -> list[Record]:
        """The next records above `after`; waits for a replica that lags behind `sequence`, and while NATS is away."""
        records: list[Record] = []
        for _ in range(MAX_LAGS):
            try:
                records = await self.read(request_id, after, PAGE)
            except QueueUnavailable as exc:
                log.debug("%s: %s", request_id, exc)
            if sequence == 0 or len(records) == PAGE or (records and records[-1].sequence >= sequence):
                break
            await asyncio.sleep(READ_RETRY_S)
        return records

    async def has_room(self) -> bool:
        """See `AnswerLog.has_room`."""
        if (now := time.monotonic()) - self._looked_at > ROOM_CHECK_S:
            self._looked_at = now
            size = await self.size()
            self._room = size.used < size.most * ROOM
        return self._room

    async def size(self) -> LogSize:
        """How full the log is. What was asked for counts too. Raises QueueUnavailable."""
        info = self._connection.jetstream.stream_info
        try:
            answers, asked = await info(names.ANSWERS), await info(names.bucket_stream(names.RESPONSES_BUCKET))
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("the answer log cannot be reached") from exc
        most = answers.config.max_bytes or -1
        return LogSize(answers.state.bytes + asked.state.bytes, most if most > 0 else math.inf)

    async def purge(self, request_id: str, keep: int = 0) -> None:
        """See `AnswerLog.purge`."""
        order = json.dumps({"filter": names.answer_subject(request_id), "keep": keep}).encode()
        try:
            await self._requests.request(f"$JS.API.STREAM.PURGE.{names.ANSWERS}", order, timeout_s=LOG_TIMEOUT_S)
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("the answer was not removed") from exc


class _Heard:
    """What was heard of an answer, and was not read. None stands for an outage, and for the beginning."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Msg | None] = asyncio.Queue(MAX_HEARD)

    def put(self, msg: Msg | None) -> None:
        """Add `msg`. A full queue loses its oldest message: the reader notices, and reads it from the log."""
        if self._queue.full() and self._queue.get_nowait() is None:
            msg = None
        self._queue.put_nowait(msg)

    async def all(self) -> list[Msg | None]:
        """What has been heard; nothing if it was silent for CHECK_S."""
        try:
            async with asyncio.timeout(CHECK_S):
                found = [await self._queue.get()]
        except TimeoutError:
            return []
        while not self._queue.empty():
            found.append(self._queue.get_nowait())
        return found


def following(messages: Sequence[Msg | None], last: int) -> list[Record] | None:
    """The records that follow `last` without a gap, or None if the log must be read."""
    if not messages:
        return None
    records: list[Record] = []
    for msg in messages:
        if msg is None:
            return None
        headers = msg.headers or {}
        if (sequence := int(headers["Nats-Sequence"])) <= last:
            continue
        if int(headers["Nats-Last-Sequence"]) != last:
            return None
        records.append(_record(msg))
        last = sequence
    return records


def _newest(messages: Sequence[Msg | None]) -> int:
    return max((int((msg.headers or {})["Nats-Sequence"]) for msg in messages if msg is not None), default=0)


def _record(msg: Msg) -> Record:
    headers = msg.headers or {}
    at = datetime.fromisoformat(headers["Nats-Time-Stamp"]).timestamp()
    return Record(int(headers["Nats-Sequence"]), msg.data.split(b"\n"), at)
