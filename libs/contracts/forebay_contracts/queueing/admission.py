"""Admission into the stream `INFERENCE`, or into the waiting room before it."""

import asyncio
import json
import logging
import math
import time
from collections.abc import Mapping
from typing import Any, Final

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import MaxPayloadError
from nats.js.errors import APIError

from forebay_contracts.nats import clock
from forebay_contracts.nats.connection import Connection
from forebay_contracts.telemetry import tracing
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import QueueFull, QueueUnavailable, RequestTooLarge, WaitingRoomFull
from forebay_contracts.wire.request import InferenceRequest

TTL_GRACE_S: Final = 30
"""The server drops a message this long after its deadline. By then no worker runs it any more."""

PUBLISH_TIMEOUT_S: Final = 1.0
"""How long one try at a publish may take. The next try, with the same Nats-Msg-Id, shows whether it was stored."""

PUBLISH_RETRY_S: Final = 0.05
"""Pause between such tries."""

REMOVE_TIMEOUT_S: Final = 5.0
"""How long each request of `holds` and `remove` may take."""

ROOM: Final = 0.9
"""The part of the waiting room's bytes that new requests may take. The rest is for those that give way."""

ROOM_CHECK_S: Final = 1.0
"""How long a look at its size counts."""

_STORE_FAILED = 10077
_NO_RESOURCES = 10023
_NOT_NOW = (409, 429, 503)
"""Codes after which another try may succeed: the cluster is still agreeing on an earlier try (409), its queue of
proposals is long (429), or JetStream is stopping, not up yet, or no longer the leader (503)."""

_GET = "$JS.API.DIRECT.GET."
_DELETE = "$JS.API.STREAM.MSG.DELETE."


log = logging.getLogger(__name__)


class JetStreamAdmission:
    """See `Admission`. A publish waits up to `patience_s` while NATS is away, restarts or elects a leader."""

    def __init__(self, connection: Connection, *, patience_s: float = 0) -> None:
        self._connection = connection
        self._patience_s = patience_s
        self._has_room = True
        self._looked_at = float("-inf")

    async def publish(self, request: InferenceRequest) -> int:
        """See `Admission.publish`."""
        headers = _headers(request)
        tracing.inject(headers)
        subject = names.request_subject(request.model, request.completion_type)
        if request.deferred:
            await self._need_room()
            subject = names.deferred_subject(request.model, request.key)
            headers[names.HEADER_DEFERRED] = request.completion_type.value
        return await self.store(subject, request.encode(), headers, request.deadline)

    async def _need_room(self) -> None:
        """Raises WaitingRoomFull if what is left of its bytes is for requests that give way."""
        if (now := time.monotonic()) - self._looked_at > ROOM_CHECK_S:
            self._looked_at = now
            try:
                info = await self._connection.jetstream.stream_info(names.DEFERRED)
            except (NatsError, TimeoutError) as exc:
                log.debug("nobody says how full the waiting room is: %r", exc)
                return
            most = info.config.max_bytes or -1
            self._has_room = most <= 0 or info.state.bytes < most * ROOM
        if not self._has_room:
            raise _full(names.DEFERRED)

    async def put_back(self, request: InferenceRequest, turn: int, trace: Mapping[str, str]) -> int:
        """See `Admission.put_back`."""
        headers = _headers(request, turn) | {name: trace[name] for name in names.TRACE_HEADERS if name in trace}
        headers[names.HEADER_DEFERRED] = request.completion_type.value
        subject = names.yielded_subject(request.model, request.key)
        return await self.store(subject, request.encode(), headers, request.deadline)

    async def store(self, subject: str, payload: bytes, headers: dict[str, str], deadline: float) -> int:
        """Publish a message that nobody needs after `deadline`; returns its sequence. Raises as `Admission.publish`.

        A publish without an answer (its ack was lost, the stream has no leader, NATS is away) is repeated for
        `patience_s`. It has the same Nats-Msg-Id, so a message that was stored before is not stored twice.
        """
        # Waiting past the deadline would only end in a timeout.
        give_up_at = time.monotonic() + min(self._patience_s, deadline - clock.now())
        while True:
            ttl_s = math.ceil(deadline - clock.now()) + TTL_GRACE_S
            try:
                headers[names.HEADER_TTL] = str(max(ttl_s, 1))
                return await self._connection.requests.store(
                    subject, payload, timeout_s=PUBLISH_TIMEOUT_S, headers=headers
                )
            except MaxPayloadError as exc:
                most = self._connection.client.max_payload
                raise RequestTooLarge(
                    f"the request takes {len(payload)} bytes in the queue, and NATS takes {most}"
                ) from exc
            except APIError as exc:
                # A store that is being closed fails with the same code. Only the text differs.
                if exc.err_code == _STORE_FAILED and "exceeded" in (exc.description or ""):
                    raise _full(subject) from exc
                if exc.code not in _NOT_NOW or exc.err_code == _NO_RESOURCES:
                    raise QueueUnavailable(f"the queue accepts nothing now: {exc.description}") from exc
                failure: Exception = exc
            except (NatsError, TimeoutError) as exc:
                failure = exc
            patience_s = give_up_at - time.monotonic()
            if patience_s <= 0:
                raise QueueUnavailable("the queue cannot be reached, try again later") from failure
            await self._connection.wait_connected(patience_s)
            await asyncio.sleep(PUBLISH_RETRY_S)

    async def holds(self, request_id: str, sequence: int, *, deferred: bool = False) -> bool:
        """See `Admission.holds`. A store that lost its last records uses their sequences again for other messages."""
        found = await self._ask(_GET + _stream(deferred), {"seq": sequence})
        return names.turn_of((found.headers or {}).get(names.HEADER_MSG_ID, ""))[0] == request_id

    async def remove(self, request_id: str, sequence: int, *, deferred: bool = False) -> bool:
        """See `Admission.remove`.

        `no_erase` deletes without overwriting on the disk: 0.3 ms instead of 15 ms.
        """
        return await self.holds(request_id, sequence, deferred=deferred) and await self.delete(sequence, deferred)

    async def delete(self, sequence: int, deferred: bool) -> bool:
        """Delete a message of which is known whose it is."""
        answer = await self._ask(_DELETE + _stream(deferred), {"seq": sequence, "no_erase": True})
        return bool(json.loads(answer.data).get("success"))

    async def _ask(self, subject: str, order: dict[str, Any]) -> Msg:
        try:
            return await self._connection.requests.request(
                subject, json.dumps(order).encode(), timeout_s=REMOVE_TIMEOUT_S
            )
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("the queue cannot be reached") from exc


def _headers(request: InferenceRequest, turn: int = 0) -> dict[str, str]:
    return {
        names.HEADER_MSG_ID: names.message_id(request.id, turn),
        names.HEADER_DEADLINE: f"{request.deadline:.3f}",
        names.HEADER_REPLY_TO: request.reply_to,
    }


def _stream(deferred: bool) -> str:
    return names.DEFERRED if deferred else names.STREAM


def _full(subject: str) -> QueueFull | WaitingRoomFull:
    if subject.startswith("inference.requests."):
        return QueueFull("the queue is full, try again later")
    return WaitingRoomFull("the waiting room is full, try again later")
