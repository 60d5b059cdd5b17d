"""Traces by the OpenTelemetry API: one for each request, from HTTP over the message's headers to prefill and decode.

Off unless OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or OTEL_TRACES_EXPORTER says otherwise. All
other settings are OpenTelemetry's too:
https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/

A span that is not recorded is INVALID_SPAN: no span begins in it, and no message carries it.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, Final

from dotenv import dotenv_values
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from forebay_contracts import env_file
from forebay_contracts.version import VERSION
from forebay_contracts.wire.errors import ConfigurationError

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL: Final = "http/protobuf"

_NO_PARENT: Final = Context()
_propagator: Final = TraceContextTextMapPropagator()
_tracer: Tracer | None = None
"""None where traces are off."""


def configure(service: str) -> None:
    """Send traces of this process, as `service` unless OTEL_SERVICE_NAME is set, to where OTEL_* say; or none at all.

    Raises:
        ConfigurationError: OTEL_* ask for something that is missing.
    """
    # OpenTelemetry reads the environment alone; Forebay's settings come from .env too.
    for name, value in dotenv_values(env_file.ENV_FILE, encoding=env_file.ENCODING).items():
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
    global _tracer
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as exc:
        raise ConfigurationError("OTEL_* ask for traces: pip install 'forebay[tracing]'") from exc
    name = os.environ.get("OTEL_SERVICE_NAME") or service
    provider = TracerProvider(resource=Resource.create({"service.name": name, "service.version": VERSION}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = provider.get_tracer("forebay", VERSION)


def enabled() -> bool:
    """Whether spans go anywhere."""
    return _tracer is not None


def serve(name: str, attributes: Mapping[str, Any], headers: Mapping[str, str]) -> Span:
    """Begin the span of an HTTP request: in the trace that its headers name, or in a new one."""
    return _begin(name, _propagator.extract(headers, _NO_PARENT), SpanKind.SERVER, attributes)


def resume(name: str, headers: Mapping[str, str], attributes: Mapping[str, Any]) -> Span:
    """Begin the span of a message that is worked on, in the trace that its headers name; without one, none."""
    if _tracer is None or "traceparent" not in headers:
        return INVALID_SPAN
    return _begin(name, _propagator.extract(headers, _NO_PARENT), SpanKind.CONSUMER, attributes)


def start(
    name: str,
    kind: SpanKind = SpanKind.INTERNAL,
    *,
    within: Span | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> Span:
    """Begin a span within `within` or the current span; within one that is not recorded, none."""
    parent = trace.get_current_span() if within is None else within
    if not parent.is_recording():
        return INVALID_SPAN
    return _begin(name, trace.set_span_in_context(parent, _NO_PARENT), kind, attributes)


def _begin(name: str, context: Context, kind: SpanKind, attributes: Mapping[str, Any] | None) -> Span:
    if _tracer is None:
        return INVALID_SPAN
    span = _tracer.start_span(name, context, kind, attributes)
    return span if span.is_recording() else INVALID_SPAN


def current(span: Span) -> contextlib.AbstractContextManager[None]:
    """Make `span` the current one of the block, and end it with the block."""
    return _currently(span) if span.is_recording() else contextlib.nullcontext()


@contextlib.contextmanager
def _currently(span: Span) -> Iterator[None]:
    # The message of an exception may quote a prompt: a span has only its type.
    with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
        try:
            yield
        except Exception as exc:
            fail(type(exc).__name__, span)
            raise


def fail(code: str | None = None, span: Span | None = None) -> None:
    """The current span, or `span`, ends badly, with `code` as what went wrong."""
    failed = trace.get_current_span() if span is None else span
    failed.set_status(StatusCode.ERROR)
    if code is not None:
        failed.set_attribute("error.type", code)


def inject(headers: dict[str, str]) -> None:
    """Add `traceparent` (and `tracestate`) of the current span, if it is recorded."""
    if trace.get_current_span().is_recording():
        _propagator.inject(headers)
