"""The logged reply channel: the frames of one attempt into the answer log, which keeps them for any reader."""

import asyncio
import logging
import time
import uuid
from collections.abc import Sequence
from typing import Final

from forebay_contracts.nats import clock
from forebay_contracts.queueing.protocols import AnswerLog, Record, Superseded
from forebay_contracts.wire.errors import AnswerLogFull, AnswerTaken, ApiError, QueueUnavailable
from forebay_contracts.wire.frames import (
    Completed,
    Delta,
    Failed,
    Resume,
    ResumedChoice,
    Started,
    decode_frame,
    failed,
    outcome_of,
)
from forebay_contracts.wire.state import RequestStatus, Usage, used_so_far

COLLECT_S: Final = 0.02
"""Frames of this time go into one record."""

MAX_COLLECTED: Final = 1_000
"""The attempt waits if so many frames are not stored yet."""

APPEND_RETRY_S: Final = 0.25
"""Pause between two tries while NATS is away or the log is full."""

APPEND_GRACE_S: Final = 20.0
"""How long after the deadline the end of an answer is still tried."""

log = logging.getLogger(__name__)


class LoggedReplyChannel:
    """See `ReplyChannel`. Each record follows the last one that this attempt has read or written.

    Whoever wants to end the answer otherwise writes its last frame into the log. So the log decides how it ends.
    """

    lossless = True

    def __init__(self, answers: AnswerLog, request_id: str, deadline: float) -> None:
        self._answers = answers
        self._request_id = request_id
        self._give_up_at = deadline + APPEND_GRACE_S
        self._writer = uuid.uuid4().hex[:8]
        self._last = 0
        self._records = 0
        self._started: bytes | None = None
        self._collected: list[bytes] = []
        self._stored_at = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        self._storing: asyncio.Task[None] | None = None

    async def send(self, frame: bytes) -> None:
        """Collect a frame. Raises Superseded, or QueueUnavailable, if those before it could not be stored."""
        if self._storing is not None and (self._storing.done() or len(self._collected) >= MAX_COLLECTED):
            await self._stored()
        if self._records == 0 and not self._collected:
            self._started = frame
        self._collected.append(frame)
        self._store_soon()

    def _store_soon(self) -> None:
        """Store what is collected, COLLECT_S after the last record was begun."""
        if self._collected and self._storing is None and self._timer is None:
            delay_s = self._stored_at + COLLECT_S - time.monotonic()
            self._timer = asyncio.get_running_loop().call_later(max(delay_s, 0), self._store)

    def _store(self) -> None:
        self._timer = None
        self._storing = asyncio.create_task(self._store_collected())
        self._storing.add_done_callback(self._has_stored)

    def _has_stored(self, storing: asyncio.Task[None]) -> None:
        # A failure stays, for the next frame to find.
        if storing is self._storing and not storing.cancelled() and storing.exception() is None:
            self._storing = None
            self._store_soon()

    async def _store_collected(self, *last: bytes) -> None:
        frames, self._collected = (*self._collected, *last), []
        if frames[0] is not self._started:  # the first token must not wait for it
            self._stored_at = time.monotonic()
        await self._append(frames)

    async def _stored(self) -> None:
        """Wait for the record that is being stored."""
        if (storing := self._storing) is not None:
            try:
                await asyncio.shield(storing)
            except AnswerTaken as exc:
                raise Superseded(f"{self._request_id}: another attempt answers it") from exc
            self._has_stored(storing)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _quiet(self) -> None:
        """Wait until no record is being stored. None begins by itself: the end of the last one has set the timer."""
        while self._storing is not None:
            await self._stored()
        self._cancel_timer()

    async def flush(self) -> None:
        """Store what is collected. Raises Superseded."""
        await self._quiet()
        while self._collected:
            self._store()
            await self._quiet()

    async def ask(self, frame: bytes) -> Resume:
        """Read what the log has and go on from there, or end the answer. Raises Superseded."""
        decoded = decode_frame(frame)
        if isinstance(decoded, Completed | Failed):
            return await self._end(frame, decoded)
        return await self._resume(frame)

    async def _resume(self, started: bytes) -> Resume:
        while True:
            records = await self._read()
            resume = have(records)
            if not resume.wanted:
                return resume
            self._last = records[-1].sequence if records else 0
            try:
                await self._append([started])
            except AnswerTaken:
                continue  # what was read was old
            return resume

    async def _end(self, frame: bytes, decoded: Completed | Failed) -> Resume:
        self._cancel_timer()
        if isinstance(decoded, Failed) and not self._records:
            # It ends before it has generated, so it has not read what attempts before it wrote.
            records = await self._read()
            if not (resume := have(records)).wanted:
                return resume
            self._last = records[-1].sequence if records else 0
        try:
            await self._quiet()
            await self._store_collected(frame)
        except (AnswerTaken, Superseded):
            resume = have(await self._read())
            if resume.wanted:
                raise Superseded(f"{self._request_id}: another attempt answers it") from None
            return resume
        return Resume(wanted=False, outcome=outcome_of(decoded))

    async def _append(self, frames: Sequence[bytes]) -> None:
        name = f"{self._writer}.{self._records}"
        self._records += 1
        while True:
            try:
                self._last = await self._answers.append(self._request_id, frames, self._last, name)
                return
            except (QueueUnavailable, AnswerLogFull) as exc:
                if clock.now() > self._give_up_at:
                    raise
                log.debug("%s: not stored yet: %s", self._request_id, exc)
                await asyncio.sleep(APPEND_RETRY_S)

    async def _read(self) -> list[Record]:
        while True:
            try:
                return await self._answers.read(self._request_id)
            except QueueUnavailable:
                if clock.now() > self._give_up_at:
                    raise
                await asyncio.sleep(APPEND_RETRY_S)


async def end_answer(answers: AnswerLog, request_id: str, error: ApiError) -> tuple[RequestStatus, Usage | None]:
    """End an answer with `error`, unless it has ended; returns how it ended, and what was used.

    Raises:
        QueueUnavailable, AnswerLogFull: it may not have ended.
    """
    while True:
        records = await answers.read(request_id)
        last, attempt = (records[-1].sequence, decode_frame(records[-1].frames[-1]).attempt) if records else (0, 1)
        if (outcome := have(records).outcome) is not None:
            return outcome, _used(records)
        frame = failed(attempt, error)
        try:
            await answers.append(request_id, [frame.encode()], last, f"end.{uuid.uuid4().hex[:8]}")
        except AnswerTaken:
            continue
        return outcome_of(frame), _used(records)


def _used(records: Sequence[Record]) -> Usage | None:
    """What an answer used that did not become whole."""
    frames = [decode_frame(frame) for record in records for frame in record.frames]
    prompts = [frame.prompt_tokens for frame in frames if isinstance(frame, Started)]
    return used_so_far(max(prompts, default=0), sum(frame.made for frame in frames if isinstance(frame, Delta)))


def have(records: Sequence[Record]) -> Resume:
    """What a reader of these records has: the tokens of each choice, or how the answer has ended."""
    tokens: dict[int, list[int]] = {}
    for record in records:
        for frame in map(decode_frame, record.frames):
            match frame:
                case Delta():
                    held = tokens.setdefault(frame.index, [])
                    if frame.offset == len(held):  # else RESPONSE_TTL has removed the tokens before it
                        held.extend(frame.tokens)
                case Completed():
                    return Resume(wanted=False, outcome=outcome_of(frame), usage=frame.usage, cut=frame.cut)
                case Failed():
                    return Resume(wanted=False, outcome=outcome_of(frame))
                case Started():
                    pass
    return Resume(choices=tuple(ResumedChoice(index=index, tokens=tuple(some)) for index, some in tokens.items()))
