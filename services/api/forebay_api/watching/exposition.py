"""The text of `/metrics`: what this api measured, and the gauges of the queue, read from NATS."""

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from nats.errors import Error as NatsError
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from forebay_api.watching.drain_rate import Rates
from forebay_contracts.nats import topology
from forebay_contracts.nats.connection import Connection
from forebay_contracts.queueing.status import ModelQueue, model_queue
from forebay_contracts.telemetry.metrics import REGISTRY
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import QueueUnavailable
from forebay_contracts.wire.heartbeats import WorkerInfo, WorkerStatus

REFRESH_S = 1.0
"""Scrapes within so long of each other get the same gauges, so that many scrapers cost NATS no more than one."""

MULTIPROCESS_DIR: Final = "PROMETHEUS_MULTIPROC_DIR"
"""The folder in which the processes of one api count (a variable of prometheus_client)."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The queue at one time; `max_size` is None if NATS did not answer."""

    max_size: int | None = None
    lines: Sequence[ModelQueue] = ()
    workers: Sequence[WorkerInfo] = ()


class QueueGauges(Collector):
    """The newest reading as metrics. They describe the whole deployment, so every api shows the same."""

    def __init__(self) -> None:
        self.reading = Reading()

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """The names alone."""
        return self._families().values()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Names and values."""
        families, reading = self._families(), self.reading
        families["up"].add_metric([], float(reading.max_size is not None))
        if reading.max_size is not None:
            families["max_size"].add_metric([], reading.max_size)
        for line in reading.lines:
            families["waiting"].add_metric([line.model], line.waiting)
            families["processing"].add_metric([line.model], line.processing)
            families["max_concurrent"].add_metric([line.model], line.max_concurrent)
        models = {line.model for line in reading.lines} | {worker.model for worker in reading.workers}
        for model in sorted(models):
            for status in WorkerStatus:
                count = sum(worker.model == model and worker.status is status for worker in reading.workers)
                families["workers"].add_metric([model, status.value], count)
        yield from families.values()

    @staticmethod
    def _families() -> dict[str, GaugeMetricFamily]:
        gauge = GaugeMetricFamily
        return {
            "up": gauge("forebay_queue_up", "Whether NATS answers (1) or not (0)"),
            "waiting": gauge("forebay_queue_waiting", "Requests that wait for a slot", labels=["model"]),
            "processing": gauge("forebay_queue_processing", "Requests that workers have", labels=["model"]),
            "max_size": gauge("forebay_queue_max_size", "MAX_QUEUE_SIZE of the live stream"),
            "max_concurrent": gauge(
                "forebay_queue_max_concurrent", "MAX_CONCURRENT_REQUESTS of the live consumer", labels=["model"]
            ),
            "workers": gauge("forebay_workers", "Workers alive, by what they are doing", labels=["model", "status"]),
        }


class Exposition:
    """Renders `/metrics`, reading the queue at most every REFRESH_S."""

    def __init__(self, connection: Connection, workers: Callable[[], Iterable[WorkerInfo]], rates: Rates) -> None:
        self._connection = connection
        self._workers = workers
        self._rates = rates
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
                self._gauges.reading = await self._read()
                self._read_at = time.monotonic()
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    async def _read(self) -> Reading:
        workers = tuple(self._workers())
        if not self._connection.connected:
            return Reading(workers=workers)
        try:
            stream, consumers = await asyncio.gather(
                self._connection.jetstream.stream_info(names.STREAM), topology.consumers(self._connection)
            )
        except (NatsError, TimeoutError, OSError, QueueUnavailable):
            return Reading(workers=workers)
        lines = [model_queue(consumer) for consumer in consumers]
        self._rates.sample(stream.state.last_seq - stream.state.messages, stream.state.messages, lines)
        return Reading(stream.config.max_msgs or 0, lines, workers)
