"""What is measured: the registry of this process, switched on or off once, and what both services measure.

What is counted and observed is kept for GATHER_S and recorded together: one by one, each between other work, it costs
several times as much.

Each service defines its metrics in a module `metrics` of its own. Labels take few values: names of models that are
served, types, outcomes and reasons, never anything that a client makes up.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from forebay_contracts.settings import Settings

GATHER_S: Final = 0.02
"""How long it takes until another process of the same api shows what was measured; a scrape of this one waits for
nothing."""

_measured: Final[deque[tuple["Gathered", float]]] = deque()
_recording: Final = threading.Lock()


class _Recorder(Collector):
    """The first collector of the registry: nothing of its own, and the others complete."""

    def collect(self) -> Iterable[Metric]:
        """Record what has been gathered."""
        record()
        return ()


REGISTRY: Final = CollectorRegistry()
REGISTRY.register(_Recorder())
ProcessCollector(registry=REGISTRY)

FAST_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
"""Buckets for what takes NATS a round trip."""

WAIT_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Buckets for what a client waits for."""

TOKEN_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
"""Buckets for the time between two tokens."""

STATE_WRITE: Final = Histogram(
    "forebay_state_write_seconds",
    "Time of one write of a request's state to the KV bucket",
    buckets=FAST_S,
    registry=REGISTRY,
)

_on = True


def record() -> None:
    """Record what has been gathered; from any thread."""
    counted: dict[Gathered, float] = {}
    with _recording:
        while _measured:
            to, amount = _measured.popleft()
            if to.sums:
                counted[to] = counted.get(to, 0) + amount
            else:
                to.record(amount)
        for to, total in counted.items():
            to.record(total)


class Gathered:
    """Stands in for a counter, whose amounts are summed up (`sums`), or for a histogram."""

    __slots__ = ("record", "sums")

    def __init__(self, record: Callable[[float], None], *, sums: bool) -> None:
        self.record = record
        self.sums = sums

    def inc(self, amount: float = 1) -> None:
        """Count."""
        self.observe(amount)

    def observe(self, amount: float) -> None:
        """Observe."""
        first = not _measured
        _measured.append((self, amount))
        if first:
            try:
                asyncio.get_running_loop().call_later(GATHER_S, record)
            except RuntimeError:
                record()


class Nothing:
    """Stands in for every metric where METRICS is false."""

    def inc(self, amount: float = 1) -> None:
        """Not counted."""

    def observe(self, amount: float) -> None:
        """Not observed."""

    def set_function(self, function: Any) -> None:
        """Never asked."""


NOTHING: Final = Nothing()


def configure(settings: Settings) -> None:
    """Measure, or not, as METRICS says; before anything is bound."""
    global _on
    _on = settings.metrics


def bound(metric: MetricWrapperBase, *labels: str) -> Any:
    """The child of `metric` for `labels`, to be kept by who uses it often."""
    if not _on:
        return NOTHING
    child: Any = metric.labels(*labels) if labels else metric
    if isinstance(child, Gauge):
        return child
    if isinstance(child, Counter):
        return Gathered(child.inc, sums=True)
    return Gathered(child.observe, sums=False)
