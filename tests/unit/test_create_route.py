"""The route that queues a request, on the in-memory queue: what its client gets, piece by piece, and when."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any, cast

import httpx
import pytest
from starlette.types import Message, Scope

from forebay_api.http import sse
from forebay_api.http.peer import Peer
from forebay_api.routes import ENDPOINTS
from forebay_contracts.wire.state import RequestStatus
from support.api import app, post
from support.twins import MODEL, Twins, twins

CHAT = "/v1/chat/completions"


@pytest.fixture
async def system() -> AsyncIterator[Twins]:
    async with twins(max_deliveries=1) as made:
        yield made


def body(orders: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": f"[[{orders}]]"}], **fields}


class RawClient:
    """One request by ASGI, so that a test decides when its client reads and when it leaves."""

    def __init__(self, system: Twins, fields: dict[str, Any], *, reads: bool = True, **headers: str) -> None:
        self.sent: list[Message] = []
        self.changed = asyncio.Event()
        self.peer = Peer()
        self._reads = reads
        self._body: bytes | None = json.dumps(fields).encode()
        headers = {"content-type": "application/json", **headers}
        scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": CHAT,
            "query_string": b"",
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
        }
        self.peer.extend(scope)
        self.served = asyncio.ensure_future(cast(Any, app(system)(scope, self._receive, self._send)))

    async def _receive(self) -> Message:
        if self._body is not None:
            data, self._body = self._body, None
            return {"type": "http.request", "body": data, "more_body": False}
        raise AssertionError("it reads on after the body")

    async def _send(self, message: Message) -> None:
        self.sent.append(message)
        self.changed.set()
        if not self._reads and message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def has(self, count: int) -> None:
        """Wait until so many messages have been sent."""
        async with asyncio.timeout(30):
            while len(self.sent) < count:
                self.changed.clear()
                await self.changed.wait()


async def test_a_stream_and_the_whole_are_one_answer(system: Twins) -> None:
    system.worker()
    streamed = await post(system, CHAT, body("tokens=3", stream=True, stream_options={"include_usage": True}))
    assert streamed.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done, end = streamed.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    whole = (await post(system, CHAT, body("tokens=3"))).json()
    assert text == whole["choices"][0]["message"]["content"] == "t0 t1 t2"
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[0]["id"] == f"chatcmpl-{streamed.headers['x-request-id']}"
    assert not system.dispatcher.waiting


async def test_reasoning_content_and_calls_are_told_apart(system: Twins) -> None:
    system.worker()
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    messages = [{"role": "user", "content": f"[[say]]<think>\nHm.\n</think>\n\nNow.\n{call}"}]
    asked = body("", messages=messages, tools=[{"type": "function", "function": {"name": "f"}}])
    whole = (await post(system, CHAT, asked)).json()
    (choice,) = whole["choices"]
    message = choice["message"]
    assert (message["reasoning_content"], message["content"], choice["finish_reason"]) == ("Hm.", "Now.", "tool_calls")
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": len("\nHm.\n</think>") + 1}
    streamed = (await post(system, CHAT, asked | {"stream": True})).text.split("\n\n")[:-2]
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in streamed]
    for name in ("reasoning_content", "content"):
        assert "".join(delta.get(name, "") for delta in deltas) == message[name]
    assert all(delta.keys() <= {"role", "content", "refusal"} or len(delta) == 1 for delta in deltas)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_token_is_a_status(system: Twins, stream: bool) -> None:
    system.worker()
    answer = await post(system, CHAT, body("dance", stream=stream))
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


async def test_an_error_after_it_is_the_last_event(system: Twins) -> None:
    system.worker()
    answer = await post(system, CHAT, body("tokens=1 fail", stream=True))
    assert answer.status_code == 200
    assert json.loads(answer.text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["code"] == (
        "inference_failed"
    )
    assert "[DONE]" not in answer.text


async def test_nothing_is_sent_before_a_worker_has_begun(system: Twins) -> None:
    client = RawClient(system, body("tokens=1", stream=True))
    early = RawClient(system, body("tokens=1", stream=True), forebay_stream="early")
    await early.has(2)
    assert early.sent[0]["status"] == 200
    assert early.sent[1]["body"] == b": queued\n\n"
    assert not client.sent
    system.worker()
    async with asyncio.timeout(30):
        await asyncio.gather(client.served, early.served)
    assert client.sent[0]["status"] == 200
    assert client.sent[-1]["more_body"] is early.sent[-1]["more_body"] is False


async def test_a_stream_that_waits_is_kept_alive(system: Twins) -> None:
    client = RawClient(system, body("tokens=2 delay_ms=250", stream=True))
    early = RawClient(system, body("tokens=1", stream=True), forebay_stream="early")
    await early.has(4)  # no worker yet: the start, a comment that it is queued, and two that it still is
    assert [message["body"] for message in early.sent[2:]] == [sse.COMMENT] * 2
    assert not client.sent
    system.worker()
    async with asyncio.timeout(30):
        await asyncio.gather(client.served, early.served)
    bodies = [message["body"] for message in client.sent[1:]]
    first_token = next(index for index, data in enumerate(bodies) if b"t0" in data)
    assert sse.COMMENT in bodies[:first_token]
    assert sse.COMMENT in bodies[first_token:]
    assert bodies[-1].endswith(b"data: [DONE]\n\n")


async def test_a_stream_with_tokens_gets_no_comments(system: Twins) -> None:
    system.worker()
    answer = await post(system, CHAT, body("tokens=20 delay_ms=20", stream=True))
    assert b"keep-alive" not in answer.content


async def test_a_client_that_leaves_cancels_its_request(system: Twins) -> None:
    system.worker()
    client = RawClient(system, body("tokens=100 delay_ms=1000", stream=True))
    await client.has(2)
    client.peer.leave()
    await client.served
    assert client.sent[-1].get("more_body", True)
    await system.empty()
    (request_id,) = system.notices.told
    assert (await system.state(request_id)).status is RequestStatus.CANCELLED


async def test_a_client_that_left_before_its_request_was_queued_cancels_it(system: Twins) -> None:
    client = RawClient(system, body("tokens=1"))
    client.peer.leave()
    async with asyncio.timeout(30):
        await client.served
    await system.empty()
    (request_id,) = system.notices.told
    assert (await system.state(request_id)).status is RequestStatus.CANCELLED


async def test_a_client_that_does_not_read_is_given_up(system: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_WRITE_STALL_S", 0.05)
    system.worker()
    client = RawClient(system, body("tokens=100 delay_ms=1000", stream=True), reads=False)
    async with asyncio.timeout(30):
        await client.served
    assert [message["type"] for message in client.sent] == ["http.response.start", "http.response.body"]
    await system.empty()
    (request_id,) = system.notices.told
    state = await system.state(request_id)
    assert (state.status, state.error) == (RequestStatus.CANCELLED, "the client did not read its stream")


async def test_a_full_queue_is_a_503() -> None:
    async with twins(max_queue_size=1) as system:
        waiting = RawClient(system, body("tokens=1", stream=True), forebay_stream="early")
        await waiting.has(2)
        answer = await post(system, CHAT, body("tokens=1", stream=True))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_full")
        assert (answer.headers["x-should-retry"], answer.headers["retry-after"]) == ("true", "1")
        waiting.peer.leave()
        await waiting.served


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.path)
async def test_each_row_of_the_table_is_a_route(system: Twins, endpoint: Any) -> None:
    answer = await post(system, endpoint.path, {"model": MODEL})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    transport = httpx.ASGITransport(app(system))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        wrong = await client.put(endpoint.path)
        document = (await client.get("/openapi.json")).json()
    assert wrong.status_code == 405
    assert endpoint.method in wrong.headers["allow"].split(", ")
    operation = document["paths"][endpoint.path][endpoint.method.lower()]
    assert operation["summary"] == endpoint.summary
    assert endpoint.body.__name__ in document["components"]["schemas"]


async def test_an_api_that_is_stopped_ends_its_answers_with_an_error(system: Twins) -> None:
    whole, stream = (
        RawClient(system, body("tokens=1")),
        RawClient(system, body("", stream=True), forebay_stream="early"),
    )
    await stream.has(2)
    waiting = list(system.dispatcher.waiting)
    assert len(waiting) == 2
    for client in (whole, stream):
        # As uvicorn does at the end of DRAIN_TIMEOUT.
        client.served.cancel()
        await client.served
    start, end = whole.sent
    assert (start["status"], json.loads(end["body"])["error"]["code"]) == (503, "api_stopped")
    assert (b"x-should-retry", b"true") in start["headers"]
    assert b'"code":"api_stopped"' in stream.sent[-1]["body"]
    assert not stream.sent[-1].get("more_body")
    for request_id in waiting:
        assert (await system.state(request_id)).status is RequestStatus.CANCELLED


async def test_a_request_that_a_worker_here_passes_on_to_here_is_refused(system: Twins) -> None:
    first = RawClient(system, body("tokens=1", stream=True), forebay_stream="early")
    await first.has(2)
    (outer,) = waiting = dict(system.dispatcher.waiting)

    async def passed_on(outer: str) -> httpx.Response:
        return await post(system, CHAT, body("tokens=1"), **{"forebay-forwarded": outer})

    # Another Forebay may have passed it on in between.
    for told in (outer, f"{outer},theirs"):
        answer = await passed_on(told)
        assert (answer.status_code, answer.json()["error"]["code"]) == (508, "loop_detected")
        assert answer.headers["x-should-retry"] == "false"
    assert (await passed_on(",".join("abcdefghi"))).status_code == 508
    # Another api of this Forebay knows the request by its state.
    system.dispatcher.waiting.clear()
    assert (await passed_on(outer)).status_code == 508
    system.dispatcher.waiting.update(waiting)
    system.worker()
    await first.served
    for other in (outer, "theirs", "not an id, theirs"):
        assert (await passed_on(other)).status_code == 200


async def test_a_waiting_request_remembers_few_names(system: Twins) -> None:
    """Pydantic's set of the fields that were given has 728 bytes up to 18 names, and 2,264 from there on."""
    client = RawClient(system, body("tokens=1", stream=True, temperature=0.5, seed=1), forebay_stream="early")
    await client.has(2)
    (waiting,) = system.dispatcher.waiting.values()
    assert sys.getsizeof(waiting.request.model_fields_set) < 1000
    client.peer.leave()
    await client.served
