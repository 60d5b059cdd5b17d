"""Bodies that cannot be served: 400 with OpenAI's `type`, `param` and `code`, and nothing in the queue."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from support.nats import NatsServer
from support.stack import MODEL, Stack, running
from support.view import stream_state

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": MODEL, "prompt": "hi"}
TOOL = {"type": "function", "function": {"name": "look_up"}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(module_nats: NatsServer) -> AsyncIterator[Stack]:
    async with running(module_nats, max_concurrent_requests=4) as found:
        yield found


async def post(stack: Stack, path: str, content: bytes | str) -> httpx.Response:
    headers = {"content-type": "application/json"}
    return await stack.http.post(f"{stack.apis[0].url}/v1/{path}", content=content, headers=headers)


async def refused(stack: Stack, path: str, content: bytes | str) -> dict[str, Any]:
    """The error of a body that must be refused, with what all such answers have in common checked."""
    before = (await stream_state(stack))["last_seq"]
    response = await post(stack, path, content)
    assert response.status_code == 400, response.text
    assert response.headers["content-type"] == "application/json"
    assert len(response.headers["x-request-id"]) == 36
    (key,) = response.json()
    error: dict[str, Any] = response.json()[key]
    assert key == "error"
    assert list(error) == ["message", "type", "param", "code"]
    assert error["type"] == "invalid_request_error"
    assert isinstance(error["message"], str)
    assert error["message"]
    for inside in ("pydantic", "tuple", "Traceback", ".py"):
        assert inside not in error["message"].lower()
    assert (await stream_state(stack))["last_seq"] == before
    return error


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"model": None}, "model", "missing_required_parameter"),
        ({"model": 5}, "model", "invalid_type"),
        ({"model": ""}, "model", "empty_string"),
        ({"model": "m" * 513}, "model", "string_above_max_length"),
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"messages": []}, "messages", "empty_array"),
        ({"messages": "hi"}, "messages", "invalid_type"),
        ({"messages": ["hi"]}, "messages[0]", "invalid_type"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{"role": "bot", "content": "hi"}]}, "messages[0].role", "invalid_value"),
        ({"messages": user(5)}, "messages[0].content", "invalid_type"),
        ({"messages": [*user("hi"), *user([5])]}, "messages[1].content[0]", "invalid_type"),
        ({"messages": user([{"type": "image_url"}])}, "messages[0].content[0].type", "invalid_value"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
            "missing_required_parameter",
        ),
        ({"unheard_of": 1}, "unheard_of", "unknown_parameter"),
        ({"functions": []}, "functions", "unknown_parameter"),
        ({"prompt": "hi"}, "prompt", "unknown_parameter"),
        ({"n": 0}, "n", "integer_below_min_value"),
        ({"n": 129}, "n", "integer_above_max_value"),
        ({"n": 10**30}, "n", "integer_above_max_value"),
        ({"n": "2"}, "n", "invalid_type"),
        ({"n": 1.5}, "n", "invalid_type"),
        ({"n": True}, "n", "invalid_type"),
        ({"n": [1]}, "n", "invalid_type"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"stream": 1}, "stream", "invalid_type"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": []}, "stream_options", "invalid_type"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown_parameter"),
        (
            {"stream": True, "stream_options": {"include_usage": 1}},
            "stream_options.include_usage",
            "invalid_type",
        ),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": "0.5"}, "temperature", "invalid_type"),
        ({"temperature": 2.01}, "temperature", "decimal_above_max_value"),
        ({"temperature": -0.1}, "temperature", "decimal_below_min_value"),
        ({"top_p": -0.1}, "top_p", "decimal_below_min_value"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "decimal_above_max_value"),
        ({"presence_penalty": -2.5}, "presence_penalty", "decimal_below_min_value"),
        ({"stop": ["a"] * 17}, "stop", "array_above_max_length"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "integer_below_min_value"),
        ({"guided_regex": ""}, "guided_regex", "empty_string"),
        ({"stop": 5}, "stop", "invalid_type"),
        ({"stop": ["a", 5]}, "stop[1]", "invalid_type"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "decimal_above_max_value"),
        ({"logit_bias": {"5": "1"}}, "logit_bias.5", "invalid_type"),
        ({"logit_bias": {"word": 1}}, "logit_bias.word", "invalid_type"),
        ({"logit_bias": [1]}, "logit_bias", "invalid_type"),
        ({"seed": 2**63}, "seed", "integer_above_max_value"),
        ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
        ({"max_completion_tokens": -2}, "max_completion_tokens", "integer_below_min_value"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "invalid_value"),
        ({"logprobs": 5}, "logprobs", "invalid_type"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "invalid_value"),
        ({"tool_choice": "auto"}, "tool_choice", "invalid_value"),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice", "invalid_value"),
        ({"tools": [TOOL], "tool_choice": 5}, "tool_choice", "invalid_value"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function"}},
            "tool_choice.function",
            "missing_required_parameter",
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
            "tool_choice",
            "invalid_value",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "invalid_value"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema.name",
            "missing_required_parameter",
        ),
        ({"metadata": {"a": 1}}, "metadata.a", "invalid_type"),
        ({"modalities": ["text", "audio"]}, "modalities[1]", "invalid_value"),
        ({"service_tier": "gold"}, "service_tier", "invalid_value"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
async def test_chat_body(stack: Stack, fields: dict[str, Any], param: str, code: str) -> None:
    error = await refused(stack, "chat/completions", json.dumps(CHAT | fields))
    assert (error["param"], error["code"]) == (param, code)
    assert param in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": None}, "prompt", "missing_required_parameter"),
        ({"prompt": 5}, "prompt", "invalid_type"),
        ({"prompt": {"text": "hi"}}, "prompt", "invalid_type"),
        ({"prompt": []}, "prompt", "empty_array"),
        ({"prompt": [[]]}, "prompt[0]", "empty_array"),
        ({"prompt": [1, -1]}, "prompt[1]", "integer_below_min_value"),
        ({"prompt": [[1, "a"]]}, "prompt[0][1]", "invalid_type"),
        ({"prompt": [1.5]}, "prompt[0]", "invalid_type"),
        ({"prompt": ["hi"] * 129}, "prompt", "invalid_value"),
        ({"prompt": ["hi"] * 65, "n": 2}, "prompt", "invalid_value"),
        ({"messages": []}, "messages", "unknown_parameter"),
        ({"best_of": 1, "n": 2}, "best_of", "invalid_value"),
        ({"best_of": 2, "stream": True}, "best_of", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": -2}, "max_tokens", "integer_below_min_value"),
        ({"logprobs": 6}, "logprobs", "integer_above_max_value"),
        ({"logprobs": True}, "logprobs", "invalid_type"),
        ({"suffix": "end"}, "suffix", "invalid_value"),
        ({"echo": "yes"}, "echo", "invalid_type"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
async def test_completion_body(stack: Stack, fields: dict[str, Any], param: str, code: str) -> None:
    error = await refused(stack, "completions", json.dumps(COMPLETION | fields))
    assert (error["param"], error["code"]) == (param, code)
    assert param in error["message"]


def chat_with(fragment: bytes) -> bytes:
    """A chat body with one more member, as raw JSON."""
    return json.dumps(CHAT).encode()[:-1] + b"," + fragment + b"}"


@pytest.mark.parametrize(
    ("content", "param", "code"),
    [
        (b"", None, None),
        (b"{", None, None),
        (b"model=x&prompt=y", None, None),
        (b"{\"model\": 'x'}", None, None),
        (b'{"model": "\xff\xfe"}', None, None),
        (json.dumps(CHAT).encode("utf-16"), None, None),
        (b'{"a":' * 100_000, None, None),
        (b"[" * 1000 + b"]" * 1000, None, None),
        (chat_with(b'"chat_template_kwargs":' + b'{"a":' * 250 + b"1" + b"}" * 250), None, None),
        (b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}', None, None),
        (b"[]", None, "invalid_type"),
        (b"null", None, "invalid_type"),
        (b'"hi"', None, "invalid_type"),
        (b"5", None, "invalid_type"),
        (b"{}", "model", "missing_required_parameter"),
        (chat_with(b'"temperature":NaN'), "temperature", "invalid_value"),
        (chat_with(b'"temperature":Infinity'), "temperature", "invalid_value"),
        (chat_with(b'"top_p":1e400'), "top_p", "invalid_value"),
        (chat_with(b'"logit_bias":{"1":NaN}'), "logit_bias.1", "invalid_value"),
        (chat_with(b'"seed":' + b"9" * 5000), None, None),
        (chat_with(b'"n":1,"n":0'), "n", "integer_below_min_value"),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, bytes) else None,
)
async def test_raw_body(stack: Stack, content: bytes, param: str | None, code: str | None) -> None:
    error = await refused(stack, "chat/completions", content)
    assert (error["param"], error["code"]) == (param, code)


async def test_sdk_raises_bad_request(stack: Stack) -> None:
    client = stack.openai()
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model=MODEL, messages=[], temperature=1)
    error = caught.value
    assert (error.status_code, error.type) == (400, "invalid_request_error")
    assert (error.param, error.code) == ("messages", "empty_array")
    assert error.request_id == error.response.headers["x-request-id"]


async def test_nothing_of_a_body_is_repeated(stack: Stack) -> None:
    error = await refused(stack, "chat/completions", json.dumps(CHAT | {"user": {"secret": "open sesame"}}))
    assert "sesame" not in json.dumps(error)


# fmt: off
OPTIONAL = (
    "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "seed", "stop", "stream", "stream_options", "user", "metadata",
    "store", "service_tier", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "tools",
    "tool_choice", "parallel_tool_calls", "response_format", "modalities", "reasoning_effort",
)
# fmt: on

ODD_BUT_FINE: list[dict[str, Any]] = [
    dict.fromkeys(OPTIONAL),
    {"audio": None, "prediction": None},
    {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "prompt_cache_key": "k"},
    {"temperature": 0, "top_p": 1, "frequency_penalty": 2, "presence_penalty": -2},
    {"logit_bias": {"0": -100, "50256": 100}},
    {"stop": "x"},
    {"stop": ["a", "b", "c", "d"]},
    {"seed": -(2**63)},
    {"response_format": {"type": "text"}},
    {"stream": False, "stream_options": None},
    {"tools": [], "tool_choice": "none"},
    {"max_tokens": 3, "max_completion_tokens": 3},
    {"chat_template_kwargs": json.loads('{"a":' * 150 + "1" + "}" * 150)},
    {"messages": [{"role": "user", "content": "\u0000 \U0001f600 \u202e é", "name": "x" * 1000}]},
    {"messages": user([])},
    {"messages": user("")},
]


@pytest.mark.parametrize("fields", ODD_BUT_FINE, ids=lambda value: json.dumps(value)[:40])
async def test_odd_but_fine(stack: Stack, fields: dict[str, Any]) -> None:
    response = await post(stack, "chat/completions", json.dumps(CHAT | fields))
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"].startswith("t0 t1 t2")
