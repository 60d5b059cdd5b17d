"""`Idempotency-Key`: a client that repeats a request gets the running or finished answer instead of another run.

The first request with a key leads: it runs to its end even if its client leaves, and its answer is kept for
REQUEST_STATE_TTL. Other requests with the same key and body, at any api replica, get that answer. An error is not
kept, so a repetition runs again. It also runs again if the api of the leading request has died.
"""

import asyncio
import contextlib
import hashlib
import logging
import re
from collections.abc import AsyncIterator
from typing import Literal

from nats.errors import Error as NatsError
from nats.js.errors import APIError, KeyNotFoundError, KeyWrongLastSequenceError
from nats.js.kv import KeyValue
from pydantic import ValidationError

from forebay_api.in_flight.dispatcher import Dispatcher
from forebay_api.in_flight.live_answer import LiveAnswer
from forebay_contracts.nats.connection import Connection
from forebay_contracts.nats.presence import Presence
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ApiError, InvalidRequest, QueueUnavailable
from forebay_contracts.wire.frames import Completed, Delta, Frame, Started
from forebay_contracts.wire.heartbeats import ApiInfo
from forebay_contracts.wire.message import Message
from forebay_contracts.wire.request import InferenceRequest

HEADER = "idempotency-key"
MAX_KEY_LENGTH = 255

FOLLOW_CHECK_S = 2.0
"""How often a request that waits for another api's answer checks that this api is alive."""

log = logging.getLogger(__name__)


class KeptAnswer(Message):
    """The value in the KV bucket `inference-answers`: which request leads, and its answer once it is whole."""

    schema_version: Literal[1] = 1
    request_id: str
    body_hash: str
    api: str
    deltas: tuple[Delta, ...] = ()
    completed: Completed | None = None


class KeyReused(InvalidRequest):
    """The key was used with another body."""

    status = 422
    code = "idempotency_key_reused"


def scoped_key(key: str, authorization: str) -> str:
    """The bucket's key for a client's key. Two clients may choose the same key. Raises InvalidRequest."""
    if not re.fullmatch(rf"[\x21-\x7e]{{1,{MAX_KEY_LENGTH}}}", key):
        raise InvalidRequest(f"Idempotency-Key must be 1 to {MAX_KEY_LENGTH} visible ASCII characters", param=HEADER)
    return hashlib.sha256(f"{authorization}\n{key}".encode()).hexdigest()


class SharedAnswer:
    """An answer that several clients read, each from its first frame, while it is still generated."""

    def __init__(self, key: str, claim: KeptAnswer) -> None:
        self.key = key
        self.claim = claim
        """What is stored under `key` while the request of this api leads."""
        self._frames: list[Frame] = []
        self._readers: set[LiveAnswer] = set()
        self._leader = claim.request_id
        self._led = asyncio.Event()

    @contextlib.asynccontextmanager
    async def read(self, request: InferenceRequest) -> AsyncIterator[LiveAnswer]:
        """The answer for one more client, as one to the leading request: its id is what the client can look up.

        The client can stop waiting without an effect on other clients.
        """
        answer = LiveAnswer(request, lambda _: None, shared=True)
        for frame in self._frames:
            answer.receive(frame)
        self._readers.add(answer)
        timer = asyncio.get_running_loop().call_later(request.deadline - request.created_at, answer.time_out)
        try:
            await self._led.wait()
            answer.request = request.model_copy(update={"id": self._leader})
            yield answer
        finally:
            timer.cancel()
            self._readers.discard(answer)

    def led_by(self, request_id: str) -> None:
        """Let clients go on to wait for the answer. If this request dies, they get the answer of the next one."""
        self._leader = request_id
        self._led.set()

    def receive(self, frame: Frame) -> None:
        """Give every client the next frame."""
        self._frames.append(frame)
        for reader in self._readers:
            reader.receive(frame)

    def fail(self, error: ApiError) -> None:
        """End the wait of every client with `error`, unless the answer has ended."""
        self._led.set()
        for reader in self._readers:
            reader.fail(error)


class IdempotentRequests:
    """Answers by key: those in flight here, and those kept in NATS."""

    def __init__(self, connection: Connection, dispatcher: Dispatcher, apis: Presence[ApiInfo]) -> None:
        self._connection = connection
        self._dispatcher = dispatcher
        self._apis = apis
        self._answers: dict[str, SharedAnswer] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Cancel requests that run without a client."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    @contextlib.asynccontextmanager
    async def attach(self, request: InferenceRequest, key: str) -> AsyncIterator[LiveAnswer]:
        """The answer for `key`. This request leads if no other does.

        Raises:
            KeyReused: the key was used with another body.
        """
        claim = KeptAnswer(request_id=request.id, body_hash=_body_hash(request), api=self._dispatcher.instance)
        if (shared := self._answers.get(key)) is None:
            shared = self._answers[key] = SharedAnswer(key, claim)
            task = asyncio.create_task(self._obtain(request, shared))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        _check_body(shared.claim, claim)
        async with shared.read(request) as answer:
            yield answer

    async def _obtain(self, request: InferenceRequest, shared: SharedAnswer) -> None:
        """Lead, or follow the leading request. The shared answer has ended when this returns."""
        try:
            bucket = await self._connection.jetstream.key_value(names.ANSWERS_BUCKET)
            while True:
                try:
                    revision = await bucket.create(shared.key, shared.claim.encode())
                except KeyWrongLastSequenceError:
                    if await self._follow(bucket, shared):
                        return
                else:
                    await self._lead(request, bucket, revision, shared)
                    return
        except ApiError as exc:
            shared.fail(exc)
        except ValidationError:
            shared.fail(QueueUnavailable("another version of the api keeps the answer of this Idempotency-Key"))
        except (NatsError, TimeoutError) as exc:
            log.warning("[RequestQueue] %s: kept answers cannot be reached: %r", request.id, exc)
            shared.fail(QueueUnavailable("the queue cannot be reached, try again later"))
        finally:
            shared.fail(QueueUnavailable("the api stopped"))
            self._answers.pop(shared.key, None)

    async def _lead(self, request: InferenceRequest, bucket: KeyValue, revision: int, shared: SharedAnswer) -> None:
        deltas: list[Delta] = []
        try:
            async with self._dispatcher.submit(request) as answer:
                shared.led_by(request.id)
                await answer.started()
                # Not the newest attempt: deltas of older ones may follow.
                shared.receive(Started(attempt=1, worker=answer.worker or ""))
                async for some in answer.deltas():
                    deltas += some
                    for delta in some:
                        shared.receive(delta)
                completed = answer.completed
            assert completed is not None
            kept = shared.claim.model_copy(update={"deltas": tuple(deltas), "completed": completed})
            try:
                await bucket.update(shared.key, kept.encode(), last=revision)
                revision = 0
            except (NatsError, TimeoutError) as exc:
                # The client gets its answer also if it is too large to be kept, the store is full or NATS is away.
                log.warning("[RequestQueue] %s: the answer is not kept for its key: %r", request.id, exc)
            shared.receive(completed)
        finally:
            # After an error, or if the answer was not kept, the key is free for another try.
            if revision:
                with contextlib.suppress(NatsError, TimeoutError):
                    await bucket.delete(shared.key, last=revision)

    async def _follow(self, bucket: KeyValue, shared: SharedAnswer) -> bool:
        """Wait for the leader's answer; False if no request leads any more."""
        changed = asyncio.Event()

        async def heard(_: object) -> None:
            changed.set()

        subject = names.bucket_subject(names.ANSWERS_BUCKET, shared.key)
        subscription = await self._connection.client.subscribe(subject, cb=heard)
        try:
            while True:
                changed.clear()
                try:
                    entry = await bucket.get(shared.key)
                except KeyNotFoundError:
                    return False
                kept = KeptAnswer.model_validate_json(entry.value or b"")
                _check_body(kept, shared.claim)
                shared.led_by(kept.request_id)
                if kept.completed is not None:
                    shared.receive(kept.completed.model_copy(update={"deltas": kept.deltas}))
                    return True
                if not self._apis.is_alive(kept.api):
                    with contextlib.suppress(KeyWrongLastSequenceError, APIError):
                        await bucket.delete(shared.key, last=entry.revision)
                    return False
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), FOLLOW_CHECK_S)
        finally:
            with contextlib.suppress(NatsError):
                await subscription.unsubscribe()


def _check_body(first: KeptAnswer, repeated: KeptAnswer) -> None:
    if first.body_hash != repeated.body_hash:
        raise KeyReused("this Idempotency-Key was used with another body", param=HEADER)


def _body_hash(request: InferenceRequest) -> str:
    own = {"id", "created_at", "deadline", "reply_to"}
    return hashlib.sha256(request.model_dump_json(exclude=own).encode()).hexdigest()
