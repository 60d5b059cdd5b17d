"""Messages by the Anthropic SDK: whole, streamed, with tools, with thinking, waiting, and refused."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest

from support.nats import NatsServer
from support.stack import MODEL, Stack, running
from support.view import holds

WORDS = " ".join(f"t{number}" for number in range(20))
WEATHER = {
    "name": "weather",
    "description": "The weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '[[say]]Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=stack.apis[0].url, api_key="key", max_retries=0) as made:
        yield made


def ask(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 4_000, "messages": [{"role": "user", "content": text}], **fields}


async def test_a_message_whole_and_streamed(client: anthropic.AsyncAnthropic) -> None:
    whole = await client.messages.create(**ask("[[tokens=20]]"))
    assert (whole.content[0].text, whole.stop_reason, whole.usage.output_tokens) == (WORDS, "end_turn", 20)
    assert whole.id.startswith("msg_")
    async with client.messages.stream(**ask("[[tokens=20]]")) as stream:
        events = [event.type async for event in stream]
        streamed = await stream.get_final_message()
    assert events[0] == "message_start"
    assert streamed.to_dict() == whole.to_dict() | {"id": streamed.id}


async def test_it_ends_at_a_stop_sequence_or_at_the_most_tokens(client: anthropic.AsyncAnthropic) -> None:
    stopped = await client.messages.create(**ask("[[tokens=20]]", stop_sequences=["t3", "t7"]))
    assert (stopped.content[0].text, stopped.stop_reason, stopped.stop_sequence) == (
        "t0 t1 t2 ",
        "stop_sequence",
        "t3",
    )
    cut = await client.messages.create(**ask("[[tokens=20]]", max_tokens=2))
    assert (cut.content[0].text, cut.stop_reason, cut.stop_sequence) == ("t0 t1", "max_tokens", None)


async def test_a_tool_is_called_and_its_result_read(client: anthropic.AsyncAnthropic) -> None:
    asked = ask(CALL, tools=[WEATHER])
    called = await client.messages.create(**asked)
    text, use = called.content
    assert text.text.strip() == "Let me see."
    assert (use.type, use.name, use.input, called.stop_reason) == ("tool_use", "weather", {"city": "Oslo"}, "tool_use")
    async with client.messages.stream(**asked) as stream:
        streamed = await stream.get_final_message()
    assert [block.to_dict() | {"id": ""} for block in streamed.content] == [
        block.to_dict() | {"id": ""} for block in called.content
    ]
    result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "[[say]]Rain."}]}
    answered = await client.messages.create(
        **asked
        | {
            "messages": [
                *asked["messages"],
                {"role": "assistant", "content": [block.to_dict() for block in called.content]},
                {"role": "user", "content": [result]},
            ]
        }
    )
    assert answered.content[0].text == "Rain."


async def test_the_tool_runner_sends_the_whole_conversation(client: anthropic.AsyncAnthropic) -> None:
    @anthropic.beta_async_tool
    async def weather(city: str) -> str:
        """The weather of a city."""
        return f"[[say]]Rain in {city}."

    answered = await client.beta.messages.tool_runner(**ask(CALL), tools=[weather]).until_done()
    assert answered.content[0].text == "Rain in Oslo."
    with pytest.raises(anthropic.BadRequestError) as told:
        await client.beta.messages.create(**ask("a"), thread={"type": "create"})
    body: Any = told.value.body
    assert body["error"]["details"] == {"error_code": "thread_unsupported_request"}


async def test_tokens_are_counted(client: anthropic.AsyncAnthropic) -> None:
    counted = await client.messages.count_tokens(
        model=MODEL, system="be kind", messages=[{"role": "user", "content": "one two three"}], tools=[WEATHER]
    )
    assert counted.input_tokens == 5


async def test_a_stream_that_waits_begins_with_a_ping(stack: Stack, client: anthropic.AsyncAnthropic) -> None:
    holding = [asyncio.create_task(stack.chat("[[tokens=200 delay_ms=10]]")) for _ in range(4)]
    await holds(stack, 4)
    async with client.messages.stream(**ask("[[tokens=20]]")) as stream:
        assert (await stream.get_final_message()).content[0].text == WORDS
    await asyncio.gather(*holding)


async def test_errors_are_anthropics(nats_server: NatsServer) -> None:
    async with running(
        nats_server, workers=0, max_queue_size=1, max_concurrent_requests=1, api_keys="a-key-of-some-length"
    ) as stack:
        url = stack.apis[0].url
        async with (
            anthropic.AsyncAnthropic(base_url=url, api_key="a-key-of-some-length", max_retries=0) as client,
            anthropic.AsyncAnthropic(base_url=url, api_key="wrong", max_retries=0) as stranger,
        ):
            with pytest.raises(anthropic.AuthenticationError):
                await stranger.messages.create(**ask("a"))
            with pytest.raises(anthropic.NotFoundError):
                await client.messages.create(**ask("a", model="another"))
            with pytest.raises(anthropic.BadRequestError, match="max_tokens") as told:
                await client.messages.create(**ask("a", max_tokens=0))
            body: Any = told.value.body
            assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
            image = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
            with pytest.raises(anthropic.BadRequestError, match="image"):
                await client.messages.create(**ask("a", messages=[{"role": "user", "content": [image]}]))
            with pytest.raises(anthropic.BadRequestError, match="web_search"):
                await client.messages.create(**ask("a", tools=[{"type": "web_search_20250305", "name": "web_search"}]))
            waiting = asyncio.create_task(client.messages.create(**ask("a")))
            await holds(stack, 1)
            with pytest.raises(anthropic.APIStatusError) as full:
                await client.messages.create(**ask("a"))
            assert (full.value.status_code, full.value.type) == (529, "overloaded_error")
            assert int(full.value.response.headers["retry-after"]) >= 1
            waiting.cancel()
