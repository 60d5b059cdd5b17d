"""One batch as it runs at this api, from wherever it is to its end.

Nothing is kept here that is not read again after a takeover: what is done stands in the output files, and a line that
was admitted is known by its id.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, cast

from forebay_api.batches import lines
from forebay_api.batches.lines import WrongLine
from forebay_api.batches.output import Kind, Output
from forebay_api.batches.requests import LineRequest, LineRequests
from forebay_api.context import Context
from forebay_api.in_flight.files import File
from forebay_api.in_flight.records import Kept
from forebay_api.openai.batches.record import FINAL, BatchError, BatchRecord, Status
from forebay_contracts.nats import clock
from forebay_contracts.queueing.events import publish_event
from forebay_contracts.queueing.protocols import Superseded
from forebay_contracts.wire.errors import (
    ApiError,
    QueueConflict,
    QueueError,
    QueueUnavailable,
    RequestCancelled,
    RequestTimeout,
)
from forebay_contracts.wire.event import EventType, event
from forebay_contracts.wire.state import Usage

RETRY_S: Final = 0.25
"""Pause before a line is admitted again that found the queue full, or NATS away. Each further one is twice as long."""

MAX_RETRY_S: Final = 4.0
"""Longest such pause."""

REPORT_S: Final = 1.0
"""Pause between two reports of the counts, which also notice a cancel."""

WINDOW_BYTES: Final = 4 * 1024 * 1024
"""Most bytes of lines that are queued or run at once."""

MAX_ERRORS: Final = 20
"""Most errors that a failed batch tells."""

_STOPS: Final = {
    "batch_cancelled": "The batch was cancelled before this request could be executed.",
    "batch_expired": "This request could not be executed before the completion window expired.",
}

log = logging.getLogger(__name__)


class Run:
    """Runs `record`, which was read at `revision`, as `name`. No other run of the batch has this name."""

    def __init__(self, context: Context, record: BatchRecord, revision: int, name: str) -> None:
        self._context = context
        self._record = record
        self._revision = revision
        self._name = name
        self._saving = asyncio.Lock()
        self._output = Output(context.files, record)
        self._requests = LineRequests(context, record)
        self._cancelled = record.status == "cancelling"
        self._landed = asyncio.Event()
        self._flying: dict[int, LineRequest] = {}
        """The lines that are queued or run, by number."""
        self._flying_bytes = 0
        # An earlier run may have admitted so many lines, in order, that are not done.
        self._unsure = record.window if record.run else 0

    async def run(self) -> None:
        """Run it to its end.

        Raises:
            Superseded: another api runs it.
            QueueConflict: another api wrote into its files, before this one was its owner.
            QueueUnavailable: NATS does not answer.
        """
        await self._save(lambda record: record.model_copy(update={"run": self._name}), claim=True)
        work = [asyncio.create_task(self._to_its_end()), asyncio.create_task(self._report())]
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except QueueConflict:
            self._take(await self._context.batches.get(self._record.id))
            raise
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            await self._output.close()

    @property
    def _stop(self) -> str | None:
        """Why no further line is admitted, if that is so."""
        if self._cancelled:
            return "batch_cancelled"
        return "batch_expired" if clock.now() >= self._record.expires_at else None

    async def _to_its_end(self) -> None:
        if self._unsure:
            # By then an earlier run that is still there has noticed this one, and admits nothing more.
            await asyncio.sleep(2 * REPORT_S)
            await self._output.take_over()
        file = await self._context.files.get(self._record.input_file_id)
        errors: list[BatchError] = []
        if file is None:
            errors = [BatchError(code="file_not_found", message="The input file was deleted.", param="input_file_id")]
        elif "in_progress" not in self._record.times:
            errors = await self._validate(file)
        if file is None or errors:
            await self._close("failed", errors=tuple(errors))
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
            if self._stop:
                continue
            try:
                line = lines.parsed(data, self._requests.endpoint.path)
                unique.check(line.custom_id)
            except WrongLine as exc:
                wrong += 1
                first += [BatchError(code=exc.code, message=str(exc), line=number)][: MAX_ERRORS - len(first)]
                await self._put(number, lines.error_line(self._id(number), exc.custom_id, exc.code, str(exc)))
                continue
            try:
                asked = await self._requests.check(line)
                model = model or asked
            except ApiError as exc:
                await self._put(number, self._failure(number, line.custom_id, exc))
        await self._output.flush()
        if number == 0:
            return [BatchError(code="empty_file", message="The input file has no requests.")]
        await self._save(lambda record: _counted(record, self._output, total=number, model=model))
        if wrong == number:
            return first
        await self._save(lambda record: record if self._cancelled else record.to("in_progress"))
        log.info("[Batches] %s begins: %d requests", self._record.id, number)
        return []

    def _lines(self, file: File) -> AsyncIterator[tuple[int, bytes | None]]:
        most = self._context.settings.max_request_bytes + lines.ENVELOPE_BYTES
        return lines.read(self._context.files.content(file), most)

    def _id(self, number: int) -> str:
        return self._requests.id_of(number)

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
        line = lines.parsed(data, self._requests.endpoint.path)
        size, pause_s, sure, known = len(line.body), RETRY_S, self._unsure <= 0, False
        while len(self._flying) >= self._record.window or (self._flying and self._flying_bytes + size > WINDOW_BYTES):
            self._landed.clear()
            await self._landed.wait()
        while True:
            try:
                known = not sure and await self._context.carried.known(self._id(number))
                if self._stop and not known:
                    break
                ready = await self._requests.prepare(number, line)
                ended = await self._context.carried.carry(ready.request, fresh=sure)
            except QueueError as exc:
                log.debug("[Batches] %s waits: %s", self._record.id, exc)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_RETRY_S)
            except ApiError as exc:
                return await self._put(number, self._failure(number, line.custom_id, exc))
            else:
                self._unsure = self._record.window if known else self._unsure - 1
                self._flying[number] = ready
                self._flying_bytes += size
                group.create_task(self._follow(ready, size, ended))
                return None
        return await self._put(number, self._unrun(number, line.custom_id, self._stop))

    def _unrun(self, number: int, custom_id: str, reason: str) -> bytes:
        return lines.error_line(self._id(number), custom_id, reason, _STOPS[reason])

    async def _follow(self, ready: LineRequest, size: int, ended: "asyncio.Task[None]") -> None:
        """Wait for the end of a line, and write it."""
        try:
            if self._cancelled:
                await self._cancel(ready)
            await asyncio.wait([ended])
            kind, line, usage = await self._written(ready)
            await self._output.add(kind, ready.number, line, usage)
            await self._context.carried.free(ready.request.id)
        finally:
            del self._flying[ready.number]
            self._flying_bytes -= size
            self._landed.set()

    async def _written(self, ready: LineRequest) -> tuple[Kind, bytes, Usage | None]:
        """What is written of a line that has ended."""
        while True:
            try:
                line, usage = await self._requests.answer(ready)
            except QueueUnavailable as exc:
                log.debug("[Batches] %s: %s", self._record.id, exc)
                await asyncio.sleep(RETRY_S)
            except ApiError as exc:
                if self._cancelled and exc.code == RequestCancelled.code:
                    return "error", self._unrun(ready.number, ready.custom_id, "batch_cancelled"), None
                if exc.code == RequestTimeout.code:
                    return "error", self._unrun(ready.number, ready.custom_id, "batch_expired"), None
                return "error", self._failure(ready.number, ready.custom_id, exc), None
            else:
                return "output", line, usage

    async def _cancel(self, ready: LineRequest) -> None:
        with contextlib.suppress(ApiError):  # then it runs to its end
            await self._context.carried.cancel(ready.request, "its batch was cancelled")

    async def _end(self) -> None:
        await self._save(lambda record: record if self._cancelled else record.to("finalizing"))
        late = clock.now() >= self._record.expires_at and self._output.failed > 0
        await self._close("cancelled" if self._cancelled else "expired" if late else "completed")

    async def _close(self, status: Status, **changes: Any) -> None:
        """Make the files, and end the batch."""
        made = await self._output.finish()
        changes |= {f"{kind}_file_id": name for kind, name in made.items()}
        await self._announce(status)
        await self._save(lambda record: _counted(record, self._output).to(status, **changes))
        log.info("[Batches] %s %s", self._record.id, status)

    async def _announce(self, status: Status) -> None:
        """Tell the webhooks, before the end is kept: if this api dies in between, the next one says the same."""
        record, context = self._record, self._context
        if context.webhooks.wanted(record.key, "batch"):
            kind = cast(EventType, f"batch.{status}")
            await publish_event(context.connection.requests, event(kind, record.id, clock.now(), record.key))

    async def _report(self) -> None:
        """Have the record say how far it is, and notice a cancel."""
        told = False
        while True:
            await asyncio.sleep(REPORT_S)
            try:
                self._take(await self._context.batches.get(self._record.id))
                if "in_progress" in self._record.times and _counted(self._record, self._output) != self._record:
                    await self._save(lambda record: _counted(record, self._output))
            except QueueUnavailable as exc:
                log.debug("[Batches] %s: %s", self._record.id, exc)
            if self._cancelled and not told:
                told = True
                await asyncio.gather(*map(self._cancel, self._flying.values()))

    async def _save(self, change: Callable[[BatchRecord], BatchRecord], *, claim: bool = False) -> None:
        """Change the record, by compare-and-set. `claim`: whoever ran it."""
        async with self._saving:
            while True:
                try:
                    changed = change(self._record)
                    self._revision = await self._context.batches.put(changed, self._revision)
                    self._record = changed
                    return
                except QueueConflict:
                    self._take(await self._context.batches.get(self._record.id), claim=claim)
                except QueueUnavailable as exc:
                    log.debug("[Batches] %s: %s", self._record.id, exc)
                    await asyncio.sleep(RETRY_S)

    def _take(self, kept: Kept[BatchRecord] | None, *, claim: bool = False) -> None:
        """Go on with the record as it is now. Raises Superseded if another api runs the batch."""
        if kept is None or kept.record.status in FINAL or not (claim or kept.record.run == self._name):
            raise Superseded
        self._record, self._revision = kept.record, kept.revision
        self._cancelled = kept.record.status == "cancelling"


def _counted(record: BatchRecord, output: Output, **changes: Any) -> BatchRecord:
    """The record with the counts of what is written."""
    counts = {"completed": output.completed, "failed": output.failed, "usage": output.usage}
    return record.model_copy(update={**counts, **changes})
