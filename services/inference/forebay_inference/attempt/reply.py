"""The reply of one attempt: frames to the receiver, kept until the receiver has confirmed all of them."""

import asyncio
import base64
import contextlib
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
from forebay_inference.attempt.departures import Departures
from forebay_inference.engine.events import Finished, Tokens, Vector

RESEND_PAUSE_S: Final = 0.01
"""Pause between sending missed frames again and asking again whether all have arrived."""

ANNOUNCE_AFTER_S: Final = 0.02
"""An answer without streaming that ends sooner is not announced: its last frame says all."""

UNARY_FLUSH_S: Final = 0.25
"""Without streaming, tokens are collected and sent this often: a next attempt has little to repeat."""


class Reply:
    """Frames of one attempt at one request; `attempt` is the attempt's number.

    Sent frames are kept as bytes until the end, so that lost ones can be sent again: about 200 bytes a token, a sixth
    of what the message objects take.
    """

    def __init__(self, channel: ReplyChannel, request: InferenceRequest, worker: str, departures: Departures) -> None:
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
        self._departures = departures
        self._opened: set[int] = set()
        """The choices whose first token was sent."""
        self._sent_at = time.monotonic()
        self._flush: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def completion_tokens(self) -> int:
        """Tokens of all choices so far, those of earlier attempts included. Vectors have none."""
        if self._request.completion_type in POOLING:
            return 0
        return max(sum(self._lengths.values()) - self.returned, 0)

    async def resume(self) -> Resume:
        """Announce an attempt that may not be the first; returns what the client has already."""
        # What an earlier generation holds must not leave under the number of this attempt.
        self._sent, self._held, self._tails = [], {}, []
        self._opened.clear()
        if (flush := self._flush) is not None:
            self._flush = None
            flush.cancel()
            await asyncio.wait([flush])
        # A first attempt has yet to find out whether the request is valid.
        resume = await self._channel.ask(self._started(accepted=self.attempt > 1))
        self._lengths = {choice.index: len(choice.tokens) for choice in resume.choices}
        self.resumed = self.completion_tokens
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
        """Send the next tokens of a choice: a stream's first at once, its others with the next departure. Without
        streaming, they are sent after UNARY_FLUSH_S. Raises what kept those before them from being sent."""
        await self._departed()
        index, offset = tokens.index, self._lengths.get(tokens.index, 0)
        if not tokens.token_ids:
            # A receiver recognises a repeated delta by its tokens. One without tokens travels in the last frame.
            self._tails.append(self._delta(offset, tokens))
            return
        held = self._held.get(index)
        if held is not None and (tokens.prompt or _kind(held[-1]) != _kind(tokens)):
            await self._send_held()
        self._lengths[index] = offset + len(tokens.token_ids)
        first = self._request.stream and index not in self._opened
        if first or tokens.prompt:
            if not tokens.prompt:
                self._opened.add(index)
            await self._channel.send(self._kept(offset, tokens))
            return
        self._held.setdefault(index, []).append(tokens)
        if self._departures.due(self._depart) if self._request.stream else self._collected_for() >= UNARY_FLUSH_S:
            await self._send_held()

    async def flush(self) -> None:
        """Send what is held, and have it stored where it is. Raises Superseded."""
        self.close()
        await self._departed()
        await self._send_held()
        await self._channel.flush()

    def _depart(self) -> None:
        if self._held and self._flush is None and not self._closed:
            self._flush = asyncio.create_task(self._send_held())
            self._flush.add_done_callback(_heard)

    async def _departed(self) -> None:
        if self._flush is not None:
            await asyncio.shield(self._flush)
            self._flush = None

    def _collected_for(self) -> float:
        return time.monotonic() - self._sent_at

    async def _send_held(self) -> None:
        # All are kept before one is sent: a send may fail, and what it was is sent again at the end.
        for frame in [self._kept(offset, tokens) for offset, tokens in self._take_held()]:
            await self._channel.send(frame)

    async def send_vector(self, vector: Vector) -> None:
        """Send an embedding in a frame of its own: one frame cannot hold all of them."""
        values = base64.b64encode(vector.values).decode()
        self._lengths[vector.index] = 1
        frame = Delta(attempt=self.attempt, index=vector.index, tokens=(0,), embedding=values).encode()
        self._keep(vector.index, 0, frame)
        await self._channel.send(frame)

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
        self._last = [self._delta(offset, tokens) for offset, tokens in self._take_held()]
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
        with contextlib.suppress(Superseded):  # the receiver says how it ended
            await self._departed()
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
        with contextlib.suppress(Superseded):  # the receiver says how it ended
            await self._departed()
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
        self._closed = True
        if self._announcing is not None:
            self._announcing.cancel()

    def _started(self, *, accepted: bool = True) -> bytes:
        return Started(
            attempt=self.attempt, worker=self._worker, accepted=accepted, prompt_tokens=self.prompt_tokens
        ).encode()

    def _kept(self, offset: int, tokens: Tokens) -> bytes:
        """The frame of a delta, which is kept until the end."""
        if tokens.logprobs or tokens.tool_calls or tokens.prompt:
            frame = self._delta(offset, tokens).encode()
        else:
            frame = encode_delta(self.attempt, tokens.index, offset, tokens.token_ids, tokens.text, tokens.reasoning)
        self._keep(tokens.index, offset, frame)
        return frame

    def _keep(self, index: int, offset: int, frame: bytes) -> None:
        self._sent_at = time.monotonic()
        if not self._channel.lossless:
            self._sent.append((index, offset, frame))

    def _take_held(self) -> list[tuple[int, Tokens]]:
        """What each choice holds, with the place of its first token in the answer."""
        held, self._held = self._held, {}
        joined = [events[0] if len(events) == 1 else _joined(events) for events in held.values()]
        return [(self._lengths.get(one.index, 0) - len(one.token_ids), one) for one in joined]

    def _delta(self, offset: int, tokens: Tokens) -> Delta:
        return Delta(
            attempt=self.attempt,
            index=tokens.index,
            offset=offset,
            tokens=tokens.token_ids,
            text=tokens.text,
            reasoning=tokens.reasoning,
            logprobs=tokens.logprobs,
            tool_calls=tokens.tool_calls,
            prompt=tokens.prompt,
        )


def _heard(flush: asyncio.Task[None]) -> None:
    """Whoever waits for it gets its error. Nobody waits if the attempt has ended."""
    if not flush.cancelled():
        flush.exception()


def _joined(events: Sequence[Tokens]) -> Tokens:
    """Successive tokens of a choice as one event."""
    return Tokens(
        events[0].index,
        tuple(token for event in events for token in event.token_ids),
        "".join(event.text for event in events),
        tuple(logprob for event in events for logprob in event.logprobs),
        tuple(call for event in events for call in event.tool_calls),
        "".join(event.reasoning for event in events),
    )


def _kind(tokens: Tokens) -> tuple[bool, bool]:
    """What a delta may hold together: within it, reasoning stands before text, and text before calls."""
    return bool(tokens.reasoning), bool(tokens.tool_calls)
