"""Which spans begin, what they carry, and what a message carries of them."""

from collections.abc import Callable

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler

from forebay_contracts.telemetry import tracing

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"
SAMPLED, NOT_SAMPLED = f"{PARENT}-01", f"{PARENT}-00"
PROMPT = "xyzzy"

Traced = Callable[[Sampler], InMemorySpanExporter]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Traced:
    """Traces on with a sampler; what was exported."""

    def start(sampler: Sampler) -> InMemorySpanExporter:
        provider, exporter = TracerProvider(sampler=sampler), InMemorySpanExporter()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("tests"))
        return exporter

    return start


def one_request(headers: dict[str, str]) -> dict[str, str]:
    """An api's spans of one request, and a worker's of its message; the headers of that message."""
    message: dict[str, str] = {}
    with tracing.current(tracing.serve("http", {}, headers)), tracing.current(tracing.start("publish")):
        tracing.inject(message)
    attempt = tracing.resume("attempt", message, {})
    tracing.start("prefill", within=attempt).end()
    attempt.end()
    return message


def names(spans: tuple[ReadableSpan, ...]) -> list[str]:
    return [span.name for span in spans]


def test_without_traces_no_span_begins_and_no_message_carries_one() -> None:
    assert not tracing.enabled()
    assert one_request({"traceparent": SAMPLED}) == {}
    assert not tracing.serve("http", {}, {"traceparent": SAMPLED}).is_recording()


def test_a_request_is_one_trace(traced: Traced) -> None:
    exporter = traced(ParentBased(ALWAYS_ON))
    message = one_request({})
    spans = exporter.get_finished_spans()
    assert names(spans) == ["publish", "http", "prefill", "attempt"]
    assert len({span.context.trace_id for span in spans if span.context}) == 1
    publish, http, prefill, attempt = spans
    assert http.parent is None
    assert [child.parent for child in (publish, prefill)] == [http.context, attempt.context]
    assert publish.context
    assert attempt.parent
    assert attempt.parent.span_id == publish.context.span_id
    assert list(message) == ["traceparent"]


@pytest.mark.parametrize(
    ("sampler", "headers"),
    [(ParentBased(ALWAYS_OFF), {}), (ParentBased(ALWAYS_ON), {"traceparent": NOT_SAMPLED})],
    ids=["by the sampler", "by the client"],
)
def test_a_request_that_is_not_sampled_has_no_span_anywhere(
    traced: Traced, sampler: Sampler, headers: dict[str, str]
) -> None:
    exporter = traced(sampler)
    assert one_request(headers) == {}
    assert exporter.get_finished_spans() == ()


def test_a_traceparent_that_is_not_valid_begins_a_new_trace(traced: Traced) -> None:
    exporter = traced(ParentBased(ALWAYS_ON))
    one_request({"traceparent": f"{SAMPLED}-and-more"})
    assert names(exporter.get_finished_spans()) == ["publish", "http", "prefill", "attempt"]
    assert exporter.get_finished_spans()[1].parent is None


def test_a_span_has_the_type_of_an_exception_and_not_its_message(traced: Traced) -> None:
    exporter = traced(ALWAYS_ON)
    with pytest.raises(ValueError, match=PROMPT), tracing.current(tracing.serve("http", {}, {})):
        raise ValueError(PROMPT)
    (span,) = exporter.get_finished_spans()
    assert span.attributes == {"error.type": "ValueError"}
    assert not span.status.is_ok
    assert PROMPT not in span.to_json()
