"""Responses by the OpenAI SDK: a tool loop, and a wait in which nothing but signs of life comes."""

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from support.nats import NatsServer
from support.stack import MODEL, Stack, running

CALL = '[[say]]Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
LONG = "[[tokens=2 delay_ms=250]]"
BODIES: dict[str, dict[str, Any]] = {
    "responses": {"input": LONG},
    "messages": {"max_tokens": 9, "messages": [{"role": "user", "content": LONG}]},
    "chat/completions": {"messages": [{"role": "user", "content": LONG}]},
}


class Place(BaseModel):
    city: str


@pytest.fixture
async def quick_stack(nats_server: NatsServer) -> AsyncIterator[Stack]:
    """Of which a stream shows that it lives after 0.1 s."""
    async with running(nats_server, workers=1, max_concurrent_requests=4, stream_keep_alive=0.1) as made:
        yield made


async def test_a_tool_is_called_and_its_result_read(stack: Stack) -> None:
    client = stack.openai()
    tools = [openai.pydantic_function_tool(Place, name="weather")["function"] | {"type": "function"}]
    async with client.responses.stream(model=MODEL, input=CALL, tools=tools) as stream:
        called = await stream.get_final_response()
    message, call = called.output
    assert (message.type, called.output_text, call.type) == ("message", "Let me see.", "function_call")
    assert (call.name, call.parsed_arguments) == ("weather", {"city": "Oslo"})
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "[[say]]Rain."}
    after = await client.responses.create(model=MODEL, tools=tools, previous_response_id=called.id, input=[result])
    history = [{"role": "user", "content": CALL}, *called.to_dict()["output"], result]
    stateless = await client.responses.create(model=MODEL, tools=tools, input=history, store=False)
    assert after.output_text == stateless.output_text == "Rain."


@pytest.mark.clients
async def test_a_websocket_and_a_compacted_conversation(stack: Stack) -> None:
    client = stack.openai()
    compacted = await client.responses.compact(model=MODEL, input="[[say]]Rain.")
    history = [item.to_dict(warnings=False) for item in compacted.output]
    said: list[str] = []
    async with client.responses.connect() as connection:
        previous = None
        for text in ("[[tokens=2]]", "[[tokens=3]]"):
            asked = [*history, {"role": "user", "content": text}]
            event = {"type": "response.create", "model": MODEL, "store": False, "input": asked}
            await connection.send(event | {"previous_response_id": previous})
            async for event in connection:
                if event.type == "response.completed":
                    previous, history = event.response.id, []
                    said.append(event.response.output_text)
                    break
    assert said == ["t0 t1", "t0 t1 t2"]


async def test_a_stream_shows_that_it_lives(quick_stack: Stack) -> None:
    url, signs = quick_stack.apis[0].url, {}
    for path, fields in BODIES.items():
        answer = await quick_stack.http.post(f"{url}/v1/{path}", json={"model": MODEL, "stream": True, **fields})
        parts = answer.text.split("\n\n")
        between = parts[next(place for place, part in enumerate(parts) if "t0" in part) + 1 :]
        signs[path] = next(part for part in between if "t1" not in part)
    assert signs == {
        "responses": 'event: keepalive\ndata: {"type":"keepalive","sequence_number":5}',
        "messages": 'event: ping\ndata: {"type":"ping"}',
        "chat/completions": ": keep-alive",
    }


async def test_the_sdk_reads_over_them(quick_stack: Stack) -> None:
    client = quick_stack.openai()
    async with client.responses.stream(model=MODEL, input=LONG) as stream:
        kinds = [event.type async for event in stream]
        assert (await stream.get_final_response()).output_text == "t0 t1"
    assert "keepalive" in kinds
    chat = await client.chat.completions.create(model=MODEL, stream=True, **BODIES["chat/completions"])
    chunks = [chunk async for chunk in chat]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "t0 t1"
