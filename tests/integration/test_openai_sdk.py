"""What OpenAI's own clients get: the SDK as it is, and the reference document's examples as they stand."""

import asyncio
import json
import re
import subprocess
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from forebay_contracts.wire.state import RequestStatus
from support.nats import NatsServer
from support.stack import MODEL, Stack, running
from support.view import idle

pytestmark = pytest.mark.asyncio(loop_scope="module")

FULL_NAME = f"HuggingFaceTB/{MODEL}"
KEY = "your-api-key"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(module_nats: NatsServer) -> AsyncIterator[Stack]:
    settings: dict[str, Any] = {"max_concurrent_requests": 4, "api_keys": KEY, "model_aliases": "your-model, gpt-4o"}
    async with running(module_nats, **settings) as found:
        found.http.headers["authorization"] = f"Bearer {KEY}"
        yield found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(stack: Stack) -> openai.AsyncOpenAI:
    return stack.openai(api_key=KEY)


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def is_uuid4(text: str) -> bool:
    return str(uuid.UUID(text, version=4)) == text


async def chunks(stream: AsyncIterator[Any]) -> list[Any]:
    return [chunk async for chunk in stream]


async def test_comments_in_a_stream_that_waits(stack: Stack) -> None:
    await stack.api(stream_keep_alive=0.05)
    client = stack.openai(api=1, api_key=KEY)
    asked: dict[str, Any] = {"model": MODEL, "messages": user("[[tokens=3 delay_ms=200]]"), "stream": True}
    async with client.chat.completions.with_streaming_response.create(**asked) as raw:
        lines = [line async for line in raw.iter_lines()]
    assert ": keep-alive" in lines
    found = await chunks(await client.chat.completions.create(**asked))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in found) == "t0 t1 t2"


async def test_chat(client: openai.AsyncOpenAI) -> None:
    before = int(time.time())
    answer = await client.chat.completions.create(model=MODEL, messages=user("one two [[tokens=4]]"))
    assert isinstance(answer, ChatCompletion)
    assert answer.object == "chat.completion"
    assert before <= answer.created <= time.time()
    assert answer.model == FULL_NAME
    assert answer.id.startswith("chatcmpl-")
    assert is_uuid4(answer.id.removeprefix("chatcmpl-"))
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content, choice.message.refusal) == ("assistant", "t0 t1 t2 t3", None)
    assert choice.message.tool_calls is None
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 4, 7)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_chat_streamed(client: openai.AsyncOpenAI) -> None:
    # Tokens of one frame come together; these do not.
    asked = user("[[tokens=3 delay_ms=20]]")
    stream = await client.chat.completions.create(model=MODEL, messages=asked, stream=True)
    got = await chunks(stream)
    assert all(isinstance(chunk, ChatCompletionChunk) for chunk in got)
    assert {chunk.object for chunk in got} == {"chat.completion.chunk"}
    assert {chunk.model for chunk in got} == {FULL_NAME}
    assert len({(chunk.id, chunk.created) for chunk in got}) == 1
    assert is_uuid4(got[0].id.removeprefix("chatcmpl-"))
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in got)
    choices = [chunk.choices[0] for chunk in got]
    assert [choice.delta.content for choice in choices] == ["", "t0", " t1", " t2", None]
    assert [choice.delta.role for choice in choices] == ["assistant", None, None, None, None]
    assert [choice.finish_reason for choice in choices] == [None, None, None, None, "stop"]


async def test_chat_streamed_with_usage(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=user("a b [[tokens=3 delay_ms=20]]"), stream=True, stream_options={"include_usage": True}
    )
    *body, last = await chunks(stream)
    assert [chunk.usage for chunk in body] == [None] * 5
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (4, 3, 7)


async def test_chat_stream_helper(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model=MODEL, messages=user("[[tokens=3]]")) as stream:
        kinds = [event.type async for event in stream]
        answer = await stream.get_final_completion()
    assert kinds[-1] == "content.done"
    assert answer.choices[0].message.content == "t0 t1 t2"
    assert answer.choices[0].finish_reason == "stop"


async def test_stream_on_the_wire(stack: Stack) -> None:
    response = await stack.chat("[[tokens=2]]", stream=True)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert "content-length" not in response.headers
    events = response.text.split("\n\n")
    assert len(events) == 6
    assert all(event.startswith("data: {") for event in events[:4])
    assert events[4:] == ["data: [DONE]", ""]
    assert all('"usage"' not in event for event in events)


async def test_stream_comes_as_it_is_made(client: openai.AsyncOpenAI, stack: Stack) -> None:
    text = "[[tokens=1000 delay_ms=50]]"
    async with await client.chat.completions.create(model=MODEL, messages=user(text), stream=True) as stream:
        async for chunk in stream:
            if (chunk.choices[0].delta.content or "").endswith("t3"):
                break
        begun_or_ended = [status for status in RequestStatus if status is not RequestStatus.QUEUED]
        state = await stack.reaches(chunk.id.removeprefix("chatcmpl-"), *begun_or_ended)
        # Nearly all of it is still to be made.
        assert state.status is RequestStatus.PROCESSING
    await idle(stack)


async def test_limit_of_tokens(client: openai.AsyncOpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = await client.chat.completions.create(model=MODEL, messages=user("[[tokens=9]]"), extra_body={name: 2})
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("t0 t1", "length")
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 2


async def test_choices(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=user("[[tokens=2]]"), n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == ["t0 t1"] * 3
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1, 6)


async def test_choices_streamed(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model=MODEL, messages=user("[[tokens=2]]"), n=2, stream=True)
    texts, reasons, roles = {0: "", 1: ""}, {}, []
    async for chunk in stream:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.delta.role:
            roles.append((choice.index, choice.delta.role))
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert texts == {0: "t0 t1", 1: "t0 t1"}
    assert reasons == {0: "stop", 1: "stop"}
    assert roles == [(0, "assistant"), (1, "assistant")]


async def test_content_parts_and_roles(client: openai.AsyncOpenAI) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "hi", "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
        ]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
        {"role": "user", "content": [{"type": "text", "text": "[[tok"}, {"type": "text", "text": "ens=1]]"}]},
    ]  # fmt: skip
    answer = await client.chat.completions.create(model=MODEL, messages=messages)
    assert answer.choices[0].message.content == "t0"


async def test_completion(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt="one [[tokens=3]]")
    assert isinstance(answer, Completion)
    assert (answer.object, answer.model) == ("text_completion", FULL_NAME)
    assert is_uuid4(answer.id.removeprefix("cmpl-"))
    (choice,) = answer.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, "t0 t1 t2", "stop", None)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 3, 5)


async def test_completion_has_sixteen_tokens_by_default(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt="[[tokens=20]]")
    assert answer.choices[0].text.split() == [f"t{n}" for n in range(16)]
    assert answer.choices[0].finish_reason == "length"


async def test_completion_streamed_with_usage(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model=MODEL, prompt="[[tokens=3 delay_ms=20]]", stream=True, stream_options={"include_usage": True}
    )
    *body, last = await chunks(stream)
    assert [chunk.choices[0].text for chunk in body] == ["t0", " t1", " t2", ""]
    assert [chunk.choices[0].finish_reason for chunk in body] == [None, None, None, "stop"]
    assert len({chunk.id for chunk in [*body, last]}) == 1
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (2, 3, 5)


async def test_completion_of_several_prompts(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt=["[[tokens=1]]", "[[tokens=2]]"], n=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (0, "t0"),
        (1, "t0"),
        (2, "t0 t1"),
        (3, "t0 t1"),
    ]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 6)


async def test_completion_of_tokens(client: openai.AsyncOpenAI) -> None:
    one = await client.completions.create(model=MODEL, prompt=[1, 2, 3])
    several = await client.completions.create(model=MODEL, prompt=[[1, 2, 3], [4]])
    assert [choice.text for choice in one.choices] == ["t0 t1 t2 t3 t4"]
    assert [choice.text for choice in several.choices] == ["t0 t1 t2 t3 t4"] * 2


@pytest.mark.parametrize("name", [FULL_NAME, MODEL, "your-model", "gpt-4o"])
async def test_every_name_means_the_model(client: openai.AsyncOpenAI, name: str) -> None:
    answer = await client.chat.completions.create(model=name, messages=user("[[tokens=1]]"))
    assert answer.model == FULL_NAME
    assert (await client.models.retrieve(name)).id == FULL_NAME


async def test_models(client: openai.AsyncOpenAI) -> None:
    models = [model async for model in client.models.list()]
    (model,) = models
    assert (model.id, model.object, model.owned_by) == (FULL_NAME, "model", "forebay")
    assert 0 <= time.time() - model.created < 600
    assert model.model_extra == {
        "parent": None,
        "status": "ready",
        "progress": None,
        "workers": {"loading": 0, "ready": 1, "draining": 0},
        "aliases": ["your-model", "gpt-4o", MODEL],
        "completion_types": ["chat", "completion", "embedding", "rerank"],
        "context_length": 1 << 20,
        "quantization": "none",
    }
    assert await client.models.retrieve(MODEL) == model


@pytest.mark.parametrize("stream", [False, True])
async def test_request_id_finds_the_request(client: openai.AsyncOpenAI, stack: Stack, stream: bool) -> None:
    raw = await client.chat.completions.with_raw_response.create(
        model=MODEL, messages=user("hi [[tokens=3]]"), stream=stream
    )
    request_id = raw.headers["x-request-id"]
    assert raw.request_id == request_id
    answer: Any = raw.parse()
    if stream:
        answer = (await chunks(answer))[0]
    assert answer.id == f"chatcmpl-{request_id}"
    await stack.reaches(request_id, RequestStatus.COMPLETED)  # written a moment after the answer
    found = (await stack.http.get(f"{stack.apis[0].url}/v1/queue/request/{request_id}")).json()
    assert (found["id"], found["status"], found["completion_type"]) == (request_id, "completed", "chat")
    assert found["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "cached_tokens": 0, "reasoning_tokens": 0}
    assert found["error"] is None


async def test_sdk_names_the_request_id(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=user("[[tokens=1]]"))
    assert answer._request_id == answer.id.removeprefix("chatcmpl-")


# The reference document's example, but for the address and the waits, which a test has no time for.
EXAMPLE = """
import openai
import time

client = openai.OpenAI(
    api_key="your-api-key",
    base_url="http://localhost:8091/v1"
)

# With automatic retry on queue full
def chat_with_retry(messages, max_retries=3):
    for attempt in range(max_retries):
        try:
            response = client.chat.completions.create(
                model="your-model",
                messages=messages
            )
            return response
        except openai.APIError as e:
            if e.status_code == 503 and attempt < max_retries - 1:
                time.sleep(2 ** attempt)  # Exponential backoff
                continue
            raise
"""


def example(stack: Stack) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(EXAMPLE.replace("http://localhost:8091", stack.apis[0].url), names)
    return names


async def test_python_example(stack: Stack) -> None:
    names = example(stack)
    with names["client"]:
        answer = await asyncio.to_thread(names["chat_with_retry"], user("[[tokens=3]]"))
    assert answer.choices[0].message.content == "t0 t1 t2"


async def test_sync_sdk_streams(stack: Stack) -> None:
    def read() -> str:
        with openai.OpenAI(api_key=KEY, base_url=f"{stack.apis[0].url}/v1") as sync:
            stream = sync.chat.completions.create(model=MODEL, messages=user("[[tokens=3]]"), stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    assert await asyncio.to_thread(read) == "t0 t1 t2"


CURL_STATUS = r"""
curl -H "Authorization: Bearer your-api-key" \
     http://localhost:8091/v1/queue/status
"""
CURL_CHAT = r"""
curl -X POST \
     -H "Authorization: Bearer your-api-key" \
     -H "Content-Type: application/json" \
     -d '{"model":"your-model","messages":[{"role":"user","content":"Hello"}]}' \
     http://localhost:8091/v1/chat/completions
"""
CURL_LOAD = r"""
# Simple load test with multiple concurrent requests
for i in {1..10}; do
  curl -X POST -H "Authorization: Bearer your-api-key" \
       -H "Content-Type: application/json" \
       -d '{"model":"your-model","messages":[{"role":"user","content":"Test"}]}' \
       http://localhost:8091/v1/chat/completions &
done
wait
"""


async def bash(stack: Stack, script: str) -> str:
    script = script.replace("http://localhost:8091", stack.apis[0].url)
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", script, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode()


async def test_curl_examples(stack: Stack) -> None:
    status = json.loads(await bash(stack, CURL_STATUS))
    assert list(status)[:9] == [
        "queue_size",
        "processing_count",
        "max_concurrent",
        "max_queue_size",
        "total_processed",
        "total_failed",
        "total_queued",
        "active_requests",
        "is_running",
    ]
    assert status["is_running"] is True
    answer = json.loads(await bash(stack, CURL_CHAT))
    assert answer["choices"][0]["message"]["content"] == "t0 t1 t2 t3 t4"


async def test_load_test_of_the_reference_document(stack: Stack) -> None:
    before = await idle(stack)
    output = await bash(stack, CURL_LOAD)
    assert re.findall(r'"content":"([^"]*)"', output) == ["t0 t1 t2 t3 t4"] * 10
    ids = re.findall(r'"id":"chatcmpl-([^"]*)"', output)
    assert len(set(ids)) == 10
    after = await idle(stack)
    assert after["total_processed"] - before["total_processed"] == 10
