"""What is refused at the door, before anything is put into the queue: keys, sizes, models, routes and ids."""

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from support.answers import chat_body, error_of, summary, user
from support.nats import NatsServer
from support.stack import MODEL, Stack, running
from support.view import stream_state

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEY = {"authorization": "Bearer first"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(module_nats: NatsServer) -> AsyncIterator[Stack]:
    async with running(module_nats, api_keys="first, clé", max_request_bytes=2000) as found:
        yield found
        assert (await stream_state(found))["last_seq"] == 0
        assert not [line for line in found.apis[0].log if "ERROR" in line or "Traceback" in line]


async def test_unknown_model(stack: Stack) -> None:
    client = stack.openai(api_key="first")
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="gpt-17", messages=user("hi"))
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt-17")
    response = await stack.http.post(
        f"{stack.apis[0].url}/v1/completions", json={"model": "gpt-17", "prompt": "hi", "stream": True}, headers=KEY
    )
    assert summary(response) == (404, "invalid_request_error", "model_not_found", None)
    assert error_of(response)["message"] == "The model `gpt-17` does not exist or is not served here."


async def test_keys_right_and_wrong(stack: Stack) -> None:
    wrong: list[dict[str, str | bytes]] = [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer firs"},
        {"authorization": "Bearer first2"},
        {"authorization": "Bearer FIRST"},
        {"authorization": "Bearer first, clé".encode()},
        {"authorization": "Basic first"},
        {"authorization": "first"},
        {"x-api-key": "firs"},
    ]
    for headers in wrong:
        response = await stack.http.post(
            f"{stack.apis[0].url}/v1/chat/completions", json=chat_body("hi"), headers=headers
        )
        assert summary(response) == (401, "invalid_request_error", "invalid_api_key", "false"), headers
    right: list[str | bytes] = ["Bearer first", "bearer first", "Bearer  first", "Bearer clé".encode()]
    for value in right:
        response = await stack.http.get(f"{stack.apis[0].url}/v1/models", headers={"authorization": value})
        assert response.status_code == 200, value
    response = await stack.http.get(f"{stack.apis[0].url}/v1/models", headers={"x-api-key": "first"})
    assert response.status_code == 200
    with pytest.raises(openai.AuthenticationError) as caught:
        await stack.openai(api_key="second").models.list()
    assert caught.value.code == "invalid_api_key"


async def test_every_path_is_protected(stack: Stack) -> None:
    paths: dict[str, Any] = (await stack.http.get(f"{stack.apis[0].url}/openapi.json")).json()["paths"]
    routes = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert routes == {
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/embeddings"),
        ("GET", "/v1/chat/completions"),
        *((method, "/v1/chat/completions/{completion_id}") for method in ("GET", "POST", "DELETE")),
        ("GET", "/v1/chat/completions/{completion_id}/messages"),
        ("POST", "/v1/responses"),
        ("POST", "/v1/responses/input_tokens"),
        ("POST", "/v1/responses/compact"),
        *((method, "/v1/responses/{response_id}") for method in ("GET", "DELETE")),
        ("POST", "/v1/responses/{response_id}/cancel"),
        ("GET", "/v1/responses/{response_id}/input_items"),
        ("POST", "/v1/conversations"),
        *((method, "/v1/conversations/{conversation_id}") for method in ("GET", "POST", "DELETE")),
        *((method, "/v1/conversations/{conversation_id}/items") for method in ("GET", "POST")),
        *((method, "/v1/conversations/{conversation_id}/items/{item_id}") for method in ("GET", "DELETE")),
        ("POST", "/v1/messages"),
        ("POST", "/v1/messages/count_tokens"),
        ("POST", "/v1/rerank"),
        ("POST", "/v2/rerank"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/{name}"),
        ("GET", "/v1/queue/status"),
        ("GET", "/v1/queue/events"),
        ("GET", "/v1/queue/request/{request_id}"),
        ("DELETE", "/v1/queue/request/{request_id}"),
        ("POST", "/v1/queue/request/{request_id}/retry"),
        ("GET", "/v1/queue/failed"),
        ("GET", "/v1/queue/request/{request_id}/answer"),
        *(("GET", f"/v1/queue/{what}") for what in ("requests", "recent", "history")),
        *(("POST", f"/v1/queue/{order}") for order in ("pause", "resume", "drain")),
        ("GET", "/v1/usage"),
        *((method, "/v1/files") for method in ("GET", "POST")),
        *((method, "/v1/files/{file_id}") for method in ("GET", "DELETE")),
        ("GET", "/v1/files/{file_id}/content"),
        *((method, "/v1/batches") for method in ("GET", "POST")),
        ("GET", "/v1/batches/{batch_id}"),
        ("POST", "/v1/batches/{batch_id}/cancel"),
        ("GET", "/health/live"),
        ("GET", "/health/ready"),
        ("GET", "/metrics"),
    }
    for method, path in sorted(routes):
        address = stack.apis[0].url + path.replace("{name}", MODEL).replace("{request_id}", "x")
        bare = await stack.http.request(method, address)
        assert bare.headers["x-request-id"]
        if path.startswith(("/health", "/metrics")):
            assert bare.status_code == 200
            continue
        if path.startswith("/v1/messages"):  # has another shape
            assert (bare.status_code, bare.json()["error"]["type"]) == (401, "authentication_error")
        else:
            assert summary(bare) == (401, "invalid_request_error", "invalid_api_key", "false")
        if path != "/v1/queue/events":  # with a key it goes on for ever: see test_events.py
            assert (await stack.http.request(method, address, headers=KEY)).status_code in (200, 400, 404)


async def test_too_large(stack: Stack) -> None:
    large = json.dumps(chat_body("x" * 5_000_000)).encode()
    exact = json.dumps(chat_body("")).encode()
    exact = exact[:-1] + b" " * (2000 - len(exact)) + b"}"

    async def in_pieces(body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1500):
            yield body[start : start + 1500]

    for path in ("chat/completions", "completions"):
        address = f"{stack.apis[0].url}/v1/{path}"
        for content in (large, in_pieces(large), exact + b" ", in_pieces(exact + b" ")):
            response = await stack.http.post(address, content=content, headers=KEY)
            assert summary(response) == (413, "invalid_request_error", "request_too_large", None)
        # Without a key nothing is read.
        assert (await stack.http.post(address, content=large)).status_code == 401
    wrong_model = exact.replace(MODEL.encode(), b"n" * len(MODEL))
    for content in (wrong_model, in_pieces(wrong_model)):
        response = await stack.http.post(f"{stack.apis[0].url}/v1/chat/completions", content=content, headers=KEY)
        assert response.status_code == 404, "a body of just the limit is read"


async def test_with_keys_no_name_page_or_type_matters(stack: Stack) -> None:
    url = f"{stack.apis[0].url}/v1/completions"
    elsewhere = {"host": "forebay.example.com", "origin": "https://example.com", "sec-fetch-site": "cross-site"}
    for content_type in ({}, {"content-type": "text/plain"}):
        answer = await stack.http.post(
            url, content=b'{"model": "gpt-17", "prompt": "a"}', headers=KEY | content_type | elsewhere
        )
        assert answer.status_code == 404


async def test_no_such_route(stack: Stack) -> None:
    for method, path, status in [
        ("GET", "/nowhere", 404),
        ("GET", "/v1", 404),
        ("POST", "/v1/images/generations", 404),
        ("GET", "/v1/queue/request/", 404),
        ("GET", "/v1/queue/request/a/b", 404),
        ("GET", "/v1/completions", 405),
        ("PUT", "/v1/models", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
        ("DELETE", "/v1/queue/status", 405),
        ("PATCH", "/health/live", 405),
    ]:
        response = await stack.http.request(method, stack.apis[0].url + path, headers=KEY)
        assert summary(response) == (status, "invalid_request_error", None, None), (method, path)
        assert error_of(response)["message"].startswith(f"{method} {path}: ")
        assert ("allow" in response.headers) == (status == 405)


async def test_a_base_url_without_v1_is_told(stack: Stack) -> None:
    for method, path, told in [("GET", "/models", True), ("POST", "/chat/completions", True), ("GET", "/no", False)]:
        message = error_of(await stack.http.request(method, stack.apis[0].url + path, headers=KEY))["message"]
        assert message.endswith("; the base URL of an OpenAI client ends in /v1") == told, path


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/chat/completions", {"GET", "HEAD", "POST"}),
        ("HEAD", "/v1/embeddings", {"POST"}),
        ("OPTIONS", "/v1/models", {"GET", "HEAD"}),
        ("OPTIONS", "/v1/queue/request/x", {"GET", "HEAD", "DELETE"}),
        ("POST", "/openapi.json", {"GET", "HEAD"}),
    ],
)
async def test_allow_names_every_method_of_a_path(stack: Stack, method: str, path: str, allowed: set[str]) -> None:
    response = await stack.http.request(method, stack.apis[0].url + path, headers=KEY)
    assert response.status_code == 405
    assert set(response.headers["allow"].split(", ")) == allowed


async def test_options_names_every_method_of_every_path(stack: Stack) -> None:
    paths: dict[str, Any] = (await stack.http.get(f"{stack.apis[0].url}/openapi.json")).json()["paths"]
    for path, described in paths.items():
        methods = {method.upper() for method in described}
        response = await stack.http.options(stack.apis[0].url + path.replace("{", "").replace("}", ""), headers=KEY)
        assert response.status_code == 405
        allowed = methods | ({"HEAD"} if "GET" in methods else set())
        # These paths also name a response.
        names_a_response = path in ("/v1/responses/input_tokens", "/v1/responses/compact")
        allowed |= {"GET", "HEAD", "DELETE"} if names_a_response else set()
        assert set(response.headers["allow"].split(", ")) == allowed, path


async def test_head_is_answered_where_get_is(stack: Stack) -> None:
    for path in (
        "/v1/models",
        "/v1/queue/status",
        "/v1/queue/events",
        "/health/live",
        "/metrics",
        "/",
        "/openapi.json",
    ):
        url = stack.apis[0].url + path
        head = await stack.http.head(url, headers=KEY)
        assert (head.status_code, head.content) == (200, b""), path
        assert head.headers["x-request-id"]
        async with stack.http.stream("GET", url, headers=KEY) as full:
            assert head.headers["content-type"] == full.headers["content-type"]
    assert (await stack.http.head(f"{stack.apis[0].url}/v1/models")).status_code == 401
    assert (await stack.http.head(f"{stack.apis[0].url}/nowhere")).status_code == 404


async def test_health_is_the_readiness(stack: Stack) -> None:
    short, ready = [await stack.http.get(stack.apis[0].url + path) for path in ("/health", "/health/ready")]
    assert (short.status_code, short.json().keys()) == (200, ready.json().keys())


async def test_odd_ids(stack: Stack) -> None:
    for method in ("GET", "DELETE"):
        for odd in ("unknown", "*", "%3E", "a.b", "a%20b", "a%0D%0APUB%20x%200", "%00", "%E2%82%AC", "a" * 129, "..."):
            response = await stack.http.request(method, f"{stack.apis[0].url}/v1/queue/request/{odd}", headers=KEY)
            assert summary(response) == (404, "invalid_request_error", "request_not_found", None), (method, odd)
