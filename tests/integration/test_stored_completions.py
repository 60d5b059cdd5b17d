"""Chat completions with `store: true`, by the OpenAI SDK."""

import asyncio

import openai
import pytest

from support.nats import NatsServer
from support.stack import MODEL, running

WORDS = " ".join(f"t{number}" for number in range(20))


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


async def test_a_stored_completion_is_there_at_every_api(nats_server: NatsServer) -> None:
    async with running(nats_server, apis=2, workers=1, max_concurrent_requests=4) as stack:
        one, two = stack.openai(0), stack.openai(1)
        completions = one.chat.completions
        made = await completions.create(model=MODEL, messages=ask("[[tokens=20]]"), store=True, metadata={"a": "b"})
        found = await two.chat.completions.retrieve(made.id)
        assert found.choices == made.choices
        assert (found.id, found.usage, found.metadata) == (made.id, made.usage, {"a": "b"})
        messages = await two.chat.completions.messages.list(made.id)
        assert [(message.role, message.content) for message in messages.data] == [("user", "[[tokens=20]]")]
        changed = await two.chat.completions.update(made.id, metadata={"c": "d"})
        assert changed.metadata == {"c": "d"}
        await completions.create(model=MODEL, messages=ask("[[tokens=1]]"))
        second = await completions.create(model=MODEL, messages=ask("[[tokens=2]]"), store=True)
        listed = await two.chat.completions.list(limit=1)
        assert listed.has_more
        await two.chat.completions.update(made.id, metadata={"e": "f"})
        for order, wanted in (("asc", [made.id, second.id]), ("desc", [second.id, made.id])):
            pages = await two.chat.completions.list(limit=1, order=order)
            assert [completion.id async for completion in pages] == wanted
        with pytest.raises(openai.BadRequestError):
            await two.chat.completions.list(after="chatcmpl-unknown")
        assert (await two.chat.completions.delete(made.id)).deleted
        for gone in (made.id, "chatcmpl-unknown", "unknown", "chatcmpl-*"):
            with pytest.raises(openai.NotFoundError):
                await one.chat.completions.retrieve(gone)


async def test_it_outlives_its_client_and_its_api(nats_server: NatsServer) -> None:
    async with running(nats_server, apis=2, workers=1) as stack:
        asking = asyncio.create_task(
            stack.openai(0).chat.completions.create(model=MODEL, messages=ask("[[tokens=20 delay_ms=100]]"), store=True)
        )
        state = await stack.begins()
        await stack.apis[0].kill()
        with pytest.raises(openai.APIConnectionError):
            await asking
        two = stack.openai(1).chat.completions
        async with asyncio.timeout(60):
            while not (listed := (await two.list()).data):  # noqa: ASYNC110 - it is listed once it is whole
                await asyncio.sleep(0.1)
        assert [completion.choices[0].message.content for completion in listed] == [WORDS]
        assert listed[0].id == f"chatcmpl-{state.id}"
