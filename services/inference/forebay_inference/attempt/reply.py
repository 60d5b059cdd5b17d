"""The reply of one attempt: frames to the receiver, kept until it has confirmed them all."""

import asyncio
import base64
import time
from collections.abc import Mapping
from typing import Final

from forebay_contracts.queueing.protocols import ReplyChannel
from forebay_contracts.wire.errors import ApiError
from forebay_contracts.wire.frames import Completed, Delta, Failed, FinishedChoice, Resume, Started
from forebay_contracts.wire.request import CompletionType, InferenceRequest
from forebay_contracts.wire.state import RequestStatus, Usage
from forebay_inference.engine.events import Tokens, Vector

RESEND_PAUSE_S: Final = 0.01
"""Pause between sending what was missed and asking again whether all is there."""

ANNOUNCE_AFTER_S: Final = 0.02
"""An answer that is no stream and ends sooner is not announced: its end says all."""

UNARY_FLUSH_S: Final = 0.25
"""A client that wants no stream needs no token at once: they are sent together, so often that a next attempt
has little to do again."""


class Reply:
    """Frames of one attempt at one request, of which `attempt` is the number.

    What was sent is kept as bytes until the end, so that what the receiver missed can be sent again: some 200 bytes a
    token, a sixth of what the messages take.
    """

    def __init__(self, channel: ReplyChannel, request: InferenceRequest, worker: str) -> None:
        self.attempt = 1
        self._channel = channel
        self._request = request
        self._worker = worker
        self._lengths: dict[int, int] = {}
        self._sent: list[tuple[int, int, bytes]] = []
        self._last: list[Delta] = []
        self._announcing: asyncio.TimerHandle | None = None
        self._announcement: asyncio.Task[None] | None = None
        self._held: list[Delta] = []
        self._tails: list[Delta] = []
        self._flushed_at = time.monotonic()

    @property
    def token_count(self) -> int:
        """Tokens of all choices so far, those of earlier attempts included; embeddings have none."""
        return 0 if self._request.completion_type is CompletionType.EMBEDDING else sum(self._lengths.values())

    async def resume(self) -> Resume:
        """Begin an attempt that is not the first: announce it, and learn what the client has already."""
        resume = await self._channel.ask(self._started())
        self._lengths = {choice.index: len(choice.tokens) for choice in resume.choices}
        self._sent, self._held, self._tails = [], [], []
        return resume

    async def announce(self) -> None:
        """Announce a first attempt, once the engine has accepted the request."""
        if self._request.stream:
            await self._channel.send(self._started())
            return
        loop, frame = asyncio.get_running_loop(), self._started()

        def announce() -> None:
            self._announcement = loop.create_task(self._channel.send(frame))

        self._announcing = loop.call_later(ANNOUNCE_AFTER_S, announce)

    async def send(self, tokens: Tokens) -> None:
        """Send the next tokens of a choice, at once for a stream."""
        offset = self._lengths.get(tokens.index, 0)
        delta = Delta(
            attempt=self.attempt,
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
        await self._deliver(Delta(attempt=self.attempt, index=vector.index, tokens=(0,), embedding=values))

    async def complete(self, finish_reasons: Mapping[int, str], usage: Usage) -> RequestStatus:
        """Send the end until the receiver has every token of the answer; how the request ended for its client."""
        self.close()
        choices = tuple(
            FinishedChoice(index=index, finish_reason=reason, tokens=self._lengths.get(index, 0))
            for index, reason in sorted(finish_reasons.items())
        )
        last = self._take_held()
        frame = Completed(attempt=self.attempt, choices=choices, usage=usage, deltas=(*last, *self._tails)).encode()
        self._last = last
        while (resume := await self._channel.ask(frame)).wanted:
            await self.resend(resume)
            await asyncio.sleep(RESEND_PAUSE_S)
        # Nobody got it whose api is gone.
        return resume.outcome or RequestStatus.CANCELLED

    async def fail(self, error: ApiError) -> RequestStatus | None:
        """Send the error that ends the request until the receiver has it; how the request ended for its client."""
        self.close()
        return (await self._channel.ask(failed(self.attempt, error).encode())).outcome

    async def resend(self, have: Resume) -> None:
        """Send again what the receiver, by what it has, does not have."""
        lengths = {choice.index: len(choice.tokens) for choice in have.choices}
        for index, offset, frame in self._sent:
            if offset >= lengths.get(index, 0):
                await self._channel.send(frame)
        for delta in self._last:
            if delta.offset >= lengths.get(delta.index, 0):
                await self._channel.send(delta.encode())

    def close(self) -> None:
        """Announce nothing any more."""
        if self._announcing is not None:
            self._announcing.cancel()

    def _started(self) -> bytes:
        return Started(attempt=self.attempt, worker=self._worker).encode()

    async def _deliver(self, delta: Delta) -> None:
        self._flushed_at = time.monotonic()
        frame = delta.encode()
        self._sent.append((delta.index, delta.offset, frame))
        await self._channel.send(frame)

    def _take_held(self) -> list[Delta]:
        held, self._held = self._held, []
        return join(held)


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
