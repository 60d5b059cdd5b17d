"""The text of `/metrics`: what this api measured, and the gauges of the queue, read from NATS."""

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from forebay_contracts.nats.connection import Connection
from forebay_contracts.queueing.answer_log import LogSize
from forebay_contracts.queueing.status import QueueStatus
from forebay_contracts.queueing.usage import UsageRow
from forebay_contracts.telemetry.metrics import REGISTRY
from forebay_contracts.wire.errors import QueueUnavailable
from forebay_contracts.wire.heartbeats import WorkerInfo, WorkerStatus

REFRESH_S = 1.0
"""Scrapes within so long of each other get the same gauges, so that many scrapers cost NATS no more than one."""

MULTIPROCESS_DIR: Final = "PROMETHEUS_MULTIPROC_DIR"
"""The folder in which the processes of one api count (a variable of prometheus_client)."""


class QueueGauges(Collector):
    """The newest numbers as metrics. They describe the whole deployment, so every api shows the same."""

    def __init__(self) -> None:
        self.status: QueueStatus | None = None
        """None if NATS did not answer."""
        self.answers: LogSize | None = None
        """None if NATS did not answer."""
        self.batches: tuple[int, int] | None = None
        """How many batches wait, and how many run. None if NATS did not answer."""
        self.used: list[UsageRow] = []
        """What was used today, by model and key."""
        self.workers: tuple[WorkerInfo, ...] = ()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Names and values."""
        gauge, lines = GaugeMetricFamily, self.status.models if self.status else ()
        up = gauge("forebay_queue_up", "Whether NATS answers (1) or not (0)", float(self.status is not None))
        max_size = gauge("forebay_queue_max_size", "MAX_QUEUE_SIZE of the live stream")
        if self.status:
            max_size.add_metric([], self.status.max_queue_size)
        waiting = gauge("forebay_queue_waiting", "Requests that wait for a slot", labels=["model"])
        processing = gauge("forebay_queue_processing", "Requests that workers have", labels=["model"])
        max_concurrent = gauge(
            "forebay_queue_max_concurrent", "MAX_CONCURRENT_REQUESTS of the live consumer", labels=["model"]
        )
        for line in lines:
            waiting.add_metric([line.model], line.waiting)
            processing.add_metric([line.model], line.processing)
            max_concurrent.add_metric([line.model], line.max_concurrent)
        deferred = gauge("forebay_queue_deferred", "Requests in the waiting room", labels=["model"])
        for line in lines:
            deferred.add_metric([line.model], line.deferred)
        batches = gauge(
            "forebay_batches", "Batches that have not ended: waiting for an api, or running at one", labels=["status"]
        )
        for state, number in zip(("waiting", "running"), self.batches or (), strict=False):
            batches.add_metric([state], number)
        workers = gauge("forebay_workers", "Workers that are loading, ready or draining", labels=["model", "status"])
        for model in sorted({line.model for line in lines} | {worker.model for worker in self.workers}):
            for status in WorkerStatus:
                count = sum(worker.model == model and worker.status is status for worker in self.workers)
                workers.add_metric([model, status.value], count)
        used = gauge("forebay_answer_log_bytes", "Bytes of stored answers and of what was asked for")
        most = gauge(
            "forebay_answer_log_max_bytes",
            "The live limit of these bytes: ANSWER_LOG_BYTES, or less if the NATS account stores less",
        )
        if self.answers:
            used.add_metric([], self.answers.used)
            most.add_metric([], self.answers.most)
        yield from (up, max_size, waiting, processing, max_concurrent, deferred, batches, workers, used, most)
        yield from self._usage()

    def _usage(self) -> Iterator[GaugeMetricFamily]:
        labels = ["model", "key"]
        requests = GaugeMetricFamily(
            "forebay_usage_today_requests",
            "Requests that have ended since midnight (UTC); key is empty without a key",
            labels=labels,
        )
        tokens = GaugeMetricFamily(
            "forebay_usage_today_tokens",
            "Tokens that these requests took (input; of them from a cache: cached) and made (output)",
            labels=[*labels, "direction"],
        )
        seconds = GaugeMetricFamily(
            "forebay_usage_today_queue_seconds", "Time that these requests waited for a worker", labels=labels
        )
        for row in self.used:
            who = [row.model or "", row.key or ""]
            requests.add_metric(who, row.requests)
            seconds.add_metric(who, row.queue_seconds)
            counts = {"input": row.prompt_tokens, "cached": row.cached_tokens, "output": row.completion_tokens}
            for direction, count in counts.items():
                tokens.add_metric([*who, direction], count)
        yield from (requests, tokens, seconds)


class Exposition:
    """Renders `/metrics`, reading the queue's numbers at most every REFRESH_S."""

    def __init__(
        self,
        connection: Connection,
        numbers: Callable[[], Awaitable[QueueStatus]],
        answers: Callable[[], Awaitable[LogSize]],
        workers: Callable[[], Iterable[WorkerInfo]],
        usage: Callable[[], Awaitable[list[UsageRow]]],
        batches: Callable[[], Awaitable[tuple[int, int]]],
    ) -> None:
        self._connection = connection
        self._read_numbers = numbers
        self._read_answers = answers
        self._workers = workers
        self._read_usage = usage
        self._read_batches = batches
        self._gauges = QueueGauges()
        self._read_at = -REFRESH_S
        self._reading = asyncio.Lock()
        self._registry = CollectorRegistry()
        self._registry.register(self._gauges)
        if MULTIPROCESS_DIR in os.environ:
            MultiProcessCollector(self._registry)  # type: ignore[no-untyped-call]
        else:
            self._registry.register(REGISTRY)

    async def render(self, accept: str) -> tuple[bytes, str]:
        """The metrics and their content type: OpenMetrics where `accept` wants it, Prometheus text otherwise."""
        async with self._reading:
            if time.monotonic() - self._read_at >= REFRESH_S:
                await self._read()
                self._read_at = time.monotonic()
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    async def _read(self) -> None:
        gauges = self._gauges
        gauges.workers = tuple(self._workers())
        gauges.status = gauges.answers = gauges.batches = None
        gauges.used = []
        # While NATS is away a read would wait for it.
        if self._connection.connected:
            with contextlib.suppress(QueueUnavailable):
                gauges.status, gauges.answers = await asyncio.gather(self._read_numbers(), self._read_answers())
                gauges.used, gauges.batches = await asyncio.gather(self._read_usage(), self._read_batches())
