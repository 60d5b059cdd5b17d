"""What a client may send, for how long, and from which pages: tried with bare sockets."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.typing import Origin

from support.answers import chat_body, summary
from support.nats import NatsServer
from support.service import Api
from support.stack import MODEL, Stack, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

GET = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
ORIGIN = "https://chat.example.com"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(module_nats: NatsServer) -> AsyncIterator[Stack]:
    async with running(module_nats, body_timeout=1, cors_origins=f"{ORIGIN},http://localhost:3000") as found:
        yield found
        assert not [line for line in found.apis[0].log if "ERROR" in line or "Traceback" in line]


async def send(api: Api, *pieces: bytes, timeout_s: float = 30) -> bytes:
    """What comes back until the api closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    async with asyncio.timeout(timeout_s):
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(65536):
                answer += piece
    writer.close()
    return answer


def refused(answer: bytes, status: int) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert b"connection: close" in head
    assert list(json.loads(body)["error"]) == ["message", "type", "param", "code"]


async def test_headers_too_large(stack: Stack) -> None:
    api = stack.apis[0]
    many = b"".join(b"x-%d: y\r\n" % n for n in range(101))
    for head in (
        GET + b"x-large: " + b"y" * 33_000 + b"\r\n\r\n",
        GET + b"x-large: " + b"y" * 33_000,
        GET + many + b"\r\n",
        b"GET /" + b"y" * 33_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /" + b"y" * 33_000,
    ):
        refused(await send(api, head), 431)
    fits = GET + b"x-large: " + b"y" * 30_000 + b"\r\nconnection: close\r\n\r\n"
    assert (await send(api, fits)).startswith(b"HTTP/1.1 200 ")


async def test_head_and_body_leave_together(stack: Stack) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.apis[0].port)
    async with asyncio.timeout(30):
        writer.write(GET + b"\r\n")
        head, _, body = (await reader.read(65536)).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.1 200 ")
    assert json.loads(body)["object"] == "list"


async def test_trailers_without_an_end(stack: Stack) -> None:
    chunked = POST + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
    answer = await send(stack.apis[0], chunked, b"x-trailer: ", *[b"y" * 60_000] * 20)
    # Closed while more was on its way: the reset of the connection may overtake the answer.
    assert answer[:13] in (b"", b"HTTP/1.1 431 ")


async def test_headers_that_do_not_come(stack: Stack) -> None:
    # At once, for they are waited for as long as they may take.
    async def slowly(*pieces: bytes) -> bytes:
        return await send(stack.apis[0], *pieces)

    answers = await asyncio.gather(slowly(), slowly(GET), slowly(b"\r\n"), slowly(GET + b"x-a: b\r\n"))
    for answer in answers:
        refused(answer, 408)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /v1/models HTTP/1.1\r\nhost x\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\nhost: x\r\n\r\n",
        POST + b"content-length: many\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        b"CONNECT example.com:443 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /v1/models HTTP/1.2\r\nhost: x\r\n\r\n",
        b"get /v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
        "GET /v1/models/é HTTP/1.1\r\nhost: x\r\n\r\n".encode(),
        b"GET /v1/models HTTP/1.1\nhost: x\n\n",
        GET + b"x: a\0b\r\n\r\n",
        GET + b"x: a\r\n b\r\n\r\n",
        POST + b"content-length: -1\r\n\r\n",
        POST + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        POST + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"transfer-encoding: gzip\r\n\r\n{}",
        POST + b"transfer-encoding: chunked\r\n\r\n2\r\n{}XX0\r\n\r\n",
    ],
)
async def test_what_is_not_http_gets_an_error_in_the_usual_shape(stack: Stack, request_bytes: bytes) -> None:
    refused(await send(stack.apis[0], request_bytes), 400)


async def test_requests_before_one_that_is_not_http_are_answered(stack: Stack) -> None:
    body = json.dumps(chat_body("[[tokens=3 delay_ms=20]]")).encode()
    whole = POST + b"content-length: %d\r\n\r\n" % len(body) + body
    answer = await send(stack.apis[0], whole + GET + b"\r\nnonsense\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200 ") == 2
    assert b'"content":"t0 t1 t2"' in answer
    assert b'"object":"list"' in answer


async def test_an_offer_to_upgrade_is_ignored(stack: Stack) -> None:
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "[[tokens=2]]"}]}).encode()
    offer = POST + b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"
    head = offer + b"content-length: %d\r\n\r\n" % len(body)
    chunked = offer + b"transfer-encoding: chunked\r\n\r\n%x\r\n" % len(body)
    last = GET + b"connection: close\r\n\r\n"
    for pieces in ((head + body,), (head, body[:9], body[9:]), (chunked + body + b"\r\n0\r\n\r\n",)):
        answer = await send(stack.apis[0], *pieces, last)
        assert b'"content":"t0 t1"' in answer
        assert answer.count(b"HTTP/1.1 200 ") == 2  # the connection goes on
    socket = GET + b"connection: upgrade, close\r\nupgrade: websocket\r\nsec-websocket-key: x\r\n\r\n"
    assert (await send(stack.apis[0], socket)).startswith(b"HTTP/1.1 200 ")


async def test_a_body_that_does_not_come(stack: Stack) -> None:
    refused(await send(stack.apis[0], POST + b"content-length: 100\r\n\r\n{"), 408)
    refused(await send(stack.apis[0], POST + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n"), 408)
    # Answered before its body is there, and then not kept open for it.
    answer = await send(stack.apis[0], GET + b"content-length: 100\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1") <= 2


async def test_a_large_body_comes_in_pieces_with_and_without_a_length(stack: Stack) -> None:
    said = [{"role": "user", "content": "[[tokens=2]]"}]
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "x" * 300_000}, *said]}).encode()
    head = POST + b"connection: close\r\n"
    pieces = [body[at : at + 50_000] for at in range(0, len(body), 50_000)]
    chunks = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces]
    for sent in (
        (head + b"content-length: %d\r\n\r\n" % len(body), *pieces),
        (head + b"transfer-encoding: chunked\r\n\r\n", *chunks, b"0\r\n\r\n"),
    ):
        assert b'"content":"t0 t1"' in await send(stack.apis[0], *sent)
    # Refused at its length, or once more than the limit has come; what follows is read and dropped.
    more = [b" " * 60_000] * 20
    for sent in (
        (POST + b"content-length: 1200000\r\n\r\n", *more, GET + b"connection: close\r\n\r\n"),
        (POST + b"transfer-encoding: chunked\r\n\r\n", *[b"ea60\r\n%b\r\n" % piece for piece in more]),
    ):
        assert (await send(stack.apis[0], *sent)).startswith(b"HTTP/1.1 413 ")


async def test_an_answer_outlasts_the_time_for_a_body(stack: Stack) -> None:
    text = "[[tokens=15 delay_ms=100]]"
    body = json.dumps({"model": MODEL, "stream": True, "messages": [{"role": "user", "content": text}]}).encode()
    head = POST + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
    answer = await send(stack.apis[0], head, body)
    assert b"data: [DONE]" in answer


async def test_no_other_page_may_call_but_those_that_are_named(stack: Stack) -> None:
    url = f"{stack.apis[0].url}/v1/chat/completions"
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    for origin in (ORIGIN, "http://localhost:3000"):
        answer = await stack.http.options(url, headers={"origin": origin} | asked)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    answer = await stack.http.options(url, headers={"origin": "https://evil.example.com"} | asked)
    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers
    answer = await stack.http.get(f"{stack.apis[0].url}/v1/models", headers={"origin": ORIGIN})
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "x-request-id" in answer.headers["access-control-expose-headers"]


async def test_without_the_setting_no_page_may_call(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0) as closed:
        answer = await closed.http.options(
            f"{closed.apis[0].url}/v1/models", headers={"origin": ORIGIN, "access-control-request-method": "GET"}
        )
        assert answer.status_code == 405
        answer = await closed.http.get(f"{closed.apis[0].url}/v1/models", headers={"origin": ORIGIN})
        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_without_keys_other_sites_are_not_served(stack: Stack) -> None:
    url, rebound = stack.apis[0].url, {"host": "attacker.example"}
    before = (await stack.status())["total_queued"]
    simple = {"content-type": "text/plain"}  # a page may send it without asking
    for headers, status, code in (
        (simple | {"origin": "https://attacker.example"}, 403, "foreign_origin"),
        (simple, 415, "unsupported_media_type"),
        (simple | rebound, 421, "unknown_host"),
    ):
        answer = await stack.http.post(
            f"{url}/v1/chat/completions", content=json.dumps(chat_body("hi")), headers=headers
        )
        assert summary(answer) == (status, "invalid_request_error", code, None)
    for path in ("status", "events", "request/x"):
        answer = await stack.http.get(f"{url}/v1/queue/{path}", headers=rebound)
        assert summary(answer) == (421, "invalid_request_error", "unknown_host", None)
    assert (await stack.status())["total_queued"] == before
    # Probes ask by the address of a pod or the name of a service, and links lead to the page.
    for path in ("/health/live", "/health/ready", "/health", "/metrics", "/", "/docs"):
        link = {"host": "forebay-api.forebay.svc", "sec-fetch-site": "cross-site", "sec-fetch-dest": "document"}
        assert (await stack.http.get(url + path, headers=link)).status_code == 200


async def test_every_answer_is_what_it_says_it_is(stack: Stack) -> None:
    for path in ("/", "/v1/models", "/nowhere", "/health/live", "/metrics", "/v1/models/"):
        answer = await stack.http.get(stack.apis[0].url + path)
        assert answer.headers.get_list("x-content-type-options") == ["nosniff"]
    # No redirect: it would lead a client behind a proxy to an address that it cannot reach.
    assert (await stack.http.get(stack.apis[0].url + "/health/live/")).status_code == 404
    page = (await stack.http.get(stack.apis[0].url + "/")).headers
    assert "unsafe" not in page["content-security-policy"]
    assert "frame-ancestors 'none'" in page["content-security-policy"]
    assert page["permissions-policy"]


async def test_a_connection_becomes_a_websocket_at_responses(stack: Stack) -> None:
    url, event = f"ws://localhost:{stack.apis[0].port}/v1/responses", {"type": "response.create", "model": MODEL}

    async def end_of(socket: ClientConnection, **fields: object) -> dict[str, Any]:
        await socket.send(json.dumps(event | {"store": False, "input": "[[tokens=2]]"} | fields))
        async for message in socket:
            found: dict[str, Any] = json.loads(message)
            if found["type"] in ("response.completed", "error"):
                return found
        raise AssertionError("it was closed")

    async with connect(url) as socket:
        first = (await end_of(socket))["response"]
        assert first["output"][0]["content"][0]["text"] == "t0 t1"
        foreign = [{"type": "function_call_output", "call_id": "a", "output": "b"}]
        assert (await end_of(socket, previous_response_id=first["id"], input=foreign))["status"] == 400
        forgotten = await end_of(socket, previous_response_id=first["id"])
        assert forgotten["error"]["code"] == "previous_response_not_found"
        with pytest.raises(ConnectionClosedError, match="1009"):
            await end_of(socket, input="x" * 1_000_000)
    with pytest.raises(InvalidStatus, match="403"):
        await connect(url, origin=Origin("https://example.com"))
    offer = GET.replace(b"/v1/models", b"/v1/responses") + b"connection: upgrade, close\r\nupgrade: websocket\r\n\r\n"
    assert (await send(stack.apis[0], offer)).startswith(b"HTTP/1.1 400 ")
