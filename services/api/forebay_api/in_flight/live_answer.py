"""The answer of a request in flight here: frames in, deltas out, without repeated or missing tokens."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from forebay_api.in_flight.answer import ClientLeft, SlowReader, WorkerError
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ApiError, InferenceFailed, RequestCancelled, RequestTimeout
from forebay_contracts.wire.frames import Completed, Delta, Failed, Frame, Resume, ResumedChoice, Started
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import RequestStatus, Usage, used_so_far

MAX_UNREAD_TOKENS = 16_384
"""A client that has not read so many tokens is too slow: its request is cancelled.

A stored answer stays in the log, so whoever feeds it waits for room.
"""

RESEND_RETRY_S = 1.0
"""Pause before a worker is asked a second time for the same missing tokens."""


@dataclass(slots=True, eq=False, repr=False)
class LiveAnswer:
    """The answer to one request, as far as it has come. `on_end` is called once, when it has ended for its client.

    `on_whole` gets the last frame once every token is here, and decides when to `finish` with it. Without one, it
    finishes at once.

    `attempt` is the newest attempt that has sent a frame, and `worker` its worker, if the first of its frames said so.
    While `held`, only a client that leaves ends it: its end is being written into the state first.

    Three kinds of frames are dropped: of an older attempt than the newest seen, with tokens that are here already, and
    with tokens missing before them. The last kind sets `gap` until the missing tokens have come. The tokens of each
    choice are kept, since the next attempt goes on from them. `ordered`: the frames come from the answer log, which has
    one writer at a time. There a later attempt may have a lower number, and none of its frames is dropped.
    """

    request: InferenceRequest
    on_end: "Callable[[LiveAnswer], None]"
    on_whole: "Callable[[LiveAnswer, Completed], None] | None" = None
    ordered: bool = False
    sequence: int | None = None
    attempt: int = 0
    worker: str | None = None
    begun: bool = False
    gap: bool = False
    completed: Completed | None = None
    error: ApiError | None = None
    held: bool = False
    registered: bool = False
    registration: asyncio.Task[None] | None = None
    cancelling: asyncio.Task[None] | None = None
    _ask_again_at: float = -math.inf
    _tokens: dict[int, list[int]] = field(default_factory=dict)
    _unread: list[Delta] = field(default_factory=list)
    _unread_tokens: int = 0
    _prompt_tokens: int = 0
    _completion_tokens: int = 0
    _changed: asyncio.Future[None] | None = None
    _room: asyncio.Future[None] | None = None

    @property
    def done(self) -> bool:
        """Whether the answer has ended."""
        return self.completed is not None or self.error is not None

    @property
    def outcome(self) -> RequestStatus | None:
        """How the request ended for its client, or None while it has not."""
        if self.completed is not None:
            return RequestStatus.COMPLETED
        if self.error is None:
            return None
        if isinstance(self.error, RequestTimeout) or self.error.code == RequestTimeout.code:
            return RequestStatus.TIMED_OUT
        if isinstance(self.error, WorkerError | InferenceFailed) and self.error.code != RequestCancelled.code:
            return RequestStatus.FAILED
        return RequestStatus.CANCELLED

    @property
    def used(self) -> Usage | None:
        """What the request used so far: the tokens of its prompt, if a worker has said it, and those that have come."""
        return used_so_far(self._prompt_tokens, self._completion_tokens)

    @property
    def unread(self) -> int:
        """The number of deltas that have come and were not read."""
        return len(self._unread)

    def have(self, frame: Frame) -> Resume:
        """What has come so far: the worker that sent `frame` goes on from there, or sends what is missing.

        An attempt is not wanted if a newer one has begun, or one of another worker with the same number. The latter
        happens if the store of the states has lost its last records.
        """
        if self.done:
            return Resume(wanted=False, outcome=self.outcome)
        if frame.attempt < self.attempt or (isinstance(frame, Started) and frame.worker != self.worker):
            return Resume(wanted=False, newest=self.attempt)
        return self._have()

    def _have(self) -> Resume:
        choices = tuple(ResumedChoice(index=index, tokens=tuple(tokens)) for index, tokens in self._tokens.items())
        return Resume(choices=choices)

    def missing(self, now: float) -> Resume | None:
        """What has come so far, if the worker is to be asked at `now` (monotonic seconds) for what is missing."""
        if not self.gap or now < self._ask_again_at:
            return None
        self._ask_again_at = now + RESEND_RETRY_S
        return self._have()

    def receive(self, frame: Frame) -> None:
        """Take the next frame of any attempt."""
        if self.done or (frame.attempt < self.attempt and not self.ordered):
            return
        if frame.attempt != self.attempt:
            self.attempt, self.gap = frame.attempt, False
            self.worker = frame.worker if isinstance(frame, Started) else None
        match frame:
            case Started():
                self.begun |= frame.accepted and frame.worker == self.worker
                self._prompt_tokens = frame.prompt_tokens or self._prompt_tokens
            case Delta():
                self._append(frame)
            case Completed():
                self._complete(frame)
            case Failed():
                self.fail(WorkerError(frame))
        self._wake()

    def finish(self, last: Completed) -> None:
        """End a whole answer, unless it has ended."""
        if not self.done:
            # Deltas without tokens come only in the last frame, which is taken once: so none is repeated.
            self._unread.extend(delta for delta in last.deltas if not delta.tokens)
            self.completed = last
            self.on_end(self)
            self._wake()

    def fail(self, error: ApiError) -> None:
        """End this client's wait with `error`, unless the answer has ended or is held."""
        if not self.done and (not self.held or isinstance(error, ClientLeft)):
            self.error = error
            self.on_end(self)
            self._wake()

    def leave(self) -> None:
        """The client has left."""
        self.fail(ClientLeft("the client left"))

    def time_out(self) -> None:
        """The deadline has passed."""
        seconds = self.request.deadline - self.request.created_at
        self.fail(RequestTimeout(f"the request was not finished within {seconds:g} seconds"))

    async def started(self) -> None:
        """Wait until a worker has begun. Raises the request's error if it ends before that."""
        while not self.begun and not self._unread and self.completed is None:
            await self._wait()

    def take(self) -> list[Delta]:
        """The deltas that have come and were not read."""
        unread, self._unread, self._unread_tokens = self._unread, [], 0
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        return unread

    async def room(self) -> None:
        """Wait while the client has too many tokens to read."""
        if self._unread_tokens > MAX_UNREAD_TOKENS and not self.done:
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """All deltas in order, as many at a time as have come. Raises the request's error if it fails."""
        while True:
            if self._unread:
                yield self.take()
            elif self.completed is not None:
                return
            else:
                await self._wait()

    async def _wait(self) -> None:
        """Wait for the next change. Raises the error, if there is one."""
        if self.error is not None:
            raise self.error
        self._changed = asyncio.get_running_loop().create_future()
        await self._changed

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    def _append(self, delta: Delta) -> None:
        tokens = self._tokens.setdefault(delta.index, [])
        if delta.offset > len(tokens):
            self.gap = True
        elif delta.offset == len(tokens) and delta.tokens:
            tokens.extend(delta.tokens)
            self._completion_tokens += delta.made
            self._unread.append(delta)
            self._unread_tokens += len(delta.tokens)
            self.gap, self._ask_again_at = False, -math.inf
            if self._unread_tokens > MAX_UNREAD_TOKENS and not names.is_logged(self.request.reply_to):
                self.fail(SlowReader("the client does not read its stream"))

    def _complete(self, frame: Completed) -> None:
        for delta in frame.deltas:
            if delta.tokens:
                self._append(delta)
        if all(len(self._tokens.get(choice.index, ())) == choice.tokens for choice in frame.choices):
            (self.on_whole or LiveAnswer.finish)(self, frame)
