"""Responses by the OpenAI SDK, on real processes: two apis, whichever is asked, and what is left behind."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from support.nats import NatsServer
from support.stack import MODEL, Stack, running

WORDS = " ".join(f"t{number}" for number in range(20))


@pytest.fixture
async def stack(nats_server: NatsServer) -> AsyncIterator[Stack]:
    async with running(nats_server, apis=2, workers=1, max_concurrent_requests=8) as made:
        yield made


async def events_of(client: openai.AsyncOpenAI, response_id: str, after: int | None = None) -> list[dict[str, Any]]:
    more = {} if after is None else {"starting_after": after}
    stream = await client.responses.retrieve(response_id, stream=True, **more)
    return [event.to_dict() async for event in stream]


async def test_an_answer_whole_and_streamed(stack: Stack) -> None:
    client = stack.openai()
    whole = await client.responses.create(model=MODEL, input="[[tokens=20]]")
    assert (whole.status, whole.output_text) == ("completed", WORDS)
    assert whole.usage is not None
    assert whole.usage.output_tokens == 20
    assert whole.completed_at is not None
    stream = await client.responses.create(model=MODEL, input="[[tokens=20]]", stream=True)
    events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events][:3] == ["response.created", "response.queued", "response.in_progress"]
    assert events[-1].type == "response.completed"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == WORDS
    live = await client.responses.create(model=MODEL, input="[[tokens=20]]", store=False)
    assert live.output_text == WORDS
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(live.id)


async def test_it_is_read_at_any_api_while_it_runs_and_after(stack: Stack) -> None:
    one, two = stack.openai(0), stack.openai(1)
    async with await one.responses.create(model=MODEL, input="[[tokens=40 delay_ms=25]]", stream=True) as stream:
        seen = []
        async for event in stream:
            seen.append(event.to_dict())
            if len(seen) == 10:
                break
    response_id = seen[0]["response"]["id"]
    rest = await events_of(two, response_id, seen[-1]["sequence_number"])
    again = await events_of(one, response_id)
    assert seen + rest == again, "left at one api, and taken up at the other"
    assert [event["sequence_number"] for event in again] == list(range(len(again)))
    raw = [await _raw(stack, api, f"/v1/responses/{response_id}?stream=true&starting_after=3") for api in (0, 1)]
    assert raw[0] == raw[1]
    one_of_them, other = await one.responses.retrieve(response_id), await two.responses.retrieve(response_id)
    assert one_of_them == other
    assert again[-1]["response"] == one_of_them.to_dict()


async def _raw(stack: Stack, api: int, path: str) -> bytes:
    return (await stack.http.get(stack.apis[api].url + path)).content


async def test_in_the_background(stack: Stack) -> None:
    one, two = stack.openai(0), stack.openai(1)
    begun = await one.responses.create(model=MODEL, input="[[tokens=20 delay_ms=20]]", background=True)
    assert (begun.status, begun.background) == ("queued", True)
    await stack.apis[0].kill()
    events = await events_of(two, begun.id)
    assert events[-1]["type"] == "response.completed"
    assert Response.model_validate(events[-1]["response"]).output_text == WORDS
    request_id = str(uuid.UUID(begun.id.removeprefix("resp_")))
    state = await stack.http.get(f"{stack.apis[1].url}/v1/queue/request/{request_id}")
    assert state.json()["status"] == "completed"


async def test_it_is_cancelled_and_deleted(stack: Stack) -> None:
    one, two = stack.openai(0), stack.openai(1)
    begun = await one.responses.create(model=MODEL, input="[[tokens=9000 delay_ms=20]]", background=True)
    assert (await two.responses.cancel(begun.id)).status == "cancelled"
    assert (await one.responses.retrieve(begun.id)).status == "cancelled"
    foreground = await one.responses.create(model=MODEL, input="[[tokens=1]]")
    with pytest.raises(openai.BadRequestError):
        await one.responses.cancel(foreground.id)
    running_one = await one.responses.create(model=MODEL, input="[[tokens=9000 delay_ms=20]]", background=True)
    await two.responses.delete(running_one.id)
    for gone in (running_one.id, "resp_unknown", "resp_" + "0" * 32, "*", "a.b", ">"):
        with pytest.raises(openai.NotFoundError):
            await one.responses.retrieve(gone)
    await stack.becomes_idle(stack.workers[0])
    info = await stack.connection.jetstream.stream_info("INFERENCE_ANSWERS", subjects_filter=">")
    subject = f"inference.answers.{uuid.UUID(running_one.id[5:])}"
    assert (info.state.subjects or {})[subject] == 1, "the last frame says that it was deleted"
    await two.responses.delete(foreground.id)
    info = await stack.connection.jetstream.stream_info("INFERENCE_ANSWERS", subjects_filter=">")
    assert f"inference.answers.{uuid.UUID(foreground.id[5:])}" not in (info.state.subjects or {})


async def test_a_conversation_goes_on(stack: Stack) -> None:
    client = stack.openai()
    first = await client.responses.create(model=MODEL, input="[[say]]Hello.")
    second = await client.responses.create(model=MODEL, input="[[say]]Again.", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    with pytest.raises(openai.BadRequestError) as told:
        await client.responses.create(model=MODEL, input="hi", previous_response_id="resp_" + "0" * 32)
    assert told.value.code == "previous_response_not_found"
    items = await client.responses.input_items.list(second.id)
    assert [item.content[0].text for item in items.data] == ["[[say]]Again."]

    conversation = await client.conversations.create(
        metadata={"a": "b"}, items=[{"type": "message", "role": "user", "content": "before"}]
    )
    for text in ("One.", "Two."):
        await client.responses.create(model=MODEL, input=f"[[say]]{text}", conversation=conversation.id)
    listed = await client.conversations.items.list(conversation.id, order="asc")
    texts = [item.content[0].text for item in listed.data]
    assert texts == ["before", "[[say]]One.", "One.", "[[say]]Two.", "Two."]
    await client.conversations.items.delete(listed.data[0].id, conversation_id=conversation.id)
    page = await client.conversations.items.list(conversation.id, order="asc", limit=2)
    assert [item.content[0].text for item in page.data] == ["[[say]]One.", "One."]
    assert page.has_more
    assert (await client.conversations.update(conversation.id, metadata={"c": "d"})).metadata == {"c": "d"}
    assert (await client.conversations.delete(conversation.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.conversations.retrieve(conversation.id)


async def test_tokens_are_counted(stack: Stack) -> None:
    counted = await stack.openai().responses.input_tokens.count(model=MODEL, input="one two three")
    assert counted.input_tokens == 3


async def test_what_belongs_to_another_key_is_not_there(nats_server: NatsServer, tmp_path: Path) -> None:
    async with running(nats_server, workers=1, api_keys="alice-alice-alice-alice,bob-bob-bob-bob-bob") as stack:
        alice, bob = (stack.openai(api_key=key) for key in ("alice-alice-alice-alice", "bob-bob-bob-bob-bob"))
        made = await alice.responses.create(model=MODEL, input="[[tokens=1]]")
        conversation = await alice.conversations.create()
        assert (await alice.responses.retrieve(made.id)).id == made.id
        for attempt in (
            bob.responses.retrieve(made.id),
            bob.responses.delete(made.id),
            bob.responses.cancel(made.id),
            bob.responses.input_items.list(made.id),
            bob.conversations.retrieve(conversation.id),
            bob.responses.create(model=MODEL, input="x", conversation=conversation.id),
        ):
            with pytest.raises(openai.NotFoundError):
                await attempt


async def test_what_is_wrong_is_said(stack: Stack) -> None:
    for fields, param in (
        ({}, "input"),
        (
            {"input": [{"type": "message", "role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": "a", "conversation": "b", "previous_response_id": "c"}, "conversation"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id"),
    ):
        answer = await stack.http.post(f"{stack.apis[0].url}/v1/responses", json={"model": MODEL, **fields})
        assert answer.status_code in (400, 404), answer.text
        assert answer.json()["error"]["param"] == param
    listed = await stack.http.get(f"{stack.apis[0].url}/v1/responses/resp_{'0' * 32}/input_items?limit=x")
    assert (listed.status_code, listed.json()["error"]["param"]) == (400, "limit")


async def test_two_hundred_at_once_are_exact(stack: Stack) -> None:
    client = stack.openai()
    answers = await asyncio.gather(*(client.responses.create(model=MODEL, input="[[tokens=20]]") for _ in range(50)))
    assert {answer.output_text for answer in answers} == {WORDS}


async def test_after_its_ttl_nothing_is_left(nats_server: NatsServer) -> None:
    settings = {"response_ttl": 3, "background_timeout": 3, "request_timeout": 3, "request_state_ttl": 3}
    async with running(nats_server, **settings) as stack:
        client = stack.openai()
        made = await client.responses.create(model=MODEL, input="[[tokens=5]]")
        chat = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "[[tokens=5]]"}], store=True
        )
        assert (await client.responses.retrieve(made.id)).status == "completed"
        assert await client.chat.completions.retrieve(chat.id)
        left = ("INFERENCE", "INFERENCE_ANSWERS", "KV_inference-responses", "KV_inference-requests")
        async with asyncio.timeout(60):
            while any([(await stack.connection.jetstream.stream_info(name)).state.messages for name in left]):  # noqa: ASYNC110
                await asyncio.sleep(0.2)  # the server tells nobody that something has expired
        for gone in (client.responses.retrieve(made.id), client.chat.completions.retrieve(chat.id)):
            with pytest.raises(openai.NotFoundError):
                await gone


async def test_many_change_one_conversation(stack: Stack) -> None:
    one, two = stack.openai(0), stack.openai(1)
    made = await one.conversations.create()
    await asyncio.gather(
        *(
            client.responses.create(model=MODEL, input=f"[[tokens=1]] {number}", conversation=made.id)
            for number in range(20)
            for client in (one, two)
        )
    )
    listed = await one.conversations.items.list(made.id, limit=100)
    assert len(listed.data) == 2 * 40


async def test_an_item_that_is_deleted_can_be_added_again(stack: Stack) -> None:
    url = f"{stack.apis[0].url}/v1/conversations"
    item = {"id": "msg_1", "role": "user", "content": "a secret"}
    made = (await stack.http.post(url, json={"items": [item]})).json()["id"]
    assert (await stack.http.delete(f"{url}/{made}/items/msg_1")).status_code == 200
    assert b"a secret" not in (await _bytes_of(stack, made))
    await stack.http.post(f"{url}/{made}/items", json={"items": [item]})
    assert (await stack.http.get(f"{url}/{made}/items/msg_1")).status_code == 200


async def _bytes_of(stack: Stack, conversation: str) -> bytes:
    bucket = await stack.connection.jetstream.key_value("inference-responses")
    return (await bucket.get(f"conv.open.{conversation}")).value or b""


async def test_numbers_of_any_size_are_shown(stack: Stack) -> None:
    huge = 10**30
    url = f"{stack.apis[0].url}/v1/responses"
    answer = await stack.http.post(url, json={"model": MODEL, "input": "[[tokens=1]]", "max_tool_calls": huge})
    assert (answer.status_code, answer.json()["max_tool_calls"]) == (200, huge)
    too_many = {"model": MODEL, "input": "[[tokens=1]]", "max_output_tokens": huge, "background": True}
    begun = (await stack.http.post(url, json=too_many)).json()
    async with stack.http.stream("GET", f"{url}/{begun['id']}?stream=true") as stream:
        assert "response.failed" in (await stream.aread()).decode()


async def test_asked_again_with_its_key_it_is_the_same_response(stack: Stack) -> None:
    conversation = await stack.openai().conversations.create()

    async def ask(api: int, key: str, **fields: Any) -> Response:
        headers = {"idempotency-key": key}
        orders = "[[tokens=20 delay_ms=5]]"
        return await stack.openai(api).responses.create(model=MODEL, input=orders, extra_headers=headers, **fields)

    for key, fields in {
        "stored": {},
        "live": {"store": False},
        "background": {"background": True},
        "conversation": {"conversation": conversation.id},
    }.items():
        first, again = await asyncio.gather(ask(0, key, **fields), ask(1, key, **fields))
        later = await ask(1, key, **fields)
        assert {one.id for one in (again, later)} == {first.id}
        if key != "background":
            assert {one.output_text for one in (first, again, later)} == {WORDS}
    items = await stack.openai().conversations.items.list(conversation.id)
    assert len(items.data) == 2
    assert (await stack.status())["total_queued"] == 4
    with pytest.raises(openai.UnprocessableEntityError):
        await ask(0, "stored", store=False)


async def test_a_deleted_answer_is_not_waited_for(stack: Stack) -> None:
    url = f"{stack.apis[0].url}/v1/chat/completions"
    body = {"model": MODEL, "messages": [{"role": "user", "content": "[[tokens=3]]"}], "store": True}
    first = (await stack.http.post(url, json=body, headers={"idempotency-key": "k"})).json()
    assert (await stack.http.delete(f"{url}/{first['id']}")).status_code == 200
    again = await stack.http.post(url, json=body, headers={"idempotency-key": "k"}, timeout=10)
    assert again.status_code == 200
    assert again.json()["id"] != first["id"]
