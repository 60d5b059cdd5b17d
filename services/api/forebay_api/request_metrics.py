"""What the api measures of requests, from admission to their end as their clients see it."""

import functools
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client import Counter, Histogram

from forebay_contracts.queueing.state_store import OUTCOMES
from forebay_contracts.telemetry.metrics import FAST_S, REGISTRY, WAIT_S, bound
from forebay_contracts.wire.state import RequestStatus

ADMITTED: Final = Counter(
    "forebay_requests_admitted", "Requests that the queue took", ("model", "type"), registry=REGISTRY
)
REJECTED: Final = Counter(
    "forebay_requests_rejected",
    "Completion requests that were answered without being queued",
    ("reason",),
    registry=REGISTRY,
)
FINISHED: Final = Counter(
    "forebay_requests_finished",
    "Admitted requests that ended, as their clients see it",
    ("model", "type", "outcome"),
    registry=REGISTRY,
)
SECONDS: Final = Histogram(
    "forebay_request_seconds",
    "Time from a request's arrival to its end",
    ("model", "type", "outcome"),
    buckets=WAIT_S,
    registry=REGISTRY,
)
KEY_REQUESTS: Final = Counter(
    "forebay_key_requests",
    "Completion requests by the name of the key that they came with: that the queue took, or the key's limit refused",
    ("key", "result"),
    registry=REGISTRY,
)
PUBLISH: Final = Histogram(
    "forebay_publish_seconds", "Time until the queue took or refused a request", buckets=FAST_S, registry=REGISTRY
)


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """The metrics of requests of one model and type."""

    admitted: Any
    seconds: dict[RequestStatus, Any]
    finished: dict[RequestStatus, Any]

    def end(self, outcome: RequestStatus | None, seconds: float) -> None:
        """An admitted request has ended so."""
        ended = outcome or RequestStatus.CANCELLED
        self.finished[ended].inc()
        self.seconds[ended].observe(seconds)


@functools.cache
def of(model: str, completion_type: str) -> RequestMetrics:
    """The metrics of requests for a model that is served, so that clients cannot make up any."""
    return RequestMetrics(
        bound(ADMITTED, model, completion_type),
        {outcome: bound(SECONDS, model, completion_type, outcome.value) for outcome in OUTCOMES},
        {outcome: bound(FINISHED, model, completion_type, outcome.value) for outcome in OUTCOMES},
    )
