"""What is noticed of one attempt: its metrics, its spans, and the durations that its log lines carry."""

import time

from forebay_contracts.queueing.protocols import Delivery
from forebay_contracts.telemetry import tracing
from forebay_contracts.telemetry.logs import Fields, fields
from forebay_contracts.wire.request import InferenceRequest
from forebay_inference.engine.protocol import Tokens
from forebay_inference.worker_metrics import WorkerMetrics


class Measured:
    """One attempt, from when its request was taken until it ends; times are seconds.

    The queue wait is that of the first attempt: what a later one waited for is not the queue alone. Its span goes on
    with the trace that the message carries, so that all attempts at a request are in one.
    """

    def __init__(self, metrics: WorkerMetrics, request: InferenceRequest, delivery: Delivery, worker: str) -> None:
        self._metrics = metrics
        self._request = request
        self.attempt = delivery.num_delivered
        self._tokens_at: dict[int, float] = {}
        self._output = 0
        self._phase: tracing.AnySpan = tracing.NO_SPAN
        self.queue_wait_s: float | None = None
        self.first_token_s: float | None = None
        if delivery.num_delivered == 1:
            # Two machines' clocks: what is less than nothing is nothing.
            self.queue_wait_s = max(time.time() - request.created_at, 0.0)
            metrics.queue_wait.observe(self.queue_wait_s)
        else:
            metrics.redeliveries.inc()
        self._span = tracing.resume(
            "attempt",
            delivery.headers,
            {
                "messaging.system": "nats",
                "forebay.request_id": request.id,
                "forebay.attempt": delivery.num_delivered,
                "forebay.worker": worker,
                "gen_ai.request.model": request.model,
            },
        )

    def generating(self) -> None:
        """The engine is given the request."""
        self._phase = tracing.start("prefill", within=self._span)

    def accepted(self, prompt_tokens: int) -> None:
        """The engine has taken it."""
        self._metrics.input_tokens.inc(prompt_tokens)
        self._phase.set_attribute("gen_ai.usage.input_tokens", prompt_tokens)

    def tokens(self, event: Tokens, *, resumed: bool) -> None:
        """The engine has made tokens; the first of a `resumed` request were made by an earlier attempt."""
        count = len(event.token_ids)
        if not count:
            return
        now = time.perf_counter()
        if not self._output:
            if not resumed:
                self.first_token_s = max(time.time() - self._request.created_at, 0.0)
                self._metrics.first_token.observe(self.first_token_s)
            self._phase.end()
            self._phase = tracing.start("decode", within=self._span)
        self._output += count
        before = self._tokens_at.get(event.index)
        if before is not None:
            self._metrics.inter_token.observe((now - before) / count)
        self._tokens_at[event.index] = now

    def generated(self) -> None:
        """The engine has the request no more."""
        self._metrics.output_tokens.inc(self._output)
        self._phase.set_attribute("gen_ai.usage.output_tokens", self._output)
        self._phase.end()

    def ended(self, outcome: str, code: str | None = None) -> None:
        """The attempt ended so, with `code` as what went wrong."""
        self._span.set_attribute("forebay.outcome", outcome)
        if code is not None:
            self._span.fail(code)

    def close(self) -> None:
        """Nothing more comes."""
        self._span.end()

    @property
    def total_s(self) -> float:
        """Time since the request arrived."""
        return time.time() - self._request.created_at

    def fields(self, outcome: str | None = None, code: str | None = None) -> dict[str, Fields]:
        """For `extra` of a log line."""
        return fields(
            request_id=self._request.id,
            model=self._request.model,
            type=self._request.completion_type.value,
            attempt=self.attempt,
            outcome=outcome,
            code=code,
            queue_wait_s=self.queue_wait_s,
            time_to_first_token_s=self.first_token_s,
            total_s=self.total_s,
        )
