"""The reply of one attempt: frames to the api that waits, kept until the api has confirmed them all."""

import asyncio
import base64
import contextlib
import logging
import time
from collections.abc import Callable

from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from pydantic import ValidationError

from forebay_contracts.nats.connection import Connection
from forebay_contracts.wire.errors import ApiError
from forebay_contracts.wire.frames import Completed, Delta, Failed, FinishedChoice, Resume, Started
from forebay_contracts.wire.request import CompletionType, InferenceRequest
from forebay_contracts.wire.state import Usage
from forebay_inference.engine.protocol import Tokens, Vector

log = logging.getLogger(__name__)

CONFIRM_TIMEOUT_S = 2.0
"""How long one try at a frame that the api must confirm may take."""

RETRY_S = 0.25
"""Pause between such tries."""

RESEND_PAUSE_S = 0.01
"""Pause between sending what was missed and asking again whether all is there."""

ANNOUNCE_AFTER_S = 0.02
"""An answer that is no stream and ends sooner is not announced: its end says all."""

UNARY_FLUSH_S = 0.25
"""A client that wants no stream needs no token at once: they are sent together, so often that a next attempt
has little to do again."""


class ReplyStream:
    """Frames of one attempt at one request.

    Everything sent is kept until the end, so that what the api missed can be sent again. An api that is gone
    (nobody listens and its heartbeat is over) counts as having confirmed.
    """

    def __init__(
        self, connection: Connection, request: InferenceRequest, attempt: int, api_alive: Callable[[], bool]
    ) -> None:
        self._connection = connection
        self._request = request
        self._attempt = attempt
        self._api_alive = api_alive
        self._lengths: dict[int, int] = {}
        self._sent: list[Delta] = []
        self._announcing: asyncio.TimerHandle | None = None
        self._announcement: asyncio.Task[None] | None = None
        self._held: list[Delta] = []
        self._tails: list[Delta] = []
        self._flushed_at = time.monotonic()

    @property
    def token_count(self) -> int:
        """Tokens of all choices so far, those of earlier attempts included; embeddings have none."""
        return 0 if self._request.completion_type is CompletionType.EMBEDDING else sum(self._lengths.values())

    async def started(self, worker: str) -> Resume:
        """Announce the attempt; from the second on, learn what the client has already.

        `wanted` is false in the answer where nobody waits any more.
        """
        frame = Started(attempt=self._attempt, worker=worker)
        if self._attempt == 1:
            if self._request.stream:
                await self._publish(frame.encode())
            else:
                self._announce_soon(frame.encode())
            return Resume()
        resume = await self._ask(frame.encode())
        self._lengths = {choice.index: len(choice.tokens) for choice in resume.choices}
        return resume

    async def send(self, tokens: Tokens) -> None:
        """Send the next tokens of a choice, at once for a stream."""
        offset = self._lengths.get(tokens.index, 0)
        delta = Delta(
            attempt=self._attempt,
            index=tokens.index,
            offset=offset,
            tokens=tokens.token_ids,
            text=tokens.text,
            logprobs=tokens.logprobs,
            tool_calls=tokens.tool_calls,
        )
        if not tokens.token_ids:
            # Without tokens it could not be told from its repetition: the terminal frame carries it.
            self._tails.append(delta)
            return
        self._lengths[tokens.index] = offset + len(tokens.token_ids)
        if self._request.stream:
            await self._deliver(delta)
            return
        self._held.append(delta)
        if time.monotonic() - self._flushed_at >= UNARY_FLUSH_S:
            for joined in self._take_held():
                await self._deliver(joined)

    async def send_vector(self, vector: Vector) -> None:
        """Send an embedding, in a frame of its own: all of them together would not fit into one."""
        values = base64.b64encode(vector.values).decode()
        self._lengths[vector.index] = 1
        await self._deliver(Delta(attempt=self._attempt, index=vector.index, tokens=(0,), embedding=values))

    def close(self) -> None:
        """Announce nothing any more."""
        if self._announcing is not None:
            self._announcing.cancel()

    async def complete(self, finish_reasons: dict[int, str], usage: Usage) -> Resume:
        """Send the end until the api has every token of the answer, or nobody waits for it."""
        self.close()
        choices = tuple(
            FinishedChoice(index=index, finish_reason=reason, tokens=self._lengths.get(index, 0))
            for index, reason in sorted(finish_reasons.items())
        )
        last = self._take_held()
        frame = Completed(attempt=self._attempt, choices=choices, usage=usage, deltas=(*last, *self._tails)).encode()
        self._sent += last
        while (resume := await self._ask(frame)).wanted:
            await self.resend(resume)
            await asyncio.sleep(RESEND_PAUSE_S)
        return resume

    async def fail(self, error: ApiError) -> None:
        """Send the error that ends the request, until the api has it."""
        self.close()
        await self._ask(failed(self._attempt, error).encode())

    async def resend(self, have: Resume) -> None:
        """Send again what the api, by what it has, does not have."""
        lengths = {choice.index: len(choice.tokens) for choice in have.choices}
        for delta in self._sent:
            if delta.offset >= lengths.get(delta.index, 0):
                await self._publish(delta.encode())

    def _announce_soon(self, frame: bytes) -> None:
        loop = asyncio.get_running_loop()

        def announce() -> None:
            self._announcement = loop.create_task(self._publish(frame))

        self._announcing = loop.call_later(ANNOUNCE_AFTER_S, announce)

    async def _deliver(self, delta: Delta) -> None:
        self._sent.append(delta)
        self._flushed_at = time.monotonic()
        await self._publish(delta.encode())

    def _take_held(self) -> list[Delta]:
        held, self._held = self._held, []
        return join(held)

    async def _publish(self, frame: bytes) -> None:
        # Lost while there is no connection; the api notices the gap, at the latest at the end.
        with contextlib.suppress(NatsError):
            await self._connection.client.publish(self._request.reply_to, frame)

    async def _ask(self, frame: bytes) -> Resume:
        """Send a frame until the api answers it; an api that is gone wants nothing more."""
        while time.time() < self._request.deadline:
            try:
                answer = await self._connection.requests.request(
                    self._request.reply_to, frame, timeout_s=CONFIRM_TIMEOUT_S
                )
                return Resume.model_validate_json(answer.data)
            except NoRespondersError:
                if not self._api_alive():
                    return Resume(wanted=False)
            except (NatsError, TimeoutError) as exc:
                log.debug("%s: the api did not confirm: %r", self._request.id, exc)
            except ValidationError:
                log.warning("[RequestQueue] %s: the api's answer cannot be read", self._request.id)
            await asyncio.sleep(RETRY_S)
        return Resume(wanted=False)


def failed(attempt: int, error: ApiError) -> Failed:
    """The frame that says `error`."""
    return Failed(
        attempt=attempt,
        status=error.status,
        error_type=error.type,
        code=error.code,
        message=error.message,
        param=error.param,
    )


def join(deltas: list[Delta]) -> list[Delta]:
    """The same deltas with those that follow each other within a choice made one."""
    by_index: dict[int, list[Delta]] = {}
    for delta in deltas:
        by_index.setdefault(delta.index, []).append(delta)
    return [
        own[0]
        if len(own) == 1
        else Delta(
            attempt=own[0].attempt,
            index=index,
            offset=own[0].offset,
            tokens=tuple(token for delta in own for token in delta.tokens),
            text="".join(delta.text for delta in own),
            logprobs=tuple(logprob for delta in own for logprob in delta.logprobs),
            tool_calls=tuple(call for delta in own for call in delta.tool_calls),
        )
        for index, own in by_index.items()
    ]
