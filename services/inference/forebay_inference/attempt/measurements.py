"""The metrics and spans of one attempt, and the fields of its log lines."""

import time
from typing import Final

from opentelemetry.trace import INVALID_SPAN, Span

from forebay_contracts.nats import clock
from forebay_contracts.queueing.protocols import Delivery
from forebay_contracts.telemetry import tracing
from forebay_contracts.telemetry.logs import Fields, fields
from forebay_contracts.wire.request import InferenceRequest
from forebay_inference.engine.events import Tokens
from forebay_inference.worker_metrics import WorkerMetrics

MAX_GAPS: Final = 64
"""So many times between two tokens are recorded together."""


class Measured:
    """One attempt, from its delivery to its end; times are seconds.

    Only a first attempt has a queue wait: a later one also waited for the attempt before it. All attempts at a request
    are in the trace that the message carries.
    """

    def __init__(self, metrics: WorkerMetrics, request: InferenceRequest, delivery: Delivery, worker: str) -> None:
        self._metrics = metrics
        self._request = request
        self.attempt: int | None = None
        self._tokens_at: dict[int, float] = {}
        self._gaps: list[float] = []
        self._output = 0
        self._prompt_tokens = self._output_tokens = 0
        self._phase: Span = INVALID_SPAN
        self.queue_wait_s: float | None = None
        self.first_token_s: float | None = None
        self._pulled_after_s = self.total_s
        self._span = tracing.resume(
            "attempt",
            delivery.headers,
            {
                "messaging.system": "nats",
                "forebay.request_id": request.id,
                "forebay.worker": worker,
                "gen_ai.request.model": request.model,
            },
        )

    def claimed(self, attempt: int) -> None:
        """The attempt owns the request, under this number."""
        self.attempt = attempt
        self._span.set_attribute("forebay.attempt", attempt)
        if attempt == 1:
            self.queue_wait_s = self._pulled_after_s
            self._metrics.queue_wait.observe(self.queue_wait_s)
        else:
            self._metrics.redeliveries.inc()

    @property
    def first_token_at(self) -> float | None:
        """Seconds since the epoch; None if this attempt made no first token."""
        return None if self.first_token_s is None else self._request.created_at + self.first_token_s

    def generating(self) -> None:
        """The engine gets the request."""
        self._phase = tracing.start("prefill", within=self._span)

    def accepted(self, prompt_tokens: int) -> None:
        """The engine has accepted it."""
        self._prompt_tokens = prompt_tokens
        self._metrics.input_tokens.inc(prompt_tokens)
        self._phase.set_attribute("gen_ai.usage.input_tokens", prompt_tokens)

    def tokens(self, event: Tokens, *, resumed: bool) -> None:
        """The engine has made tokens; an earlier attempt made the first token of a `resumed` request."""
        count = len(event.token_ids)
        if not count:
            return
        now = time.perf_counter()
        if not self._output:
            if not resumed and self.first_token_s is None:
                self.first_token_s = self.total_s
                self._metrics.first_token.observe(self.first_token_s)
            self._phase.end()
            self._phase = tracing.start("decode", within=self._span)
        self._output += count
        before = self._tokens_at.get(event.index)
        if before is not None:
            self._gaps.append((now - before) / count)
            if len(self._gaps) >= MAX_GAPS:
                self._observe_gaps()
        self._tokens_at[event.index] = now

    def generated(self) -> None:
        """The engine no longer has the request. It may get it again, under the true number of the attempt."""
        self._observe_gaps()
        self._output_tokens += self._output
        self._metrics.output_tokens.inc(self._output)
        self._phase.set_attribute("gen_ai.usage.output_tokens", self._output)
        self._phase.end()
        self._phase, self._output, self._tokens_at = INVALID_SPAN, 0, {}

    def _observe_gaps(self) -> None:
        gaps, self._gaps = self._gaps, []
        if gaps:
            self._metrics.inter_token.observe_many(gaps)

    def ended(self, outcome: str, code: str | None = None) -> None:
        """The attempt has this outcome; `code` says what went wrong."""
        self._span.set_attribute("forebay.outcome", outcome)
        if code is not None:
            tracing.fail(code, self._span)

    def used_tokens(self, turn: int) -> int:
        """What the attempt has used. The prompt counts in the first turn alone."""
        return self._output_tokens + (0 if turn else self._prompt_tokens)

    def close(self) -> None:
        """The attempt is over."""
        self._span.end()

    @property
    def total_s(self) -> float:
        """Time since the request arrived."""
        return max(clock.now() - self._request.created_at, 0.0)

    def fields(self, outcome: str | None = None, code: str | None = None) -> dict[str, Fields]:
        """The `extra` of a log line."""
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
