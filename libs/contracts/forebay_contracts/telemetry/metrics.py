"""What is measured: the registry of this process, switched on or off once, and what both services measure.

What is counted and observed is kept for GATHER_S and recorded together, a sum to each counter and a number to each
bucket: one by one, each between other work, it costs several times as much.

Each service defines its metrics in a module `metrics` of its own. Labels take few values: names of models that are
served, types, outcomes and reasons, never anything that a client makes up.
"""

import asyncio
import collections
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Metric, ProcessCollector
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from forebay_contracts.settings import Settings

GATHER_S: Final = 0.1
"""How long it may take until what was measured is recorded; a scrape does not wait for it, but of an api with several
processes, for the others."""

_gathered: Final[list["Gathered"]] = []
"""All there are: one for each metric and its labels."""
_recording: Final = threading.Lock()
_scheduled = False


class Histogram(prometheus_client.Histogram):
    """Its like, that takes many observations in one step."""

    def observe_many(self, amounts: Sequence[float]) -> None:
        """Observe each."""
        self._sum.inc(sum(amounts))
        for bucket, count in collections.Counter(bisect_left(self._upper_bounds, amount) for amount in amounts).items():
            self._buckets[bucket].inc(count)


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

STATE: Final = Histogram(
    "forebay_state_seconds",
    "Time of one read or write of a request's state, or of counting its outcome, with or without success",
    ("operation",),
    buckets=FAST_S,
    registry=REGISTRY,
)

_on = True


def record() -> None:
    """Record what has been gathered; from any thread."""
    global _scheduled
    # First: what is measured from here on may ask for another time.
    _scheduled = False
    with _recording:
        for one in _gathered:
            one.record()


def _schedule() -> None:
    global _scheduled
    try:
        asyncio.get_running_loop().call_later(GATHER_S, record)
    except RuntimeError:
        record()
    else:
        _scheduled = True


class Gathered:
    """Stands in for a counter or a histogram and gives what it takes to `many`, all of GATHER_S at a time."""

    __slots__ = ("_amounts", "_many")

    def __init__(self, many: Callable[[Sequence[float]], Any]) -> None:
        self._many = many
        self._amounts: list[float] = []
        with _recording:
            _gathered.append(self)

    def observe(self, amount: float = 1) -> None:
        """Observe."""
        self._amounts.append(amount)
        if not _scheduled:
            _schedule()

    inc = observe

    def record(self) -> None:
        """Give it on; by one thread at a time, while others may observe."""
        if amounts := self._amounts[:]:
            del self._amounts[: len(amounts)]
            self._many(amounts)


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
        return Gathered(lambda amounts: child.inc(sum(amounts)))
    return Gathered(child.observe_many)
