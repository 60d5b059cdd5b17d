"""`Idempotency-Key`: a client that repeats a request gets the running or finished answer instead of another run.

The first request with a key leads. Its answer is stored, so it runs to its end whoever leaves or dies, and any api
gives it to other requests with the same key and body, for REQUEST_STATE_TTL. An answer that failed is not given again:
a repetition runs anew.
"""

import asyncio
import contextlib
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Final, Literal

from nats.errors import Error as NatsError
from nats.js.errors import KeyNotFoundError, KeyWrongLastSequenceError
from nats.js.kv import KeyValue
from pydantic import ValidationError

from forebay_api.in_flight.live_answer import LiveAnswer
from forebay_api.in_flight.stored import StoredRequests
from forebay_contracts.nats import clock
from forebay_contracts.nats.connection import Connection
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import InvalidRequest, QueueUnavailable
from forebay_contracts.wire.message import Message
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import RequestStatus

HEADER: Final = "idempotency-key"
MAX_KEY_LENGTH: Final = 255

ADMISSION_S: Final = 30.0
"""A request that is not in the queue so long after it claimed its key was never admitted: its api died."""

LOOK_S: Final = 0.1
"""Pause between two looks whether a request was admitted."""

Begin = Callable[[InferenceRequest], AbstractAsyncContextManager[LiveAnswer]]
"""Admits a request; yields its answer."""


class Claim(Message):
    """The value in the KV bucket `inference-answers`: the request that leads. Times: seconds since the epoch."""

    schema_version: Literal[2] = 2
    request_id: str
    body_hash: str
    created_at: float
    deadline: float

    def encode(self) -> bytes:
        """The claim as JSON, every field written out."""
        return self.model_dump_json().encode()


class KeyReused(InvalidRequest):
    """The Idempotency-Key was used with another body."""

    status = 422
    code = "idempotency_key_reused"


def scoped_key(key: str, authorization: str) -> str:
    """The bucket's key for a client's key. Two clients may choose the same key. Raises InvalidRequest."""
    if not re.fullmatch(rf"[\x21-\x7e]{{1,{MAX_KEY_LENGTH}}}", key):
        raise InvalidRequest(f"Idempotency-Key must be 1 to {MAX_KEY_LENGTH} visible ASCII characters", param=HEADER)
    return hashlib.sha256(f"{authorization}\n{key}".encode()).hexdigest()


class IdempotentRequests:
    """Requests by key."""

    def __init__(self, connection: Connection, stored: StoredRequests) -> None:
        self._connection = connection
        self._stored = stored

    @contextlib.asynccontextmanager
    async def attach(
        self, request: InferenceRequest, key: str, begin: Begin, asked: str | None = None
    ) -> AsyncIterator[LiveAnswer]:
        """The answer for `key`. This request leads if no other does; `begin` then admits it.

        `asked` is the client's body, where the same body makes another request later: a conversation has grown.

        Raises:
            KeyReused: the key was used with another body.
            QueueUnavailable: NATS does not answer, or another version of the api has claimed the key.
        """
        claim = Claim(
            request_id=request.id,
            body_hash=_body_hash(request) if asked is None else hashlib.sha256(asked.encode()).hexdigest(),
            created_at=request.created_at,
            deadline=request.deadline,
        )
        async with contextlib.AsyncExitStack() as stack:
            bucket = await self._bucket()
            while True:
                with _translated():
                    leads, entry = await _claimed(bucket, key, claim)
                if leads:
                    try:
                        answer = await stack.enter_async_context(begin(request))
                    except BaseException:
                        with contextlib.suppress(NatsError, TimeoutError):
                            await bucket.delete(key)
                        raise
                    break
                if entry is None:
                    continue
                first = _decoded(entry)
                if first.body_hash != claim.body_hash:
                    raise KeyReused("this Idempotency-Key was used with another body", param=HEADER)
                followed = _as(request, first)
                if await self._worth_following(followed):
                    answer = await stack.enter_async_context(self._stored.read(followed))
                    break
                with contextlib.suppress(KeyWrongLastSequenceError), _translated():
                    await bucket.delete(key, last=entry.revision)
            yield answer

    async def _worth_following(self, request: InferenceRequest) -> bool:
        """Whether a request runs, waits or has completed. Waits until it is admitted, for at most ADMISSION_S."""
        while True:
            answer = await self._stored.so_far(request)
            if answer.done:
                return answer.outcome is RequestStatus.COMPLETED
            if await self._stored.ended_as(request) is not None:
                return False  # its answer was deleted
            if answer.attempt > 0 or await self._stored.known(request):
                return True
            if clock.now() - request.created_at > ADMISSION_S:
                return False
            await asyncio.sleep(LOOK_S)

    async def _bucket(self) -> KeyValue:
        with _translated():
            return await self._connection.jetstream.key_value(names.ANSWERS_BUCKET)


async def _claimed(bucket: KeyValue, key: str, claim: Claim) -> tuple[bool, KeyValue.Entry | None]:
    """Whether `claim` has the key; else the entry of the one that has it, or None if it has gone meanwhile."""
    try:
        await bucket.create(key, claim.encode())
    except KeyWrongLastSequenceError:
        try:
            return False, await bucket.get(key)
        except KeyNotFoundError:
            return False, None
    return True, None


def _decoded(entry: KeyValue.Entry) -> Claim:
    try:
        return Claim.model_validate_json(entry.value or b"")
    except ValidationError:
        raise QueueUnavailable("another version of the api keeps the answer of this Idempotency-Key") from None


def _as(request: InferenceRequest, first: Claim) -> InferenceRequest:
    """The request that leads: the same body under another id."""
    return request.model_copy(
        update={
            "id": first.request_id,
            "created_at": first.created_at,
            "deadline": first.deadline,
            "reply_to": names.answer_subject(first.request_id),
        }
    )


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Makes QueueUnavailable of an error of NATS."""
    try:
        yield
    except KeyWrongLastSequenceError:
        raise
    except (NatsError, TimeoutError) as exc:
        raise QueueUnavailable("the queue cannot be reached, try again later") from exc


def _body_hash(request: InferenceRequest) -> str:
    own = {"id", "created_at", "deadline", "reply_to", "record", "notify"}
    return hashlib.sha256(request.model_dump_json(exclude=own, exclude_defaults=True).encode()).hexdigest()
