"""States in the KV bucket `inference-requests`, totals in the counter stream, and the change of a state."""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.errors import APIError, NotFoundError
from pydantic import ValidationError

from forebay_contracts.nats import direct_get
from forebay_contracts.nats.connection import Connection
from forebay_contracts.nats.streams import DUPLICATE_WINDOW_S
from forebay_contracts.queueing import transitions
from forebay_contracts.queueing.collected_usage import CollectedUsage
from forebay_contracts.queueing.events import publish_event
from forebay_contracts.queueing.protocols import StateStore, Stored
from forebay_contracts.queueing.usage import UsageRow, counter_of, used_of, value_of
from forebay_contracts.telemetry import metrics
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import QueueConflict, QueueUnavailable, StateUnreadable
from forebay_contracts.wire.event import event_of
from forebay_contracts.wire.state import RequestState, RequestStatus, Usage

STATE_TIMEOUT_S: Final = 5.0
"""How long one read or write of a state may take."""

QUEUED_AFTER_S: Final = 0.05
"""A request that a worker begins within this time is never written as `queued`: nobody could have read it."""

MAX_CONFLICTS: Final = 20
"""How often a change is tried again after another write came first."""

CONFLICT_PAUSE_S: Final = 0.001
"""Pause before the second such try, doubled each time up to CONFLICT_PAUSE_MAX_S. In a cluster a state is written to
the leader and read from a replica, which may lag behind."""

CONFLICT_PAUSE_MAX_S: Final = 0.25

REMEMBERED_ENDS: Final = 1_000
"""So many of the last ends that a process wrote are written again if NATS lost them."""

OUTCOMES: Final = (
    RequestStatus.COMPLETED,
    RequestStatus.FAILED,
    RequestStatus.TIMED_OUT,
    RequestStatus.CANCELLED,
)

_WRONG_LAST_SEQUENCE = (10071, 10164)

log = logging.getLogger(__name__)


async def change(
    store: StateStore, request_id: str, to: Callable[[RequestState | None], RequestState | None]
) -> Stored | None:
    """Read, change and write a state until no other write interferes; returns what was written, or None.

    `to` makes the next state from the present one (None: there is none) by `transitions`. It returns None to leave the
    state as it is. It is never called with a final state.

    Raises:
        QueueUnavailable: NATS does not answer, or MAX_CONFLICTS other writes came first.
        StateUnreadable: another version wrote the state.
    """
    for conflicts in range(MAX_CONFLICTS):
        if conflicts > 1:
            await asyncio.sleep(min(CONFLICT_PAUSE_S * 2**conflicts, CONFLICT_PAUSE_MAX_S))
        stored = await store.get(request_id)
        if stored is not None and stored.state.status.final:
            return None
        state = to(stored.state if stored else None)
        if state is None:
            return None
        try:
            revision = await store.write(state, stored.revision if stored else 0)
        except QueueConflict:
            continue
        return Stored(state, revision)
    raise QueueUnavailable(f"request {request_id}: its state changed {MAX_CONFLICTS} times in a row")


async def end(
    store: StateStore,
    request_id: str,
    outcome: RequestStatus,
    error: str | None,
    unknown: RequestState | None = None,
    usage: Usage | None = None,
) -> RequestState | None:
    """End a request as `outcome` and count it; returns its last state, or None if it had ended or is unknown.

    `unknown` is the state to start from if none is stored. Raises QueueConflict if `outcome` may not follow the state.
    """

    def to(state: RequestState | None) -> RequestState | None:
        base = state or unknown
        return base and transitions.ended(base, outcome, stored=state is not None, error=error, usage=usage)

    if (stored := await change(store, request_id, to)) is None:
        return None
    await store.count(outcome, request_id, stored.state)
    return stored.state


class KeyValueStateStore:
    """The KV bucket `inference-requests` and the counter stream `INFERENCE_COUNTERS`.

    A server that lost power has lost what it had not synced to its disk. So after each outage, the last ends that this
    store wrote are written and counted again.
    """

    def __init__(self, connection: Connection) -> None:
        self._ends: deque[tuple[float, RequestState]] = deque(maxlen=REMEMBERED_ENDS)
        connection.on_reconnect.append(self._write_again)
        self._without_keys = CollectedUsage(connection)
        self._connection = connection
        self._requests = connection.requests
        self._js = connection.jetstream
        self._stream = names.bucket_stream(names.REQUESTS_BUCKET)
        self._prefix = names.bucket_subject(names.REQUESTS_BUCKET, "")
        self._read_seconds, self._write_seconds, self._count_seconds = (
            metrics.bound(metrics.STATE, operation) for operation in ("read", "write", "count")
        )

    async def get(self, request_id: str) -> Stored | None:
        """Read by a direct get (NATS ADR-31): one round trip."""
        subject = f"$JS.API.DIRECT.GET.{self._stream}.{self._prefix}{request_id}"
        began = time.perf_counter()
        try:
            msg: Msg = await self._requests.request(subject, timeout_s=STATE_TIMEOUT_S)
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("the request's state cannot be read") from exc
        finally:
            self._read_seconds.observe(time.perf_counter() - began)
        headers = msg.headers or {}
        if headers.get("Status") == "404" or "KV-Operation" in headers:
            return None
        if not msg.data or "Nats-Sequence" not in headers:
            raise QueueUnavailable(f"the request's state cannot be read: {headers.get('Description')}")
        try:
            state = RequestState.model_validate_json(msg.data)
        except ValidationError:
            raise StateUnreadable(
                f"the state of request {request_id} cannot be read: another version or another program wrote it"
            ) from None
        return Stored(state, int(headers["Nats-Sequence"]))

    async def write(self, state: RequestState, revision: int) -> int:
        """Write with the expected last revision of the key."""
        if (event := event_of(state)) is not None:
            await publish_event(self._requests, event)
        headers = {"Nats-Expected-Last-Subject-Sequence": str(revision)}
        began = time.perf_counter()
        try:
            written = await self._requests.store(
                self._prefix + state.id, state.encode(), timeout_s=STATE_TIMEOUT_S, headers=headers
            )
            if state.status.final:
                self._ends.append((began, state))
            return written
        except APIError as exc:
            if exc.err_code in _WRONG_LAST_SEQUENCE:
                raise QueueConflict(f"request {state.id}: another write changed its state first") from exc
            raise QueueUnavailable(f"the request's state was not written: {exc.description}") from exc
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("the request's state was not written") from exc
        finally:
            self._write_seconds.observe(time.perf_counter() - began)

    async def count(self, outcome: RequestStatus, request_id: str, state: RequestState | None = None) -> None:
        """Increment (NATS ADR-49). The request id is the Nats-Msg-Id, so a repetition is not counted."""
        counters = {names.counter_subject(outcome): {names.HEADER_INCREMENT: "+1", names.HEADER_MSG_ID: request_id}}
        if state is not None and state.key is not None:
            counters[counter_of(state)] = {
                names.HEADER_INCREMENT: f"+{value_of(state)}",
                names.HEADER_MSG_ID: request_id,
            }
        began = time.perf_counter()
        try:
            first, *_ = await self._requests.store_all(counters, timeout_s=STATE_TIMEOUT_S)
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("the request was not counted") from exc
        finally:
            self._count_seconds.observe(time.perf_counter() - began)
        if first and state is not None and state.key is None:
            self._without_keys.add(state)

    async def _write_again(self) -> None:
        # An older end is left out: NATS would no longer recognise its count as a repetition.
        since = time.perf_counter() - DUPLICATE_WINDOW_S / 2
        ends = [state for written_at, state in self._ends if written_at >= since]
        with contextlib.suppress(QueueUnavailable, StateUnreadable):
            for state in ends:
                if (lost := await change(self, state.id, _always(state))) is not None:
                    log.warning("[RequestQueue] NATS lost the end of %s, so it is written again", state.id)
                if (stored := lost or await self.get(state.id)) is not None:
                    await self.count(stored.state.status, state.id, stored.state)

    async def totals(self) -> Mapping[RequestStatus, int]:
        """Read the last value of each counter."""
        values = await asyncio.gather(*(self._total(outcome) for outcome in OUTCOMES))
        return dict(zip(OUTCOMES, values, strict=True))

    async def _total(self, outcome: RequestStatus) -> int:
        try:
            msg = await self._js.get_last_msg(names.COUNTERS, names.counter_subject(outcome), direct=True)
        except NotFoundError:
            return 0
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("the totals cannot be read") from exc
        return int(_counter_value(msg.data or b"0"))

    async def usage(self, days: Collection[str], keys: Collection[str | None] | None = None) -> list[UsageRow]:
        """List the counters of each day, and read their last values by batched direct gets."""
        try:
            counters = [
                counter
                for day in days
                for counter in await self._counters(day)
                if keys is None or names.usage_of(counter)[2] in keys
            ]
            messages = await direct_get.last_messages(self._connection, names.USAGE, counters)
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("the usage cannot be read") from exc
        return [used_of((msg.headers or {})["Nats-Subject"], int(_counter_value(msg.data))) for msg in messages]

    async def _counters(self, day: str) -> Iterable[str]:
        info = await self._js.stream_info(names.USAGE, subjects_filter=names.usage_subjects(day))
        return info.state.subjects or ()


def _always(state: RequestState) -> Callable[[RequestState | None], RequestState]:
    return lambda _: state


def _counter_value(data: bytes) -> str:
    # {"val":"123"}: a decimal string, since counters have no upper bound.
    return data.decode().split('"val":"', 1)[-1].split('"', 1)[0]
