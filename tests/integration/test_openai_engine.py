"""A worker that asks an OpenAI-compatible server: here the api itself, which serves another model by another worker."""

from collections.abc import AsyncIterator

import openai
import pytest
import pytest_asyncio

from support.nats import NatsServer
from support.stack import MODEL, Stack, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

OUTER = "outer"
CALL = 'hm.</think><tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(module_nats: NatsServer) -> AsyncIterator[Stack]:
    async with running(module_nats, max_concurrent_requests=4) as started:
        await started.worker(
            inference_engine="openai",
            engine_url=started.apis[0].url + "/v1",
            default_model=f"HuggingFaceTB/{MODEL}",
            model_name=OUTER,
        )
        await started.knows_workers()
        yield started


async def test_an_answer_is_the_server_s(stack: Stack) -> None:
    sdk = stack.openai()
    text = "[[tokens=6]]"
    for model in (MODEL, OUTER):
        answer = await sdk.chat.completions.create(model=model, messages=[{"role": "user", "content": text}])
        assert answer.choices[0].message.content == "t0 t1 t2 t3 t4 t5"
        assert answer.usage is not None
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (6, "stop")
        stream = await sdk.completions.create(
            model=model, prompt=[text, text], stream=True, stream_options={"include_usage": True}
        )
        texts, usage = {0: "", 1: ""}, None
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == dict.fromkeys((0, 1), "t0 t1 t2 t3 t4 t5")
        assert usage is not None
        assert usage.completion_tokens == 12


async def test_reasoning_and_tool_calls_come_through(stack: Stack) -> None:
    messages = [{"role": "user", "content": f"[[say]]<think>{CALL}"}]
    found = [
        (await stack.chat("", model=model, messages=messages, tools=[TOOL])).json()["choices"][0]
        for model in (MODEL, OUTER)
    ]
    for choice in found:
        (call,) = choice["message"]["tool_calls"]
        assert (call["function"], choice["finish_reason"]) == ({"name": "f", "arguments": '{"x": 1}'}, "tool_calls")
        assert choice["message"]["reasoning_content"] == "hm."


async def test_errors_of_the_server_are_the_client_s(stack: Stack) -> None:
    sdk = stack.openai()
    with pytest.raises(openai.BadRequestError, match="does not know the order"):
        await sdk.chat.completions.create(model=OUTER, messages=[{"role": "user", "content": "[[nonsense]]"}])
    with pytest.raises(openai.BadRequestError, match="log probabilities"):
        await sdk.chat.completions.create(
            model=OUTER, messages=[{"role": "user", "content": "hi"}], logprobs=True, top_logprobs=1
        )


async def test_a_broken_answer_ends_with_one_error(stack: Stack) -> None:
    sdk = stack.openai()
    stream = await sdk.chat.completions.create(
        model=OUTER, messages=[{"role": "user", "content": "[[tokens=3 fail]]"}], stream=True
    )
    pieces: list[str] = []

    async def read() -> None:
        async for chunk in stream:
            pieces.append(chunk.choices[0].delta.content or "")

    with pytest.raises(openai.APIError, match="cannot go on with the part of the answer"):
        await read()
    assert "".join(pieces) == "t0 t1 t2"
