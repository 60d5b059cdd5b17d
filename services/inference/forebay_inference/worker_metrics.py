"""The metrics of a worker."""

from collections.abc import Callable
from typing import Any, Final

from prometheus_client import Counter, Gauge

from forebay_contracts.telemetry.metrics import REGISTRY, TOKEN_S, WAIT_S, Histogram, bound
from forebay_inference.engine.model import Model

QUEUE_WAIT: Final = Histogram(
    "forebay_queue_wait_seconds",
    "Time from a request's arrival until a worker took it, first attempts only",
    ("model",),
    buckets=WAIT_S,
    registry=REGISTRY,
)
FIRST_TOKEN: Final = Histogram(
    "forebay_time_to_first_token_seconds",
    "Time from a request's arrival to its first token",
    ("model",),
    buckets=WAIT_S,
    registry=REGISTRY,
)
INTER_TOKEN: Final = Histogram(
    "forebay_inter_token_seconds",
    "Time between two tokens of one choice",
    ("model",),
    buckets=TOKEN_S,
    registry=REGISTRY,
)
TOKENS: Final = Counter(
    "forebay_tokens",
    "Tokens that the engine read (input) and generated (output), those of failed requests included",
    ("model", "direction"),
    registry=REGISTRY,
)
REDELIVERIES: Final = Counter(
    "forebay_request_redeliveries",
    "Pulled requests that an earlier attempt had begun and not ended",
    ("model",),
    registry=REGISTRY,
)
SLOTS: Final = Gauge("forebay_worker_slots", "Most requests that this worker processes at once", registry=REGISTRY)
SLOTS_BUSY: Final = Gauge("forebay_worker_slots_busy", "Requests that it processes now", registry=REGISTRY)
BATCH: Final = Gauge("forebay_engine_batch_sequences", "Sequences in the engine's batch now", registry=REGISTRY)
CACHE: Final = Gauge(
    "forebay_engine_kv_cache_usage_ratio",
    "Part of the engine's KV cache that is in use, NaN without one",
    registry=REGISTRY,
)


class WorkerMetrics:
    """The metrics of a worker, which serves one model."""

    def __init__(self, model: str) -> None:
        self.queue_wait: Any = bound(QUEUE_WAIT, model)
        self.first_token: Any = bound(FIRST_TOKEN, model)
        self.inter_token: Any = bound(INTER_TOKEN, model)
        self.input_tokens: Any = bound(TOKENS, model, "input")
        self.output_tokens: Any = bound(TOKENS, model, "output")
        self.redeliveries: Any = bound(REDELIVERIES, model)


def watch(slots: int, busy: Callable[[], int], engine: Model) -> None:
    """Let each scrape ask the worker for the values of the gauges."""

    def cache_usage() -> float:
        usage = engine.status().cache_usage
        return float("nan") if usage is None else usage

    bound(SLOTS).set_function(lambda: slots)
    bound(SLOTS_BUSY).set_function(busy)
    bound(BATCH).set_function(lambda: engine.status().sequences)
    bound(CACHE).set_function(cache_usage)
