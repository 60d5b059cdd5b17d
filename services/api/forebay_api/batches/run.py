"""One batch as it runs at this api, from wherever it is to its end.

Nothing is kept here that is not read again after a takeover: what is done stands in the output files, and a line that
was admitted is known by its id.
"""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator
from typing import Any, Final

from forebay_api.batches import lines
from forebay_api.batches.lines import WrongLine
from forebay_api.batches.output import Kind, Output
from forebay_api.batches.owned import OwnedRecord, Stop, counted
from forebay_api.batches.requests import LineRequest, LineRequests
from forebay_api.context import Context
from forebay_api.in_flight.files import File
from forebay_api.in_flight.records import Kept
from forebay_api.openai.batches.record import BatchError, BatchRecord, Status
from forebay_contracts.nats import clock
from forebay_contracts.wire.errors import (
    ApiError,
    KeyLimitReached,
    QueueConflict,
    QueueError,
    QueueUnavailable,
    RequestCancelled,
    RequestTimeout,
)
from forebay_contracts.wire.state import Usage

RETRY_S: Final = 0.25
"""Pause before a line is admitted again that found the queue full, or NATS away. Each further one is twice as long."""

MAX_RETRY_S: Final = 4.0
"""Longest such pause."""

REPORT_S: Final = 1.0
"""Pause between two reports of the counts, which also notice a cancel."""

WINDOW_BYTES: Final = 4 * 1024 * 1024
"""Most bytes of lines that are queued or run at once."""

TURN_LINES: Final = 32
"""So many lines are validated in one turn of the event loop: a line takes 30 us or more."""

READ_AT_ONCE: Final = 4
"""Most answers that are held whole at a time."""

MAX_ERRORS: Final = 20
"""Most errors that a failed batch tells."""

_NOT_RUN: Final[dict[Stop, str]] = {
    "cancelled": "The batch was cancelled before this request could be executed.",
    "expired": "This request could not be executed before the completion window expired.",
}

log = logging.getLogger(__name__)


class Run:
    """Runs a batch, as it was read, under a `name` that no other run of it has."""

    def __init__(self, context: Context, kept: Kept[BatchRecord], name: str) -> None:
        self._context = context
        self._batch = OwnedRecord(context.batches, kept, name)
        self._output = Output(context.files, kept.record)
        self._requests = LineRequests(context, kept.record)
        self._one_ended = asyncio.Event()
        self._in_flight: dict[int, LineRequest] = {}
        """The lines that are queued or run, by number."""
        self._in_flight_bytes = 0
        self._maybe_admitted = 0
        """An earlier run may have admitted so many of the next lines that are not done."""
        self._reading = asyncio.Semaphore(READ_AT_ONCE)

    async def run(self) -> None:
        """Run it to its end.

        Raises:
            Superseded: another api runs it.
            QueueConflict: another api wrote into its files, before this one was its owner.
            QueueUnavailable: NATS does not answer.
        """
        if await self._batch.claim():
            # Each run admits the lines in order, and at most so many that have not ended.
            self._maybe_admitted = self._batch.record.window
        work = [asyncio.create_task(self._to_its_end()), asyncio.create_task(self._report())]
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except QueueConflict:
            await self._batch.read()
            raise
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            await self._output.close()

    async def _to_its_end(self) -> None:
        if self._maybe_admitted:
            # By then an earlier run that is still there has noticed this one, and admits nothing more.
            await asyncio.sleep(2 * REPORT_S)
            await self._output.take_over()
        file = await self._context.files.get(self._batch.record.input_file_id)
        errors: list[BatchError] = []
        if file is None:
            errors = [BatchError(code="file_not_found", message="The input file was deleted.", param="input_file_id")]
        elif "in_progress" not in self._batch.record.times:
            errors = await self._validate(file)
        if file is None or errors:
            await self._cancel_admitted()
            await self._close((file is None and self._batch.stop) or "failed", errors=tuple(errors))
            return
        await self._execute(file)
        await self._end()

    async def _validate(self, file: File) -> list[BatchError]:
        """Count the lines, and have the wrong ones in the error file. Returns why the batch cannot run at all."""
        unique, wrong, first, model, number = lines.Uniqueness(), 0, list[BatchError](), None, 0
        async for number, data in self._lines(file):
            if number > lines.MAX_LINES:
                await self._output.discard()
                message = f"A batch has at most {lines.MAX_LINES} requests."
                return [BatchError(code="too_many_requests", message=message, line=number)]
            if self._batch.stop:
                continue
            if number % TURN_LINES == 0:
                await asyncio.sleep(0)
            try:
                line = lines.parsed(data, self._requests.endpoint.path)
                unique.check(line.custom_id)
            except WrongLine as exc:
                wrong += 1
                first += [BatchError(code=exc.code, message=str(exc), line=number)][: MAX_ERRORS - len(first)]
                await self._put(number, self._wrong(number, exc))
                continue
            try:
                asked = await self._requests.check(line)
                model = model or asked
            except ApiError as exc:
                await self._put(number, self._failure(number, line.custom_id, exc))
        await self._output.flush()
        if number == 0:
            return [BatchError(code="empty_file", message="The input file has no requests.")]
        await self._batch.save(lambda record: counted(record, self._output, total=number, model=model))
        if wrong == number:
            return first
        await self._batch.save(lambda record: record if self._batch.cancelled else record.to("in_progress"))
        log.info("[Batches] %s begins: %d requests", self._batch.record.id, number)
        return []

    def _lines(self, file: File) -> AsyncIterator[tuple[int, bytes | None]]:
        most = self._context.settings.max_request_bytes + lines.ENVELOPE_BYTES
        return lines.read(self._context.files.content(file), most)

    def _id(self, number: int) -> str:
        return self._requests.id_of(number)

    def _wrong(self, number: int, exc: WrongLine) -> bytes:
        return lines.error_line(self._id(number), exc.custom_id, exc.code, str(exc))

    def _failure(self, number: int, custom_id: str, error: ApiError) -> bytes:
        return lines.failure_line(self._id(number), custom_id, self._requests.endpoint, error)

    async def _put(self, number: int, line: bytes) -> None:
        """Have a line in the error file, unless it was written by an earlier run."""
        if not self._output.has(number) and self._output.put("error", number, line):
            await self._output.flush()

    async def _execute(self, file: File) -> None:
        """Admit the lines that are not done, in order, and write what they end with."""
        try:
            async with asyncio.TaskGroup() as group:
                async for number, data in self._lines(file):
                    if not self._output.has(number):
                        await self._line(group, number, data)
        except ExceptionGroup as exc:
            raise exc.exceptions[0] from exc
        await self._output.flush()

    async def _line(self, group: asyncio.TaskGroup, number: int, data: bytes | None) -> None:
        try:
            line = lines.parsed(data, self._requests.endpoint.path)
        except WrongLine as exc:  # nothing was validated, since the batch had to stop
            return await self._put(number, self._wrong(number, exc))
        size, pause_s, sure = len(data or b""), RETRY_S, self._maybe_admitted <= 0
        await self._window(size)
        while True:
            try:
                known = not sure and await self._context.carried.known(self._id(number))
                if not known and (stop := self._batch.stop):
                    return await self._put(number, self._not_run(number, line.custom_id, stop))
                if not known:
                    self._context.limits.check_tokens(self._batch.record.key)
                ready = await self._requests.prepare(number, line)
                ended = await self._context.carried.carry(ready.request, fresh=sure)
            except (QueueError, KeyLimitReached) as exc:
                log.debug("[Batches] %s waits: %s", self._batch.record.id, exc)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_RETRY_S)
            except ApiError as exc:
                return await self._put(number, self._failure(number, line.custom_id, exc))
            else:
                self._maybe_admitted = self._batch.record.window if known else self._maybe_admitted - 1
                self._in_flight[number] = ready
                self._in_flight_bytes += size
                group.create_task(self._follow(ready, size, ended))
                return None

    async def _window(self, size: int) -> None:
        """Wait until a line of `size` bytes may be admitted."""
        window = self._batch.record.window
        while self._in_flight and (len(self._in_flight) >= window or self._in_flight_bytes + size > WINDOW_BYTES):
            self._one_ended.clear()
            await self._one_ended.wait()

    def _not_run(self, number: int, custom_id: str, why: Stop) -> bytes:
        return lines.error_line(self._id(number), custom_id, f"batch_{why}", _NOT_RUN[why])

    async def _follow(self, ready: LineRequest, size: int, ended: "asyncio.Task[None]") -> None:
        """Wait for the end of a line, and write it."""
        try:
            if self._batch.cancelled:
                await self._cancel(ready)
            await asyncio.wait([ended])
            kind, line, usage = await self._written(ready)
            await self._output.add(kind, ready.number, line, usage)
            self._context.carried.free(ready.request.id)
        finally:
            del self._in_flight[ready.number]
            self._in_flight_bytes -= size
            self._one_ended.set()

    async def _written(self, ready: LineRequest) -> tuple[Kind, bytes, Usage | None]:
        """What is written of a line that has ended."""
        while True:
            try:
                async with self._reading:
                    await self._output.room()
                    line, usage = await self._requests.answer(ready)
            except QueueUnavailable as exc:
                log.debug("[Batches] %s: %s", self._batch.record.id, exc)
                await asyncio.sleep(RETRY_S)
            except ApiError as exc:
                if self._batch.cancelled and exc.code == RequestCancelled.code:
                    return "error", self._not_run(ready.number, ready.custom_id, "cancelled"), None
                if exc.code == RequestTimeout.code:
                    return "error", self._not_run(ready.number, ready.custom_id, "expired"), None
                return "error", self._failure(ready.number, ready.custom_id, exc), None
            else:
                return "output", line, usage

    async def _cancel(self, ready: LineRequest) -> None:
        with contextlib.suppress(ApiError):  # then it runs to its end
            await self._context.carried.cancel(ready.request, "its batch was cancelled")

    async def _cancel_admitted(self) -> None:
        """Cancel the lines that an earlier run has admitted: nobody will read their answers."""
        left = (number for number in range(1, self._batch.record.total + 1) if not self._output.has(number))
        for number in itertools.islice(left, self._maybe_admitted):
            with contextlib.suppress(ApiError):
                await self._context.dispatcher.cancel(self._id(number), "its batch has ended")

    async def _end(self) -> None:
        await self._batch.save(lambda record: record if self._batch.cancelled else record.to("finalizing"))
        late = clock.now() >= self._batch.record.expires_at and self._output.failed > 0
        await self._close("cancelled" if self._batch.cancelled else "expired" if late else "completed")

    async def _close(self, status: Status, **changes: Any) -> None:
        """Make the files, and end the batch."""
        made = await self._output.finish()
        changes |= {f"{kind}_file_id": name for kind, name in made.items()}
        if self._context.webhooks.wanted(self._batch.record.key, "batch"):
            # Before the end is kept: if this api dies in between, the next one says the same.
            await self._context.batches.announce(self._batch.record, status)
        await self._batch.save(lambda record: counted(record, self._output).to(status, **changes))
        log.info("[Batches] %s %s", self._batch.record.id, status)

    async def _report(self) -> None:
        """Have the record say how far it is, and notice a cancel."""
        told = False
        while True:
            await asyncio.sleep(REPORT_S)
            try:
                await self._batch.read()
                record = self._batch.record
                if "in_progress" in record.times and counted(record, self._output) != record:
                    await self._batch.save(lambda record: counted(record, self._output))
            except QueueUnavailable as exc:
                log.debug("[Batches] %s: %s", self._batch.record.id, exc)
            if self._batch.cancelled and not told:
                told = True
                await asyncio.gather(*map(self._cancel, self._in_flight.values()))
