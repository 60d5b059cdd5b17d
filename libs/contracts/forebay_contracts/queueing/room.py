"""The waiting room: the stream `INFERENCE_DEFERRED`, and what workers hear and say so that it is used.

What waits there is moved into the stream INFERENCE while a model has nothing else to do. A move publishes, then
deletes: a process that dies in between leaves a message in both. The second move has the same Nats-Msg-Id, and whoever
finds the message later sees by the request's state that it was moved.
"""

import asyncio
import logging
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import orjson
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.js.api import ConsumerInfo
from nats.js.errors import NotFoundError

from forebay_contracts.nats import consumers, direct_get, permissions, presence
from forebay_contracts.nats.connection import Connection
from forebay_contracts.queueing.admission import JetStreamAdmission
from forebay_contracts.queueing.protocols import Line, Waiting
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import QueueUnavailable
from forebay_contracts.wire.heartbeats import Used, WorkerInfo, WorkerStatus
from forebay_contracts.wire.state import RequestState

ASK_TIMEOUT_S: Final = 5.0
"""How long NATS may take to answer a question about the room."""

COUNTED_S: Final = 1.0
"""The consumer counts a message a moment after its PubAck, and surely within this time."""

WORKERS: Final = "workers"
"""Queue group: one worker hears of each admission."""

_NO_MESSAGE = "404"
_KEPT: Final = (
    names.HEADER_MSG_ID,
    names.HEADER_DEADLINE,
    names.HEADER_REPLY_TO,
    names.HEADER_DEFERRED,
    *names.TRACE_HEADERS,
)

log = logging.getLogger(__name__)


class JetStreamRoom:
    """See `Room`."""

    def __init__(self, connection: Connection, admission: JetStreamAdmission) -> None:
        self._connection = connection
        self._admission = admission
        self._moved: defaultdict[str, dict[int, float]] = defaultdict(dict)
        """By model, the sequences of moved messages that the consumer may not count yet, and when they were moved."""

    async def idle(self, model: str, slots: int) -> int:
        """See `Room.idle`. None are idle for the room while the consumer is paused."""
        info = await _consumer(self._connection, model)
        if info is None or info.paused:
            return 0
        delivered, since = _delivered(info), time.monotonic() - COUNTED_S
        moved = {one: at for one, at in self._moved[model].items() if one > delivered and at > since}
        self._moved[model] = moved
        # What waits is about to be delivered. Whoever looks now is not told again of the slots that are left.
        taken = (info.num_ack_pending or 0) + max(info.num_pending or 0, len(moved))
        return max(min(info.config.max_ack_pending or 0, slots) - taken, 0)

    async def backlog(self, model: str) -> Mapping[str | None, int]:
        """See `Room.backlog`. 0.8 ms with 100,000 messages of 50 keys."""
        found: dict[str | None, int] = {}
        for subject, count in (await subjects(self._connection, f"inference.*.{model}.*")).items():
            key = names.key_of_subject(subject)
            found[key] = found.get(key, 0) + count
        return found

    async def first(self, model: str, key: str | None) -> Waiting | None:
        """See `Room.first`."""
        for subject in (names.yielded_subject(model, key), names.deferred_subject(model, key)):
            msg = await self._ask(f"$JS.API.DIRECT.GET.{names.DEFERRED}", {"next_by_subj": subject, "seq": 1})
            headers = msg.headers or {}
            if "Nats-Sequence" in headers:
                waiting = Waiting(int(headers["Nats-Sequence"]), headers["Nats-Subject"], headers, msg.data)
                if _is_request(headers):
                    return waiting
                log.error(
                    "[RequestQueue] message %d of the waiting room was removed: it is no request", waiting.sequence
                )
                await self._admission.delete(waiting.sequence, deferred=True)
                return await self.first(model, key)
            if headers.get("Status") != _NO_MESSAGE:
                raise QueueUnavailable(f"the waiting room cannot be read: {headers.get('Description')}")
        return None

    async def move(self, waiting: Waiting) -> None:
        """See `Room.move`."""
        since = self._connection.since
        model = waiting.subject.split(".")[2]
        subject = names.request_subject(model, waiting.headers[names.HEADER_DEFERRED])
        headers = {name: waiting.headers[name] for name in _KEPT if name in waiting.headers}
        deadline = float(headers[names.HEADER_DEADLINE])
        sequence = await self._admission.store(subject, waiting.data, headers, deadline)
        self._moved[model][sequence] = time.monotonic()
        # A store that has lost its last records gives their sequences out again: then the next look deletes it.
        if self._connection.since == since:
            await self._admission.delete(waiting.sequence, deferred=True)

    async def drop(self, waiting: Waiting) -> None:
        """See `Room.drop`."""
        request_id, _ = names.turn_of(waiting.headers[names.HEADER_MSG_ID])
        await self._admission.remove(request_id, waiting.sequence, deferred=True)

    async def _ask(self, subject: str, order: dict[str, object]) -> Msg:
        try:
            return await self._connection.requests.request(subject, orjson.dumps(order), timeout_s=ASK_TIMEOUT_S)
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("the waiting room cannot be read") from exc


async def subjects(connection: Connection, pattern: str) -> dict[str, int]:
    """How many messages wait on each subject of the room that matches `pattern`. Raises QueueUnavailable."""
    try:
        info = await connection.jetstream.stream_info(names.DEFERRED, subjects_filter=pattern)
    except NotFoundError:
        return {}
    except (NatsError, TimeoutError, OSError) as exc:
        raise QueueUnavailable("the waiting room cannot be read") from exc
    return info.state.subjects or {}


async def place(
    connection: Connection, state: RequestState, weight: Callable[[str | None], float]
) -> consumers.Place | None:
    """About the place of a request that waits in the room, by the weights of the keys; None if NATS does not answer.

    All requests are taken to be of one size.
    """
    line = await consumers.waiting_place(connection, state.model, sys.maxsize)
    try:
        counts = await subjects(connection, f"inference.*.{names.model_token(state.model)}.*")
        yielded = names.yielded_subject(state.model, state.key)
        mine = yielded if state.turn else names.deferred_subject(state.model, state.key)
        before = 0
        if state.deferred is not None:
            found = await direct_get.messages(connection, names.DEFERRED, mine, state.deferred, most=1)
            after = int((found[0].headers or {}).get("Nats-Num-Pending", 0)) if found else 0
            before = max(counts.get(mine, 0) - after - 1, 0)
            before += 0 if state.turn else counts.get(yielded, 0)
    except (QueueUnavailable, NatsError, TimeoutError):
        return None
    backlog: Counter[str | None] = Counter()
    for subject, count in counts.items():
        backlog[names.key_of_subject(subject)] += count
    del backlog[state.key]
    share = (before + 1) / weight(state.key)
    others = sum(min(count, share * weight(key)) for key, count in backlog.items())
    return line and consumers.Place(line.position + before + int(others), line.moved)


class JetStreamPrecedence:
    """See `Precedence`: of one worker of `model`."""

    def __init__(self, connection: Connection, model: str) -> None:
        self._connection = connection
        self._model = model
        self._knows_workers: bool | None = None
        self._subscription: Subscription | None = None

    async def hear(self, admitted: Callable[[int], None]) -> None:
        """See `Precedence.hear`. The server publishes the headers of each stored message again."""

        async def heard(msg: Msg) -> None:
            headers = msg.headers or {}
            if names.HEADER_DEFERRED not in headers and headers.get("Nats-Sequence", "").isdecimal():
                admitted(int(headers["Nats-Sequence"]))

        subject = names.admitted_subject(self._model)
        try:
            self._subscription = await self._connection.client.subscribe(subject, queue=WORKERS, cb=heard)
        except NatsError as exc:
            log.debug("what is admitted is not heard: %r", exc)

    async def pass_on(self, sequences: Iterable[int]) -> None:
        """See `Precedence.pass_on`."""
        subscription, self._subscription = self._subscription, None
        try:
            if subscription is not None:
                await subscription.unsubscribe()
            for sequence in sequences:
                headers = {"Nats-Sequence": str(sequence)}
                await self._connection.client.publish(names.admitted_subject(self._model), headers=headers)
        except NatsError as exc:
            log.debug("a notice was not passed on: %r", exc)

    async def line(self) -> Line:
        """See `Precedence.line`."""
        info = await _consumer(self._connection, names.model_token(self._model))
        if info is None:
            return Line(0, 0, full=False)
        full = (info.num_ack_pending or 0) >= (info.config.max_ack_pending or 0) or not info.num_waiting
        return Line(_delivered(info), info.num_pending or 0, full and not info.paused)

    async def awaiting_redelivery(self) -> int:
        """See `Precedence.awaiting_redelivery`: what is out beyond the slots of all workers, which share it."""
        if not await self._may_know_workers():
            return 0
        info, workers = await asyncio.gather(
            _consumer(self._connection, names.model_token(self._model)),
            presence.read(self._connection, names.WORKERS_BUCKET, WorkerInfo),
        )
        if info is None or info.num_waiting or info.paused:
            return 0
        mine = [one for one in workers if one.model == self._model]
        running = sum(one.slots if one.status is WorkerStatus.READY else one.busy for one in mine)
        waiting: int = max((info.num_ack_pending or 0) - running, 0)
        return math.ceil(waiting / max(len(mine), 1))

    async def _may_know_workers(self) -> bool:
        """An older configuration of NATS does not let workers read it."""
        if self._knows_workers is None:
            own = await permissions.own(self._connection)
            subject = f"$JS.API.DIRECT.GET.{names.bucket_stream(names.WORKERS_BUCKET)}"
            self._knows_workers = own is not None and own.publish.permit(subject)
        return self._knows_workers

    async def say_idle(self, used: Used | None = None) -> None:
        """See `Precedence.say_idle`."""
        try:
            data = b"" if used is None else used.encode()
            await self._connection.client.publish(names.idle_subject(self._model), data)
        except NatsError as exc:
            log.debug("an idle slot was not told: %r", exc)


def _is_request(headers: Mapping[str, str]) -> bool:
    """Whether a message can be moved. One that cannot would hold up all behind it."""
    request_id, _ = names.turn_of(headers.get(names.HEADER_MSG_ID, ""))
    try:
        deadline = float(headers[names.HEADER_DEADLINE])
    except (KeyError, ValueError):
        return False
    tokens = names.is_request_id(request_id) and names.is_request_id(headers.get(names.HEADER_DEFERRED, ""))
    return tokens and math.isfinite(deadline) and names.HEADER_REPLY_TO in headers


def _delivered(info: ConsumerInfo) -> int:
    return info.delivered.stream_seq if info.delivered else 0


async def _consumer(connection: Connection, token: str) -> ConsumerInfo | None:
    try:
        return await connection.jetstream.consumer_info(names.STREAM, token)
    except NotFoundError:
        return None
    except (NatsError, TimeoutError, OSError) as exc:
        raise QueueUnavailable("the queue cannot be reached") from exc
