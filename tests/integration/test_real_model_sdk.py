"""What the OpenAI SDK offers besides plain answers, on the real model: parsed answers, tools, logprobs, choices.

The model is too small to obey, so what is guaranteed here is guaranteed by grammars, not by the model.
"""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
import pytest_asyncio
from jsonschema import validate
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, Field

from support.answers import user
from support.nats import NatsServer
from support.schemas import schema
from support.stack import MODEL, Stack, data_dir, running

pytestmark = [pytest.mark.model, pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="module")]

EMOJIS = "Some emojis: 😀 🚀 🐍 🔥 🦊"
ANIMALS: dict[str, Any] = {"model": MODEL, "messages": user("Name an animal."), "temperature": 1, "max_tokens": 12}


class City(BaseModel):
    """A city."""

    name: Literal["Paris", "Oslo"]
    population: int = Field(ge=0, le=99_999_999)
    capital: bool


class GetWeather(BaseModel):
    """The weather in a city."""

    city: str = Field(max_length=12)
    unit: Literal["celsius", "fahrenheit"]


class GetTime(BaseModel):
    """The time of day."""

    zone: Literal["utc", "local"]


TOOLS = [openai.pydantic_function_tool(GetWeather), openai.pydantic_function_tool(GetTime)]
NAMED: Any = {"type": "function", "function": {"name": "GetWeather"}}


@pytest.fixture(scope="module")
def model_dir() -> Path:
    """Read when the module starts: a test's own environment has no DATA_DIR."""
    return data_dir()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(module_nats: NatsServer, model_dir: Path) -> AsyncIterator[Stack]:
    settings: dict[str, Any] = {
        "inference_engine": "transformers",
        "model_quantization": "nf4",
        "max_concurrent_requests": 8,
        "request_timeout": 300,
        "data_dir": model_dir,
    }
    async with running(module_nats, workers=0, **settings) as found:
        worker = await found.worker(within_s=500)  # what a first run takes
        yield found
        assert not [line for line in worker.log if "ERROR" in line or "Traceback" in line]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(stack: Stack) -> openai.AsyncOpenAI:
    return stack.openai(timeout=300)


async def into_cache(client: openai.AsyncOpenAI, options: dict[str, Any]) -> None:
    """Have this prompt computed in one way from here on: one from the cache rounds differently at near ties."""
    create: Any = client.completions.create if "prompt" in options else client.chat.completions.create
    await create(**options | {"max_tokens": 1})


async def test_parsed_answers(client: openai.AsyncOpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": user("Describe Paris."), "temperature": 0, "max_tokens": 60}
    await into_cache(client, options)
    answer = await client.chat.completions.parse(**options, response_format=City)
    parsed = answer.choices[0].message.parsed
    assert isinstance(parsed, City)
    assert answer.choices[0].finish_reason == "stop"
    async with client.chat.completions.stream(**options, response_format=City) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_completion()
    assert final.choices[0].message.parsed == parsed
    assert sum(event.type == "content.delta" for event in events) > 5
    (done,) = [event for event in events if event.type == "content.done"]
    assert done.parsed == parsed


@pytest.mark.parametrize("choice", ["required", NAMED])
async def test_parsed_tool_calls(client: openai.AsyncOpenAI, choice: Any) -> None:
    options: dict[str, Any] = {
        "model": MODEL,
        "messages": user("What is the weather in Oslo?"),
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 80,
    }
    await into_cache(client, options)
    answer = await client.chat.completions.parse(**options)
    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, GetWeather | GetTime)
    assert choice == "required" or call.function.name == "GetWeather"
    assert answer.choices[0].message.content is None
    # The SDK documents the reason for every answer that calls a tool, named or not.
    assert answer.choices[0].finish_reason == "tool_calls"

    async with client.chat.completions.stream(**options) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_completion()
    (streamed,) = final.choices[0].message.tool_calls or []
    assert streamed.function.parsed_arguments == call.function.parsed_arguments
    assert streamed.id
    assert streamed.id != call.id
    assert final.choices[0].finish_reason == "tool_calls"
    assert sum(event.type == "tool_calls.function.arguments.delta" for event in events) > 3
    (done,) = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert (done.name, done.parsed_arguments) == (call.function.name, call.function.parsed_arguments)


async def test_a_tool_s_result_goes_back(client: openai.AsyncOpenAI) -> None:
    """A loop over tools, as the SDK's guide has it: the SDK has no runner of them for chat completions."""
    messages = user("What is the weather in Oslo?")
    options: dict[str, Any] = {"model": MODEL, "tools": TOOLS, "temperature": 0, "max_tokens": 60}
    first = await client.chat.completions.parse(messages=messages, tool_choice=NAMED, **options)
    (call,) = first.choices[0].message.tool_calls or []

    async def prompt_tokens(*more: Any) -> int:
        answer = await client.chat.completions.create(messages=[*messages, *more], **options | {"max_tokens": 8})
        assert answer.choices[0].message.content or answer.choices[0].message.tool_calls
        assert answer.usage is not None
        return answer.usage.prompt_tokens

    def result(text: str) -> dict[str, str]:
        return {"role": "tool", "tool_call_id": call.id, "content": text}

    # The model is too small to make use of a result: what can be told is that all of it is in the prompt.
    asked = await prompt_tokens()
    called = await prompt_tokens(first.choices[0].message, result(""))
    assert called > asked + len(call.function.arguments) // 6
    assert await prompt_tokens(first.choices[0].message, result("snow" + " snow" * 19)) == called + 20


async def test_at_most_one_call_where_they_must_not_be_parallel(client: openai.AsyncOpenAI) -> None:
    async def calls(seed: int, parallel: bool) -> int:
        answer = await client.chat.completions.create(
            model=MODEL,
            messages=user("Weather in Oslo and Paris, and the time?"),
            tools=TOOLS,
            tool_choice="required",
            parallel_tool_calls=parallel,
            temperature=1,
            seed=seed,
            max_tokens=80,
        )
        return len(answer.choices[0].message.tool_calls or [])

    one, two, *several = await asyncio.gather(
        calls(0, False), calls(1, False), *(calls(seed, True) for seed in range(3))
    )
    assert one == two == 1
    assert max(several) > 1


async def test_generated_schemas_hold(client: openai.AsyncOpenAI) -> None:
    async def finished(number: int) -> bool:
        # Wrapped, since OpenAI's own schemas are objects at the root.
        wanted = {
            "type": "object",
            "properties": {"value": schema(random.Random(number))},
            "required": ["value"],
            "additionalProperties": False,
        }
        answer = await client.chat.completions.create(
            model=MODEL,
            messages=user(f"Example {number}: fill in the form."),
            response_format={"type": "json_schema", "json_schema": {"name": "form", "strict": True, "schema": wanted}},
            seed=number,
            max_tokens=150,
        )
        text = answer.choices[0].message.content or ""
        if answer.choices[0].finish_reason == "length":
            return False  # a number's digits may go on for ever: a schema does not bound them
        validate(json.loads(text), wanted)
        return True

    # Most of them: what is drawn, and so how many digits, depends on the processor's rounding.
    assert sum(await asyncio.gather(*map(finished, range(1000, 1008)))) >= 5


async def test_logprobs_of_a_chat(client: openai.AsyncOpenAI) -> None:
    options: dict[str, Any] = {
        "model": MODEL,
        "messages": user(f"Say this again: {EMOJIS} 漢字"),
        "logprobs": True,
        "top_logprobs": 3,
        "temperature": 0,
        "max_tokens": 24,
    }
    await into_cache(client, options)
    answer = await client.chat.completions.create(**options)
    assert isinstance(answer, ChatCompletion)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    text = b"".join(bytes(one.bytes or []) for one in logprobs.content).decode()
    assert text == answer.choices[0].message.content
    assert any("\ufffd" in one.token for one in logprobs.content), "no character of several tokens: of no use"
    for one in logprobs.content:
        assert [top.logprob for top in one.top_logprobs] == sorted((t.logprob for t in one.top_logprobs), reverse=True)
        assert len(one.top_logprobs) == 3
        # Of two that are equally likely, either may be the one and be listed first.
        (own,) = [top for top in one.top_logprobs if (top.token, top.bytes) == (one.token, one.bytes)]
        assert one.logprob == pytest.approx(own.logprob) == pytest.approx(one.top_logprobs[0].logprob)
        assert one.logprob <= 0
    async with client.chat.completions.stream(**options) as stream:
        await stream.until_done()
        streamed = stream.current_completion_snapshot.choices[0].logprobs
    assert streamed is not None
    assert [(one.token, one.bytes) for one in streamed.content or []] == [
        (one.token, one.bytes) for one in logprobs.content
    ]


async def test_logprobs_of_a_completion(client: openai.AsyncOpenAI) -> None:
    options: dict[str, Any] = {
        "model": MODEL,
        "prompt": f"{EMOJIS} {EMOJIS[13:]}",
        "logprobs": 2,
        "temperature": 0,
        "max_tokens": 24,
    }
    await into_cache(client, options)
    answer = (await client.completions.create(**options)).choices[0]
    found = answer.logprobs
    assert found is not None
    tokens, offsets = found.tokens or [], found.text_offset or []
    assert any(token.startswith("bytes:") for token in tokens), "no character of several tokens: of no use"
    assert len(tokens) == len(offsets) == len(found.token_logprobs or []) == len(found.top_logprobs or [])
    for token, offset, logprob, top in zip(
        tokens, offsets, found.token_logprobs or [], found.top_logprobs or [], strict=True
    ):
        assert token.startswith("bytes:") or answer.text[offset:].startswith(token)
        assert top[token] == logprob == max(top.values())
        assert len(top) in (2, 3)
    pieces = [chunk.choices[0] async for chunk in await client.completions.create(**options, stream=True)]
    assert "".join(piece.text for piece in pieces) == answer.text
    parts = [piece.logprobs for piece in pieces if piece.logprobs]
    assert [token for part in parts for token in part.tokens or []] == tokens
    assert [offset for part in parts for offset in part.text_offset or []] == offsets


async def test_choices_are_streamed_as_they_are_whole(client: openai.AsyncOpenAI) -> None:
    await into_cache(client, ANIMALS)
    whole = await client.chat.completions.create(**ANIMALS, n=3, seed=3)
    async with client.chat.completions.stream(**ANIMALS, n=3, seed=3) as stream:
        events = [event async for event in stream]
        final = stream.current_completion_snapshot
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.message.content for choice in final.choices] == texts
    assert [choice.finish_reason for choice in final.choices] == [choice.finish_reason for choice in whole.choices]
    assert len(set(texts)) > 1
    chunks = [event.chunk for event in events if event.type == "chunk"]
    reasons = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert sorted(reasons) == [0, 1, 2]


async def test_echo_and_best_of(client: openai.AsyncOpenAI) -> None:
    prompt = "A good name for a cat is"
    options: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": 5, "seed": 4}
    await into_cache(client, options)
    plain = (await client.completions.create(**options)).choices[0].text
    assert (await client.completions.create(**options, echo=True)).choices[0].text == prompt + plain
    echoed = await client.completions.create(**options, echo=True, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in echoed]) == prompt + plain
    best = await client.completions.create(**options, best_of=3, n=2)
    assert len(best.choices) == 2
    assert best.usage is not None
    with pytest.raises(openai.BadRequestError) as refused:
        await client.completions.create(**options, best_of=3, stream=True)
    assert refused.value.param == "best_of"


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_stream_is_right_to_the_byte(client: openai.AsyncOpenAI, seed: int) -> None:
    """Characters of several tokens, and each of the answer's characters in turn as the stop string."""
    options: dict[str, Any] = {"model": MODEL, "prompt": EMOJIS, "max_tokens": 24, "seed": seed, "temperature": 0.7}

    async def streamed(**more: Any) -> tuple[list[str], str | None]:
        chunks = [chunk.choices[0] async for chunk in await client.completions.create(**options, **more, stream=True)]
        (reason,) = [chunk.finish_reason for chunk in chunks if chunk.finish_reason]
        return [chunk.text for chunk in chunks if chunk.text], reason

    await into_cache(client, options)
    whole = (await client.completions.create(**options)).choices[0].text
    pieces, _ = await streamed()
    assert "".join(pieces) == whole
    settled = whole.split("\ufffd")[0]
    stops = list(dict.fromkeys(settled[place : place + 3].strip() for place in range(3, len(settled) - 3, 8)))
    # One after another: without AVX-512 BF16, a product of one row rounds unlike one of several.
    for stop in filter(None, stops):
        cut, reason = await streamed(stop=stop)
        assert ("".join(cut), reason) == (whole.split(stop)[0], "stop")
