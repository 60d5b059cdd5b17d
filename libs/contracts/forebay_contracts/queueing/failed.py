"""Stored requests whose attempts are spent: kept with their fault in the stream `INFERENCE_FAILED`, to be run again."""

import json
from collections.abc import Mapping
from typing import Any, Final, Literal

from nats.errors import Error as NatsError
from pydantic import ValidationError

from forebay_contracts.nats import clock, direct_get
from forebay_contracts.nats.connection import Connection
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import QueueUnavailable
from forebay_contracts.wire.message import SCHEMA_VERSION, Message
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import RequestState

FAILED_TIMEOUT_S: Final = 5.0
"""How long one write may take."""

READ_AT_ONCE: Final = 20
"""Most kept requests that are read at once. Each may have the size of a message."""


class FailedRequest(Message):
    """A request that failed, and its last state, which has the fault."""

    schema_version: Literal[1] = SCHEMA_VERSION
    state: RequestState
    request: InferenceRequest

    def encode(self) -> bytes:
        """As JSON; the request as it waited in the queue."""
        return b'{"state":%s,"request":%s}' % (self.state.encode(), self.request.encode())

    def again(self) -> InferenceRequest:
        """The request as it runs again: with an id and a deadline of its own."""
        old, now = self.request, clock.now()
        new_id = names.retry_id(old.id)
        changes = {
            "id": new_id,
            "created_at": now,
            "deadline": now + old.deadline - old.created_at,
            "reply_to": names.answer_subject(new_id),
        }
        return old.model_copy(update=changes)


class FailedRequests:
    """The stream. An `owner` is the second part of a record's key, or `*`. Each method raises QueueUnavailable."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def keep(self, failed: FailedRequest) -> None:
        """Keep it. When the stream is full, the oldest goes."""
        subject = names.failed_subject(failed.request.record or "", failed.request.id)
        try:
            await self._connection.requests.store(subject, failed.encode(), timeout_s=FAILED_TIMEOUT_S)
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("the failed request was not kept") from exc

    async def get(self, owner: str, request_id: str) -> FailedRequest | None:
        """A failed request, or None if it is not kept."""
        found = await self._read(owner, request_id, 1, 1)
        return found[0][1] if found else None

    async def page(self, owner: str, after: str | None = None, most: int = READ_AT_ONCE) -> list[RequestState] | None:
        """The last states of at most `most` failed requests, oldest first, behind the request `after`.

        None: `after` is not kept.
        """
        first = 1
        if after is not None:
            found = await self._read(owner, after, 1, 1)
            if not found:
                return None
            first = found[0][0] + 1
        states: list[RequestState] = []
        while len(states) < most:
            wanted = min(READ_AT_ONCE, most - len(states))
            found = await self._read(owner, "*", first, wanted)
            states += [failed.state for _, failed in found if failed is not None]
            if len(found) < wanted:
                break
            first = found[-1][0] + 1
        return states

    async def remove(self, request: InferenceRequest) -> None:
        """Keep it no longer."""
        order = json.dumps({"filter": names.failed_subject(request.record or "", request.id)}).encode()
        try:
            await self._connection.requests.request(
                f"$JS.API.STREAM.PURGE.{names.FAILED}", order, timeout_s=FAILED_TIMEOUT_S
            )
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("the failed request was not removed") from exc

    async def _read(self, owner: str, request_id: str, first: int, most: int) -> list[tuple[int, FailedRequest | None]]:
        """Sequences, and what is kept there; None if another version wrote it."""
        subjects = f"inference.failed.{owner}.{request_id}"
        try:
            found = await direct_get.messages(self._connection, names.FAILED, subjects, first, most)
        except (NatsError, TimeoutError) as exc:
            raise QueueUnavailable("the failed requests cannot be read") from exc
        return [(_sequence(msg.headers or {}), _decoded(msg.data)) for msg in found]


def _sequence(headers: Mapping[str, Any]) -> int:
    return int(headers["Nats-Sequence"])


def _decoded(data: bytes) -> FailedRequest | None:
    try:
        return FailedRequest.model_validate_json(data)
    except ValidationError:
        return None
