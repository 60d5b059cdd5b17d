"""What is measured: the registry of this process, switched on or off once, and what both services measure.

Each service defines its metrics in a module `metrics` of its own. Labels take few values: names of models that are
served, types, outcomes and reasons, never anything that a client makes up.
"""

from typing import Any, Final

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.metrics import MetricWrapperBase

from forebay_contracts.settings import Settings

REGISTRY: Final = CollectorRegistry()
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
    return metric.labels(*labels) if labels else metric
