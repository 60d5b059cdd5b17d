"""Traces: one for each request, from HTTP over the message's headers to the worker's prefill and decode.

Off unless OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or OTEL_TRACES_EXPORTER says otherwise;
everything else is OpenTelemetry's too: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Any, Final

from dotenv import dotenv_values
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from forebay_contracts.errors import ConfigurationError
from forebay_contracts.settings import ENV_FILE
from forebay_contracts.version import VERSION

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL: Final = "http/protobuf"
_NOT_SAMPLED: Final = tuple("02468ace")
"""How a `traceparent` ends whose trace is not recorded: https://www.w3.org/TR/trace-context/#sampled-flag"""

_NO_PARENT: Final = Context()

_propagator = TraceContextTextMapPropagator()
_tracer: trace.Tracer | None = None
_sampled: Callable[[str, Mapping[str, Any]], bool]
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
    global _tracer, _sampled, _follows_parents
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

    def sampled(name: str, attributes: Mapping[str, Any]) -> bool:
        trace_id = draw()
        found = provider.sampler.should_sample(_NO_PARENT, trace_id, name, SpanKind.SERVER, attributes)
        if found.decision is Decision.DROP:
            return False
        ids.drawn = trace_id
        return True

    name, ids, draw = os.environ.get("OTEL_SERVICE_NAME") or service, Ids(), RandomIdGenerator().generate_trace_id
    resource = Resource.create({"service.name": name, "service.version": VERSION})
    provider = TracerProvider(resource=resource, id_generator=ids)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer, _sampled = provider.get_tracer("forebay", VERSION), sampled
    _follows_parents = isinstance(provider.sampler, ParentBased)


def enabled() -> bool:
    """Whether spans go anywhere."""
    return _tracer is not None


def serve(name: str, attributes: Mapping[str, Any], headers: Mapping[str, str]) -> Span:
    """Begin the span of an HTTP request: in the trace that its headers name, or in one of its own.

    What the sampler leaves out costs next to nothing: it is asked before the SDK makes a context and a span, and
    neither the message nor the worker hears of it.
    """
    if "traceparent" in headers:
        return resume(name, headers, attributes, SpanKind.SERVER)
    if _tracer is None or not _sampled(name, attributes):
        return trace.INVALID_SPAN
    return _tracer.start_span(name, _NO_PARENT, SpanKind.SERVER, attributes)


def resume(
    name: str, headers: Mapping[str, str], attributes: Mapping[str, Any], kind: SpanKind = SpanKind.CONSUMER
) -> Span:
    """Begin a span in the trace that `headers` name; where they name none that is recorded, there is none."""
    parent = headers.get("traceparent", "")
    if _tracer is None or not parent or (_follows_parents and parent.endswith(_NOT_SAMPLED)):
        return trace.INVALID_SPAN
    return _tracer.start_span(name, _propagator.extract(headers, Context()), kind, attributes)


def start(
    name: str,
    kind: SpanKind = SpanKind.INTERNAL,
    *,
    within: Span | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> Span:
    """Begin a span, to be ended by the caller, in `within` or the current one; in one that is not recorded, none."""
    if _tracer is None:
        return trace.INVALID_SPAN
    parent = trace.get_current_span() if within is None else within
    if not parent.is_recording():
        return trace.INVALID_SPAN
    return _tracer.start_span(name, trace.set_span_in_context(parent), kind, attributes)


def current(span: Span) -> contextlib.AbstractContextManager[Any]:
    """Make `span` the parent of what begins in the block, and end it with the block."""
    return trace.use_span(span, end_on_exit=True) if span.is_recording() else contextlib.nullcontext()


def fail(code: str) -> None:
    """The current span, if it is recorded, ends badly: what its HTTP status, sent long ago, does not say."""
    span = trace.get_current_span()
    if span.is_recording():
        span.set_attribute("error.type", code)
        span.set_status(StatusCode.ERROR)


def inject(headers: dict[str, str]) -> None:
    """Add `traceparent` (and `tracestate`) of the current span, if it is recorded."""
    if _tracer is not None and trace.get_current_span().is_recording():
        _propagator.inject(headers)
