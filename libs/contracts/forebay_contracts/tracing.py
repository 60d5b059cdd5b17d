"""Traces: one for each request, from HTTP over the message's headers to the worker's prefill and decode.

Off unless OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or OTEL_TRACES_EXPORTER says otherwise;
everything else is OpenTelemetry's too: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

import contextlib
import os
import random
from collections.abc import Callable, Mapping
from typing import Any, Final

from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.trace import INVALID_SPAN_CONTEXT, NonRecordingSpan, Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from forebay_contracts.errors import ConfigurationError
from forebay_contracts.version import VERSION

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL: Final = "http/protobuf"
_NOT_SAMPLED: Final = tuple("02468ace")
"""How a `traceparent` ends whose trace is not recorded: https://www.w3.org/TR/trace-context/#sampled-flag"""

_propagator = TraceContextTextMapPropagator()
_tracer: trace.Tracer | None = None
_draw: Callable[[str, SpanKind, Mapping[str, Any] | None], "_LeftOut | None"]
_follows_parents = False


class _LeftOut(NonRecordingSpan):
    """The root of a trace that the sampler left out: all that is left of it is what the worker is told."""

    def __init__(self, trace_id: int) -> None:
        super().__init__(INVALID_SPAN_CONTEXT)
        self._trace_id: Final = trace_id

    @property
    def traceparent(self) -> str:
        """With any id of a span, since none is kept: https://www.w3.org/TR/trace-context/#parent-id"""
        return f"00-{self._trace_id:032x}-{random.getrandbits(64) or 1:016x}-00"


class _Within:
    """Makes a span that is not recorded the current one: `trace.use_span` without what records its end and errors."""

    __slots__ = ("_span", "_token")

    def __init__(self, span: Span) -> None:
        self._span = span

    def __enter__(self) -> None:
        self._token = context.attach(trace.set_span_in_context(self._span))

    def __exit__(self, *_: object) -> None:
        context.detach(self._token)


def configure(service: str) -> None:
    """Send traces of this process, as `service` unless OTEL_SERVICE_NAME is set, where OTEL_* say; or none at all.

    Raises:
        ConfigurationError: they ask for what is not there.
    """
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
    global _tracer, _draw, _follows_parents
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
        from opentelemetry.sdk.trace.sampling import Decision, ParentBased
    except ImportError as exc:
        raise ConfigurationError("OTEL_* ask for traces: install forebay[tracing]") from exc

    class Ids(RandomIdGenerator):
        """Gives the SDK the id of which the sampler has been asked."""

        drawn: int | None = None

        def generate_trace_id(self) -> int:
            trace_id, self.drawn = self.drawn, None
            return super().generate_trace_id() if trace_id is None else trace_id

    def draw(name: str, kind: SpanKind, attributes: Mapping[str, Any] | None) -> _LeftOut | None:
        trace_id = ids.generate_trace_id()
        if provider.sampler.should_sample(None, trace_id, name, kind, attributes).decision is Decision.DROP:
            return _LeftOut(trace_id)
        ids.drawn = trace_id
        return None

    name, ids = os.environ.get("OTEL_SERVICE_NAME") or service, Ids()
    resource = Resource.create({"service.name": name, "service.version": VERSION})
    provider = TracerProvider(resource=resource, id_generator=ids)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer, _draw = provider.get_tracer("forebay", VERSION), draw
    _follows_parents = isinstance(provider.sampler, ParentBased)


def enabled() -> bool:
    """Whether spans go anywhere."""
    return _tracer is not None


def start(
    name: str,
    kind: SpanKind = SpanKind.INTERNAL,
    *,
    headers: Mapping[str, str] | None = None,
    within: Span | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> Span:
    """Begin a span, to be ended by the caller; its parent is what `headers` say, the span `within`, or the current."""
    if _tracer is None:
        return trace.INVALID_SPAN
    if headers is not None:
        if _follows_parents and headers.get("traceparent", "").endswith(_NOT_SAMPLED):
            # What the sampler would say too, after it has parsed the header and made a context and a span of it.
            return trace.INVALID_SPAN
        return _tracer.start_span(name, _propagator.extract(headers, Context()), kind, attributes)
    parent = trace.get_current_span() if within is None else within
    if not parent.is_recording():
        # What the sampler left out is left out whole, and costs next to nothing: the SDK is asked only for the rest.
        if within is not None or isinstance(parent, _LeftOut) or parent.get_span_context().is_valid:
            return parent
        if (left_out := _draw(name, kind, attributes)) is not None:
            return left_out
    return _tracer.start_span(name, trace.set_span_in_context(parent), kind, attributes)


def current(span: Span) -> contextlib.AbstractContextManager[Any]:
    """Make `span` the parent of what begins in the block, and end it with the block."""
    if _tracer is None or span is trace.get_current_span():
        return contextlib.nullcontext()
    if not span.is_recording():
        return _Within(span)
    return trace.use_span(span, end_on_exit=True)


def inject(headers: dict[str, str]) -> None:
    """Add `traceparent` (and `tracestate`) of the current span."""
    if _tracer is None:
        return
    if isinstance(span := trace.get_current_span(), _LeftOut):
        headers["traceparent"] = span.traceparent
    else:
        _propagator.inject(headers)
