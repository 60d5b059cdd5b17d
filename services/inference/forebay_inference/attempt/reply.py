"""The reply of one attempt: frames to the receiver, kept until the receiver has confirmed all of them."""

import asyncio
import base64
import math
import time
from collections.abc import Mapping, Sequence
from typing import Final

from forebay_contracts.nats import clock
from forebay_contracts.queueing.protocols import ReplyChannel, Superseded
from forebay_contracts.wire.errors import ApiError
from forebay_contracts.wire.frames import (
    Completed,
    Delta,
    FinishedChoice,
    Resume,
    Started,
    encode_delta,
    failed,
)
from forebay_contracts.wire.request import POOLING, InferenceRequest
from forebay_contracts.wire.state import RequestStatus, Usage
from forebay_inference.engine.events import Finished, Tokens, Vector

RESEND_PAUSE_S: Final = 0.01
"""Pause between sending missed frames again and asking again whether all have arrived."""

ANNOUNCE_AFTER_S: Final = 0.02
"""An answer without streaming that ends sooner is not announced: its last frame says all."""

UNARY_FLUSH_S: Final = 0.25
"""Without streaming, tokens are collected and sent this often: a next attempt has little to repeat."""

JOIN_S: Final = 0.005
"""A stream's tokens within this time after a frame go into the next one. The first token does not wait, and no token
of a stream of less than 200 tokens/s does. A frame costs worker and api together 80 us."""


class Reply:
    """Frames of one attempt at one request; `attempt` is the attempt's number.

    Sent frames are kept as bytes until the end, so that lost ones can be sent again: about 200 bytes a token, a sixth
    of what the message objects take.
    """

    def __init__(self, channel: ReplyChannel, request: InferenceRequest, worker: str) -> None:
        self.attempt = 1
        self.prompt_tokens = self.returned = 0
        """Of the prompts: all their tokens, and those of them that are sent back."""
        self.resumed = 0
        """Tokens of the answer that an earlier attempt made."""
        self._channel = channel
        self._request = request
        self._worker = worker
        self._lengths: dict[int, int] = {}
        self._sent: list[tuple[int, int, bytes]] = []
        self._last: list[Delta] = []
        self._completed = b""
        self._announcing: asyncio.TimerHandle | None = None
        self._announcement: asyncio.Task[None] | None = None
        self._held: dict[int, list[Tokens]] = {}
        self._tails: list[Delta] = []
        self._join_s, self._begun = (JOIN_S, -math.inf) if request.stream else (UNARY_FLUSH_S, time.monotonic())
        self._sent_at: dict[int, float] = {}
        """By choice, when its last frame was sent."""
        self._flushing: asyncio.TimerHandle | None = None
        self._flush: asyncio.Task[None] | None = None

    @property
    def completion_tokens(self) -> int:
        """Tokens of all choices so far, those of earlier attempts included. Vectors have none."""
        if self._request.completion_type in POOLING:
            return 0
        return max(sum(self._lengths.values()) - self.returned, 0)

    async def resume(self) -> Resume:
        """Announce an attempt that may not be the first; returns what the client has already."""
        # A first attempt has yet to find out whether the request is valid.
        resume = await self._channel.ask(self._started(accepted=self.attempt > 1))
        self._lengths = {choice.index: len(choice.tokens) for choice in resume.choices}
        self.resumed = self.completion_tokens
        self._sent, self._held, self._tails = [], {}, []
        return resume

    async def announce(self) -> None:
        """Announce a first attempt after the engine has accepted the request."""
        if self._request.stream:
            await self._channel.send(self._started())
            return
        loop = asyncio.get_running_loop()

        def announce() -> None:
            self._announcement = loop.create_task(self._channel.send(self._started()))

        self._announcing = loop.call_later(ANNOUNCE_AFTER_S, announce)

    async def send(self, tokens: Tokens) -> None:
        """Send the next tokens of a choice: a stream's within JOIN_S, others within UNARY_FLUSH_S."""
        index, offset = tokens.index, self._lengths.get(tokens.index, 0)
        if not tokens.token_ids:
            # A receiver recognises a repeated delta by its tokens. One without tokens travels in the last frame.
            self._tails.append(self._delta(index, [tokens]))
            return
        held = self._held.get(index)
        if held is not None and (tokens.prompt or _kind(held[-1]) != _kind(tokens)):
            await self._send_held()
        self._lengths[index] = offset + len(tokens.token_ids)
        left_s = self._sent_at.get(index, self._begun) + self._join_s - time.monotonic()
        if tokens.prompt or (left_s <= 0 and held is None):
            await self._channel.send(self._kept(index, offset, self._frame(index, offset, tokens)))
            return
        self._held.setdefault(index, []).append(tokens)
        if left_s <= 0:
            await self._send_held()
        elif self._request.stream and self._flushing is None:
            self._flushing = asyncio.get_running_loop().call_later(left_s, self._flush_soon)

    def _frame(self, index: int, offset: int, tokens: Tokens) -> bytes:
        if tokens.logprobs or tokens.tool_calls or tokens.prompt:
            return self._delta(index, [tokens]).encode()
        return encode_delta(self.attempt, index, offset, tokens.token_ids, tokens.text, tokens.reasoning)

    async def flush(self) -> None:
        """Send what is held, and have it stored where it is. Raises Superseded."""
        self.close()
        await self._send_held()
        await self._channel.flush()

    def _flush_soon(self) -> None:
        self._flush = asyncio.create_task(self._send_held())

    async def _send_held(self) -> None:
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        # All are kept before one is sent: a send may fail, and what it was is sent again at the end.
        for frame in [self._kept(delta.index, delta.offset, delta.encode()) for delta in self._take_held()]:
            await self._channel.send(frame)

    async def send_vector(self, vector: Vector) -> None:
        """Send an embedding in a frame of its own: one frame cannot hold all of them."""
        values = base64.b64encode(vector.values).decode()
        self._lengths[vector.index] = 1
        delta = Delta(attempt=self.attempt, index=vector.index, tokens=(0,), embedding=values)
        await self._channel.send(self._kept(vector.index, 0, delta.encode()))

    def finish(self, finished: Mapping[int, Finished], usage: Usage) -> None:
        """Make the last frame of a whole answer. Raises ValueError if the answer cannot be written as JSON."""
        choices = tuple(
            FinishedChoice(
                index=index,
                finish_reason=end.finish_reason,
                tokens=self._lengths.get(index, 0),
                stop_string=end.stop_string,
            )
            for index, end in sorted(finished.items())
        )
        self._last = self._take_held()
        deltas = (*self._last, *self._tails)
        self._completed = Completed(
            attempt=self.attempt, choices=choices, usage=usage, deltas=deltas, at=clock.now()
        ).encode()

    async def complete(self) -> RequestStatus:
        """Send the last frame until the receiver has every token; returns how the request ended for its client.

        Raises:
            Superseded: the receiver has seen a newer attempt.
        """
        self.close()
        while (resume := await self._channel.ask(self._completed)).wanted:
            await self.resend(resume)
            await asyncio.sleep(RESEND_PAUSE_S)
        if resume.newest is not None:
            raise Superseded(f"{self._request.id}: attempt {resume.newest} has begun")
        # Without an outcome the api is gone, and nobody got the answer.
        return resume.outcome or RequestStatus.CANCELLED

    async def fail(self, error: ApiError, *, final: bool) -> RequestStatus | None:
        """Send the final error until the receiver has it; returns how the request ended for its client.

        Raises:
            Superseded: the receiver has seen a newer attempt, and no state says that the request has ended (`final`).
        """
        self.close()
        await self._send_held()
        while (resume := await self._channel.ask(failed(self.attempt, error).encode())).newest is not None:
            if not final:
                raise Superseded(f"{self._request.id}: attempt {resume.newest} has begun")
            self.attempt = resume.newest + 1
        return resume.outcome

    async def resend(self, have: Resume) -> None:
        """Send again what is missing from `have`."""
        lengths = {choice.index: len(choice.tokens) for choice in have.choices}
        for index, offset, frame in self._sent:
            if offset >= lengths.get(index, 0):
                await self._channel.send(frame)
        for delta in self._last:
            if delta.offset >= lengths.get(delta.index, 0):
                await self._channel.send(delta.encode())

    def close(self) -> None:
        """Stop what is to be sent later."""
        for timer in (self._announcing, self._flushing):
            if timer is not None:
                timer.cancel()

    def _started(self, *, accepted: bool = True) -> bytes:
        return Started(
            attempt=self.attempt, worker=self._worker, accepted=accepted, prompt_tokens=self.prompt_tokens
        ).encode()

    def _kept(self, index: int, offset: int, frame: bytes) -> bytes:
        """The frame of a delta, which is kept until the end."""
        self._sent_at[index] = time.monotonic()
        if not self._channel.lossless:
            self._sent.append((index, offset, frame))
        return frame

    def _take_held(self) -> list[Delta]:
        held, self._held = self._held, {}
        return [self._delta(index, events) for index, events in held.items()]

    def _delta(self, index: int, events: Sequence[Tokens]) -> Delta:
        """The last `events` of a choice in one delta."""
        if len(events) == 1:
            (one,) = events
        else:
            one = Tokens(
                index,
                tuple(token for event in events for token in event.token_ids),
                "".join(event.text for event in events),
                tuple(logprob for event in events for logprob in event.logprobs),
                tuple(call for event in events for call in event.tool_calls),
                "".join(event.reasoning for event in events),
            )
        return Delta(
            attempt=self.attempt,
            index=index,
            offset=self._lengths.get(index, 0) - len(one.token_ids),
            tokens=one.token_ids,
            text=one.text,
            reasoning=one.reasoning,
            logprobs=one.logprobs,
            tool_calls=one.tool_calls,
            prompt=one.prompt,
        )


def _kind(tokens: Tokens) -> tuple[bool, bool]:
    """What a delta may hold together: within it, reasoning stands before text, and text before calls."""
    return bool(tokens.reasoning), bool(tokens.tool_calls)
