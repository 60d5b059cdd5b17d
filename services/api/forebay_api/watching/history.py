"""The last hour of the queue, which each api process samples whether somebody looks or not."""

import asyncio
import contextlib
import heapq
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from forebay_contracts.nats import clock
from forebay_contracts.queueing.status import QueueStatus
from forebay_contracts.queueing.usage import UsageRow
from forebay_contracts.wire.errors import QueueUnavailable
from forebay_contracts.wire.heartbeats import WorkerInfo, WorkerStatus

SECONDS: Final = 3600
"""So far back goes the history."""

SAMPLE_S: Final = 10
"""Time between two samples of the queue; one takes NATS eight requests."""

USAGE_S: Final = 60
"""Time between two samples of what keys used."""

MAX_SERIES: Final = 32
"""Most models, and most keys, of one sample: those with the most."""

MAX_MARKS: Final = 100
"""Most events that are kept: workers that came or went, limits that changed, NATS that was away."""

NUMBERS: Final = ("waiting", "processing", "deferred", "completed", "failed", "cancelled", "workers_ready")
"""What a sample has of the whole queue. `completed`, `failed` and `cancelled` are totals since it was first started."""

LINES: Final = ("waiting", "processing", "deferred")
"""What a sample has of each model."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The queue at a time. Without `numbers`, NATS was away."""

    at: float
    numbers: tuple[int, ...] | None = None
    models: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Used:
    """What each model and key used between the sample before and `at`: requests, tokens, seconds in the queue."""

    at: float
    rows: dict[tuple[str, str | None], tuple[float, ...]]


class History:
    """Samples and marks, oldest first. `numbers` and `usage` raise QueueUnavailable; `usage` is of today."""

    def __init__(
        self,
        numbers: Callable[[], Awaitable[QueueStatus]],
        workers: Callable[[], Iterable[WorkerInfo]],
        usage: Callable[[], Awaitable[list[UsageRow]]],
    ) -> None:
        self._read_numbers = numbers
        self._read_workers = workers
        self._read_usage = usage
        self._known_workers: dict[str, WorkerInfo] | None = None
        self._known_limits: dict[str, tuple[int, bool]] = {}
        self._used: dict[tuple[str | None, ...], tuple[float, ...]] | None = None
        self._away = False
        self.samples: deque[Sample] = deque(maxlen=SECONDS // SAMPLE_S)
        self.used: deque[Used] = deque(maxlen=SECONDS // USAGE_S)
        self.marks: deque[dict[str, Any]] = deque(maxlen=MAX_MARKS)

    @contextlib.asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        """Sample while the block lasts."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()

    async def _run(self) -> None:
        usage_due = 0.0
        while True:
            now = clock.now()
            await self.sample()
            if now >= usage_due:
                usage_due = now + USAGE_S
                with contextlib.suppress(QueueUnavailable):
                    self._note_usage(await self._read_usage())
            await asyncio.sleep(SAMPLE_S)

    async def sample(self) -> None:
        """Take one sample of the queue now, and mark what has changed since the last one."""
        try:
            status = await self._read_numbers()
        except QueueUnavailable:
            self.samples.append(Sample(clock.now()))
            if not self._away:
                self._mark("nats_away", "NATS cannot be reached")
            self._away = True
            return
        if self._away:
            self._mark("nats_back", "NATS answers again")
            self._away = False
        most = heapq.nlargest(MAX_SERIES, status.models, key=lambda line: line.waiting + line.processing)
        numbers = (
            *(status.queue_size, status.processing_count, status.deferred, status.total_processed),
            *(status.total_failed, status.total_cancelled, status.workers_ready),
        )
        lines = {line.model: (line.waiting, line.processing, line.deferred) for line in most}
        self.samples.append(Sample(clock.now(), numbers, lines))
        self._note_workers({worker.id: worker for worker in self._read_workers()})
        self._note_limits(status)

    def _mark(self, what: str, text: str) -> None:
        self.marks.append({"at": clock.now(), "what": what, "text": text})

    def _note_workers(self, workers: dict[str, WorkerInfo]) -> None:
        known, self._known_workers = self._known_workers, workers
        if known is None:
            return
        for one in known.keys() - workers.keys():
            drained = known[one].status is WorkerStatus.DRAINING
            self._mark(*(("worker_left", f"{one} has drained") if drained else ("worker_lost", f"{one} is gone")))
        for one in workers.keys() - known.keys():
            self._mark("worker_joined", f"{one} serves {workers[one].model}")

    def _note_limits(self, status: QueueStatus) -> None:
        known = self._known_limits
        self._known_limits = {
            line.model: (line.max_concurrent, line.paused_until is not None) for line in status.models
        }
        self._known_limits[""] = (status.max_queue_size, False)
        for model, (limit, paused) in self._known_limits.items():
            before, was_paused = known.get(model, (limit, paused))
            if limit != before:
                name = f"MAX_CONCURRENT_REQUESTS of {model}" if model else "MAX_QUEUE_SIZE"
                self._mark("limit_changed", f"{name}: {before} → {limit}")
            if paused != was_paused:
                self._mark("paused" if paused else "resumed", f"{model} {'is paused' if paused else 'is resumed'}")

    def _note_usage(self, rows: list[UsageRow]) -> None:
        now: dict[tuple[str | None, ...], tuple[float, ...]] = {
            (row.day, row.model, row.key): (row.requests, row.tokens, row.queue_seconds) for row in rows
        }
        before, self._used = self._used, now
        if before is None:
            return
        grown: dict[tuple[str, str | None], tuple[float, ...]] = {}
        for counter, counts in now.items():
            new = tuple(a - b for a, b in zip(counts, before.get(counter, (0, 0, 0.0)), strict=True))
            if new[0]:
                grown[counter[1] or "", counter[2]] = new
        most = heapq.nlargest(MAX_SERIES, grown.items(), key=lambda row: row[1][1])
        self.used.append(Used(clock.now(), dict(most)))


def columns(samples: list[Sample]) -> dict[str, Any]:
    """The samples in columns, null where nothing is known."""
    models = sorted({model for sample in samples for model in sample.models})

    def column(values: Iterable[tuple[int, ...] | None], place: int) -> list[int | None]:
        return [None if value is None else value[place] for value in values]

    return {
        "at": [round(sample.at, 1) for sample in samples],
        **{name: column([one.numbers for one in samples], place) for place, name in enumerate(NUMBERS)},
        "models": {
            model: {
                name: column((sample.models.get(model) for sample in samples), place)
                for place, name in enumerate(LINES)
            }
            for model in models
        },
    }
