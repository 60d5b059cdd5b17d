"""Traces: one for each request, from HTTP over the message's headers to the worker's prefill and decode.

Off unless OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or OTEL_TRACES_EXPORTER says otherwise;
everything else is OpenTelemetry's too: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/

What a request passes is noted in a few words, and made spans of the SDK together with others: where one request in a
hundred is traced, the SDK's code is in no cache when its turn comes, and takes several times as long as in a row.
"""

import asyncio
import atexit
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Final

from dotenv import dotenv_values
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, StatusCode, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from forebay_contracts.settings import ENV_FILE
from forebay_contracts.version import VERSION
from forebay_contracts.wire.errors import ConfigurationError

HAND_OVER_S: Final = 1.0
HAND_OVER_SPANS: Final = 64
"""Spans are made once a second, or when so many have ended: more at once would hold the event loop up."""

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL: Final = "http/protobuf"
_NOT_SAMPLED: Final = tuple("02468ace")
"""How a `traceparent` ends whose trace is not recorded: https://www.w3.org/TR/trace-context/#sampled-flag"""

_NO_PARENT: Final = Context()

_propagator = TraceContextTextMapPropagator()


class Span:
    """One step of a request, from now until `end`; within `parent`, or within what `headers` name, or the first.

    `trace_id` is for the first of a trace whose sampler has been asked.
    """

    __slots__ = (
        "_context",
        "_headers",
        "_parent",
        "_trace_id",
        "attributes",
        "ended_ns",
        "failed",
        "kind",
        "name",
        "started_ns",
    )

    def __init__(
        self,
        name: str,
        kind: SpanKind,
        attributes: Mapping[str, Any],
        *,
        parent: "Span | None" = None,
        headers: Mapping[str, str] | None = None,
        trace_id: int | None = None,
    ) -> None:
        self.name = name
        self.kind = kind
        self.attributes = {**attributes}
        self.failed = False
        self.started_ns = time.time_ns()
        self.ended_ns = 0
        self._parent = parent
        self._headers = headers
        self._trace_id = trace_id
        self._context: SpanContext | None = None

    def set_attribute(self, name: str, value: Any) -> None:
        """Note something of it."""
        self.attributes[name] = value

    def fail(self, code: str | None = None) -> None:
        """It ends badly, with `code` as what went wrong."""
        self.failed = True
        if code is not None:
            self.attributes["error.type"] = code

    def end(self) -> None:
        """It ends now, if it has not before."""
        if not self.ended_ns:
            self.ended_ns = time.time_ns()
            _ended.append(self)
            _schedule()

    @property
    def context(self) -> SpanContext:
        """Its ids, as others are told them."""
        if self._context is None:
            above = self.parent_context
            trace_id, state = (above.trace_id, above.trace_state) if above else (self._trace_id, None)
            self._context = SpanContext(
                _random.generate_trace_id() if trace_id is None else trace_id,
                _random.generate_span_id(),
                is_remote=False,
                trace_flags=TraceFlags(TraceFlags.SAMPLED),
                trace_state=state,
            )
        return self._context

    @property
    def parent_context(self) -> SpanContext | None:
        """The ids of what it is within, None for the first of a trace."""
        if self._parent is not None:
            return self._parent.context
        return None if self._headers is None else _named(self._headers)


class NoSpan:
    """Stands in for a span that is not recorded."""

    def set_attribute(self, name: str, value: Any) -> None:
        """Not noted."""

    def fail(self, code: str | None = None) -> None:
        """Not noted."""

    def end(self) -> None:
        """Not noted."""


AnySpan = Span | NoSpan

NO_SPAN: Final = NoSpan()

_current: ContextVar[Span | None] = ContextVar("span", default=None)
_ended: list[Span] = []
_scheduled = False
_make: Callable[[Span], None] | None = None
_random: Any
_sampled: Callable[[str, Mapping[str, Any]], int | None]
_follows_parents = False


def configure(service: str) -> None:
    """Send traces of this process, as `service` unless OTEL_SERVICE_NAME is set, where OTEL_* say; or none at all.

    Raises:
        ConfigurationError: they ask for what is not there.
    """
    # OpenTelemetry reads the environment alone; here settings come from .env too.
    for name, value in dotenv_values(ENV_FILE).items():
        if name.startswith("OTEL_") and value:
            os.environ.setdefault(name, value)
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "").strip()
    endpoint = any(os.environ.get(name) for name in _ENDPOINTS)
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if disabled or exporter == "none" or not (exporter or endpoint):
        return
    if exporter not in ("", "otlp"):
        raise ConfigurationError(f"OTEL_TRACES_EXPORTER={exporter!r}: only otlp and none are there")
    for name in _PROTOCOLS:
        if (protocol := os.environ.get(name)) not in (None, "", _PROTOCOL):
            raise ConfigurationError(f"{name}={protocol!r}: only {_PROTOCOL} is there")
    _start(service)


def _start(service: str) -> None:
    global _make, _random, _sampled, _follows_parents
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
        from opentelemetry.sdk.trace.sampling import Decision, ParentBased
    except ImportError as exc:
        raise ConfigurationError("OTEL_* ask for traces: install forebay[tracing]") from exc

    class Ids(IdGenerator):
        """Gives the SDK the ids that a span has been told to have."""

        def generate_trace_id(self) -> int:
            return making.trace_id

        def generate_span_id(self) -> int:
            return making.span_id

    making: SpanContext

    def make(span: Span) -> None:
        nonlocal making
        making, above = span.context, span.parent_context
        within = _NO_PARENT if above is None else trace.set_span_in_context(NonRecordingSpan(above), _NO_PARENT)
        made = tracer.start_span(span.name, within, span.kind, span.attributes, start_time=span.started_ns)
        if span.failed:
            made.set_status(StatusCode.ERROR)
        made.end(span.ended_ns)

    def sampled(name: str, attributes: Mapping[str, Any]) -> int | None:
        trace_id: int = draw()
        found = provider.sampler.should_sample(_NO_PARENT, trace_id, name, SpanKind.SERVER, attributes)
        return None if found.decision is Decision.DROP else trace_id

    name, _random = os.environ.get("OTEL_SERVICE_NAME") or service, RandomIdGenerator()
    draw = _random.generate_trace_id
    resource = Resource.create({"service.name": name, "service.version": VERSION})
    provider = TracerProvider(resource=resource, id_generator=Ids())
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    tracer = provider.get_tracer("forebay", VERSION)
    _make, _sampled = make, sampled
    _follows_parents = isinstance(provider.sampler, ParentBased)
    atexit.register(_hand_over)  # before the provider sends its last, since it was registered after it


def _schedule() -> None:
    global _scheduled
    if len(_ended) >= HAND_OVER_SPANS:
        _hand_over()
    elif not _scheduled:
        try:
            asyncio.get_running_loop().call_later(HAND_OVER_S, _hand_over)
        except RuntimeError:
            _hand_over()
        else:
            _scheduled = True


def _hand_over() -> None:
    """Make spans of the SDK of all that have ended."""
    global _ended, _scheduled
    ended, _ended, _scheduled = _ended, [], False
    if _make is not None:
        for span in ended:
            _make(span)


def _named(headers: Mapping[str, str]) -> SpanContext | None:
    """The span that a `traceparent` names, None where it is not valid."""
    found = trace.get_current_span(_propagator.extract(headers, _NO_PARENT)).get_span_context()
    return found if found.is_valid else None


def enabled() -> bool:
    """Whether spans go anywhere."""
    return _make is not None


def serve(name: str, attributes: Mapping[str, Any], headers: Mapping[str, str]) -> AnySpan:
    """Begin the span of an HTTP request: in the trace that its headers name, or in one of its own.

    What the sampler leaves out costs next to nothing: it is asked before anything is noted, and neither the message
    nor the worker hears of it.
    """
    if _make is None:
        return NO_SPAN
    if "traceparent" in headers and _named(headers) is not None:
        return resume(name, headers, attributes, SpanKind.SERVER)
    trace_id = _sampled(name, attributes)
    return NO_SPAN if trace_id is None else Span(name, SpanKind.SERVER, attributes, trace_id=trace_id)


def resume(
    name: str, headers: Mapping[str, str], attributes: Mapping[str, Any], kind: SpanKind = SpanKind.CONSUMER
) -> AnySpan:
    """Begin a span in the trace that `headers` name; where they name none that is recorded, there is none."""
    parent = headers.get("traceparent", "")
    if _make is None or not parent or (_follows_parents and parent.endswith(_NOT_SAMPLED)):
        return NO_SPAN
    return Span(name, kind, attributes, headers=headers)


def start(
    name: str,
    kind: SpanKind = SpanKind.INTERNAL,
    *,
    within: AnySpan | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> AnySpan:
    """Begin a span, to be ended by the caller, in `within` or the current one; in one that is not recorded, none."""
    parent = _current.get() if within is None else within
    return Span(name, kind, attributes or {}, parent=parent) if isinstance(parent, Span) else NO_SPAN


def current(span: AnySpan) -> contextlib.AbstractContextManager[None]:
    """Make `span` the parent of what begins in the block, and end it with the block."""
    return _currently(span) if isinstance(span, Span) else contextlib.nullcontext()


@contextlib.contextmanager
def _currently(span: Span) -> Iterator[None]:
    token = _current.set(span)
    try:
        yield
    except Exception as exc:
        span.fail(type(exc).__name__)
        raise
    finally:
        _current.reset(token)
        span.end()


def fail(code: str) -> None:
    """The current span, if it is recorded, ends badly: what its HTTP status, sent long ago, does not say."""
    if (span := _current.get()) is not None:
        span.fail(code)


def inject(headers: dict[str, str]) -> None:
    """Add `traceparent` (and `tracestate`) of the current span, if it is recorded."""
    if (span := _current.get()) is not None:
        _propagator.inject(headers, trace.set_span_in_context(NonRecordingSpan(span.context), _NO_PARENT))
