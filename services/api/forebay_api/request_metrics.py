"""What the api measures of requests, from admission to their end as their clients see it."""

import functools
from typing import Final

from prometheus_client import Counter, Histogram

from forebay_contracts.queueing.state_store import OUTCOMES
from forebay_contracts.telemetry.metrics import FAST_S, REGISTRY, WAIT_S, bound
from forebay_contracts.wire.state import RequestStatus

_counter: Final = functools.partial(Counter, registry=REGISTRY)
_histogram: Final = functools.partial(Histogram, registry=REGISTRY)

ADMITTED: Final = _counter("forebay_requests_admitted", "Requests that the queue took", ("model", "type"))
REJECTED: Final = _counter(
    "forebay_requests_rejected",
    "Completion requests that were answered without being queued",
    ("reason",),
)
FINISHED: Final = _counter(
    "forebay_requests_finished",
    "Admitted requests by their end as their client saw it: completed, failed, timed_out, cancelled",
    ("model", "type", "outcome"),
)
SECONDS: Final = _histogram(
    "forebay_request_seconds", "Time from a request's arrival to its end", ("model", "type", "outcome"), buckets=WAIT_S
)
STORED: Final = _counter(
    "forebay_stored_requests_finished",
    "Requests whose answer is stored, by their end; the api that admitted the request counts it",
    ("model", "outcome"),
)
KEY_REQUESTS: Final = _counter(
    "forebay_key_requests",
    "Completion requests by the name of their key: admitted to the queue, or refused by a limit of the key",
    ("key", "result"),
)
WEBHOOKS: Final = _counter(
    "forebay_webhook_posts",
    "Posts of events to the receivers of webhooks: delivered or failed",
    ("endpoint", "result"),
)
BATCH_LINES: Final = _counter(
    "forebay_batch_lines",
    "Lines of batches that have ended: completed, or failed if they are in the error file",
    ("result",),
)
BATCHES: Final = _counter(
    "forebay_batches_finished", "Batches that have ended: completed, failed, expired or cancelled", ("status",)
)
PUBLISH: Final = _histogram("forebay_publish_seconds", "Time until the queue took or refused a request", buckets=FAST_S)


class RequestMetrics:
    """The metrics of requests of one model and type. The model is served, so that clients cannot make up any."""

    def __init__(self, model: str, completion_type: str) -> None:
        labels = model, completion_type
        self.admitted = bound(ADMITTED, *labels)
        self._ended = {
            outcome: (bound(FINISHED, *labels, outcome.value), bound(SECONDS, *labels, outcome.value))
            for outcome in OUTCOMES
        }
        self._stored = {outcome: bound(STORED, model, outcome.value) for outcome in OUTCOMES}

    def end(self, outcome: RequestStatus | None, seconds: float) -> None:
        """An admitted request has ended."""
        finished, took = self._ended[outcome or RequestStatus.CANCELLED]
        finished.inc()
        took.observe(seconds)

    def end_stored(self, outcome: RequestStatus | None, seconds: float) -> None:
        """An admitted request has ended whose answer is stored."""
        self.end(outcome, seconds)
        self._stored[outcome or RequestStatus.CANCELLED].inc()


of = functools.cache(RequestMetrics)
