"""One trace a request, as an OTLP collector receives it from the real processes."""

import asyncio
import gzip
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from openai.types.chat import ChatCompletionChunk
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from forebay_contracts.wire.state import RequestStatus
from support.answers import user
from support.nats import NatsServer
from support.service import Service
from support.stack import MODEL, Stack, running
from support.view import idle

TIMEOUT_S = 60
ERROR = 2
"""STATUS_CODE_ERROR of OTLP."""

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"


@dataclass(frozen=True)
class Span:
    """What a test looks at."""

    trace: str
    id: str
    parent: str
    name: str
    service: str
    begin_ns: int
    end_ns: int
    failed: bool
    attributes: dict[str, Any] = field(hash=False)


class Collector:
    """An OTLP/HTTP receiver that keeps what it is sent."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._changed = threading.Condition()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.path == "/v1/traces"
                collector.take(ExportTraceServiceRequest.FromString(body))
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def settings(self) -> dict[str, Any]:
        """Of services that are to send here, soon."""
        return {
            "otel_exporter_otlp_endpoint": f"http://127.0.0.1:{self._server.server_port}",
            "otel_bsp_schedule_delay": 100,
        }

    def take(self, request: ExportTraceServiceRequest) -> None:
        with self._changed:
            for resource_spans in request.resource_spans:
                service = _attributes(resource_spans.resource.attributes)["service.name"]
                for scope in resource_spans.scope_spans:
                    self.spans += [_span(span, service) for span in scope.spans]
            self._changed.notify_all()

    async def trace_of(self, request_id: str, **wanted: int) -> list[Span]:
        """The spans of a request's trace, once there are so many of each name."""

        def found() -> list[Span]:
            traces = {span.trace for span in self.spans if span.attributes.get("forebay.request_id") == request_id}
            return [span for span in self.spans if span.trace in traces]

        def complete() -> bool:
            return Counter(span.name.split()[0].lower() for span in found()) == Counter(wanted)

        def wait() -> bool:
            with self._changed:
                return self._changed.wait_for(complete, TIMEOUT_S)

        assert await asyncio.to_thread(wait), [span.name for span in found()]
        return sorted(found(), key=lambda span: span.begin_ns)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


def _span(span: Any, service: str) -> Span:
    return Span(
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.name,
        service,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        span.status.code == ERROR,
        _attributes(span.attributes),
    )


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    try:
        yield found
    finally:
        found.close()


async def test_one_trace_from_http_to_the_last_token(nats_server: NatsServer, collector: Collector) -> None:
    async with running(nats_server, **collector.settings) as stack:
        stack.http.headers["traceparent"] = f"00-{TRACE_ID}-{PARENT_ID}-01"
        answer = await stack.chat("one two [[tokens=4 delay_ms=5]]")
        assert answer.status_code == 200
        request_id = answer.headers["x-request-id"]
        spans = await collector.trace_of(request_id, post=1, queue=1, attempt=1, prefill=1, decode=1)
        http, publish, attempt, prefill, decode = spans
        assert [span.name for span in spans] == [
            "POST /v1/chat/completions",
            "queue publish",
            "attempt",
            "prefill",
            "decode",
        ]
        assert {span.trace for span in spans} == {TRACE_ID}
        assert http.parent == PARENT_ID
        assert publish.parent == http.id
        assert attempt.parent == publish.id
        assert prefill.parent == decode.parent == attempt.id
        assert [span.service for span in spans] == ["forebay-api"] * 2 + ["forebay-inference"] * 3
        assert not any(span.failed for span in spans)
        assert http.attributes["http.response.status_code"] == 200
        assert attempt.attributes["forebay.attempt"] == 1
        assert attempt.attributes["forebay.worker"] == stack.workers[0].id
        assert attempt.attributes["forebay.outcome"] == "completed"
        assert prefill.attributes["gen_ai.usage.input_tokens"] == 4
        assert decode.attributes["gen_ai.usage.output_tokens"] == 4
        assert attempt.begin_ns <= prefill.begin_ns <= prefill.end_ns <= decode.begin_ns <= decode.end_ns
        # A timer of uvloop may end up to a millisecond early.
        assert decode.end_ns - decode.begin_ns >= 3 * 4_000_000
        assert http.end_ns - http.begin_ns >= 4 * 4_000_000
        assert not any("one two" in str(value) for span in spans for value in span.attributes.values())


async def test_every_request_begins_a_trace_of_its_own(nats_server: NatsServer, collector: Collector) -> None:
    async with running(nats_server, **collector.settings) as stack:
        answers = [await stack.chat("hi", stream=stream) for stream in (False, True)]
        traces = [
            await collector.trace_of(answer.headers["x-request-id"], post=1, queue=1, attempt=1, prefill=1, decode=1)
            for answer in answers
        ]
        assert traces[0][0].trace != traces[1][0].trace
        assert traces[0][0].parent == traces[1][0].parent == ""


async def test_a_failed_attempt_and_the_next_are_one_trace(nats_server: NatsServer, collector: Collector) -> None:
    async with running(nats_server, max_deliveries=2, **collector.settings) as stack:
        answer = await stack.chat("[[tokens=2 fail]]")
        assert answer.status_code == 500
        spans = await collector.trace_of(
            answer.headers["x-request-id"], post=1, queue=1, attempt=2, prefill=2, decode=2
        )
        first, second = (span for span in spans if span.name == "attempt")
        assert [first.attributes["forebay.attempt"], second.attributes["forebay.attempt"]] == [1, 2]
        assert first.attributes["forebay.outcome"] == "engine_fault"
        assert second.attributes["forebay.outcome"] == "failed"
        assert first.failed
        assert second.failed
        assert first.parent == second.parent
        assert spans[0].failed
        assert spans[0].attributes["http.response.status_code"] == 500


def of(chunk: ChatCompletionChunk) -> str:
    """The id of the request that a piece of an answer is of."""
    return chunk.id.removeprefix("chatcmpl-")


async def test_a_handed_over_request_stays_in_its_trace(nats_server: NatsServer, collector: Collector) -> None:
    async with running(nats_server, workers=2, drain_timeout=0, **collector.settings) as stack:
        stream = await stack.openai().chat.completions.create(
            model=MODEL, messages=user("[[tokens=400 delay_ms=20]]"), stream=True
        )
        async for chunk in stream:
            if (chunk.choices[0].delta.content or "").endswith("t3"):
                first = (await stack.reaches(of(chunk), RequestStatus.PROCESSING)).worker
                leaving, other = sorted(stack.workers, key=lambda worker: worker.id != first)
                assert await leaving.stop() == 0
        spans = await collector.trace_of(of(chunk), post=1, queue=1, attempt=2, prefill=2, decode=2)
        workers = [span.attributes["forebay.worker"] for span in spans if span.name == "attempt"]
        assert workers == [leaving.id, other.id]
        outcomes = [span.attributes["forebay.outcome"] for span in spans if span.name == "attempt"]
        assert outcomes == ["handed_over", "completed"]


async def test_a_stream_that_breaks_off_is_a_failed_trace(nats_server: NatsServer, collector: Collector) -> None:
    """Its HTTP status was sent before, and was 200."""
    async with running(nats_server, request_timeout=2, **collector.settings) as stack:
        answer = await stack.chat("[[tokens=90 delay_ms=50]]", stream=True)
        assert answer.status_code == 200
        http, *_ = await collector.trace_of(
            answer.headers["x-request-id"], post=1, queue=1, attempt=1, prefill=1, decode=1
        )
        assert http.failed
        assert http.attributes["error.type"] == "request_timeout"


async def test_a_killed_worker_leaves_its_request_in_one_trace(nats_server: NatsServer, collector: Collector) -> None:
    """It takes its own spans along; those of the attempt after it are in the trace that the message carries."""
    async with running(nats_server, max_concurrent_requests=1, **collector.settings) as stack:
        asked = asyncio.create_task(stack.chat("[[tokens=40 delay_ms=50]]"))
        request_id = (await stack.begins()).id
        await stack.workers[0].kill()
        second = await stack.worker()
        assert (await asked).status_code == 200
        spans = await collector.trace_of(request_id, post=1, queue=1, attempt=1, prefill=1, decode=1)
        (attempt,) = (span for span in spans if span.name == "attempt")
        assert (attempt.attributes["forebay.attempt"], attempt.attributes["forebay.worker"]) == (2, second.id)
        assert attempt.parent == next(span.id for span in spans if span.name == "queue publish")
        assert len({span.trace for span in spans}) == 1


async def test_a_request_that_is_refused_has_no_attempt(nats_server: NatsServer, collector: Collector) -> None:
    async with running(nats_server, **collector.settings) as stack:
        answer = await stack.chat("hi", model="none-such")
        (span,) = await collector.trace_of(answer.headers["x-request-id"], post=1)
        assert span.attributes["http.response.status_code"] == 404
        assert not span.failed


@pytest.mark.parametrize("off", [{"otel_sdk_disabled": "true"}, {"otel_traces_exporter": "none"}])
async def test_off_sends_nothing(nats_server: NatsServer, collector: Collector, off: dict[str, str]) -> None:
    async with running(nats_server, **collector.settings | off) as stack:
        assert (await stack.chat("hi")).status_code == 200
        await idle(stack)
        # What they had to send they send before they end.
        assert await stack.apis[0].stop() == await stack.workers[0].stop() == 0
        assert collector.spans == []


async def test_a_collector_that_is_away_disturbs_nobody(nats_server: NatsServer, collector: Collector) -> None:
    collector.close()
    async with running(nats_server, otel_exporter_otlp_timeout=1, **collector.settings) as stack:
        for _ in range(20):
            assert (await stack.chat("hi")).status_code == 200
        await _ends(stack)


async def _ends(stack: Stack) -> None:
    services: list[Service] = [*stack.apis, *stack.workers]
    assert [await service.stop() for service in services] == [0, 0]


@pytest.mark.parametrize(
    ("setting", "value"), [("otel_traces_exporter", "zipkin"), ("otel_exporter_otlp_protocol", "grpc")]
)
async def test_what_is_not_there_is_refused_by_name(
    nats_server: NatsServer, collector: Collector, setting: str, value: str
) -> None:
    stack = Stack(nats_server, **collector.settings | {setting: value})
    for module in ("forebay_api", "forebay_inference"):
        service = Service(module, stack.env())
        await service.launch()
        assert await service.ended() == 2
        assert setting.upper() in service.log[-1]
