"""Service tiers in the whole system: what may wait gives way, its answer is whole, and keys get their shares."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from forebay_contracts import keys
from forebay_contracts.wire import names
from forebay_contracts.wire.state import RequestStatus
from support.nats import NatsServer, flushed
from support.stack import MODEL, Stack, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEYS = {name: f"key-of-{name}-0123456789" for name in ("alice", "bob", "carol", "nightly")}
FIELDS = {"alice": "weight = 1", "bob": "weight = 3", "carol": "max_requests = 1", "nightly": 'tiers = ["flex"]'}
HELD = "tokens=2 delay_ms=100000"
"""Holds a slot until the test lets go."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(module_nats: NatsServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(
        "\n".join(f'[{name}]\nsha256 = "{keys.digest(KEYS[name].encode())}"\n{FIELDS[name]}' for name in KEYS)
    )
    async with running(
        module_nats,
        apis=2,
        max_concurrent_requests=2,
        max_queue_size=200,
        llm_batch_size=16,
        api_keys="operator-0123456789",
        api_keys_file=file,
        key_overflow="defer",
    ) as made:
        yield made


def text(tokens: int) -> str:
    return " ".join(f"t{number}" for number in range(tokens))


async def ask(stack: Stack, orders: str, api: int = 0, key: str = "operator-0123456789", **fields: Any) -> Any:
    client = stack.openai(api, api_key=KEYS.get(key, key))
    messages: Any = [{"role": "user", "content": f"[[{orders}]]"}]
    return await client.chat.completions.create(model=MODEL, messages=messages, **fields)


async def processing(stack: Stack, count: int) -> None:
    async with asyncio.timeout(30):
        while (await numbers(stack))["processing_count"] < count:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def numbers(stack: Stack, path: str = "status") -> Any:
    headers = {"authorization": "Bearer operator-0123456789"}
    return (await stack.http.get(f"{stack.apis[1].url}/v1/queue/{path}", headers=headers)).json()


async def heard(stream: AsyncIterator[Any], delta: Callable[[Any], str | None], told: list[str]) -> None:
    async for event in stream:
        told += filter(None, [delta(event)])


async def grows(told: list[str], by: int) -> None:
    enough = len(told) + by
    async with asyncio.timeout(30):
        while len(told) < enough:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_work_that_may_wait_gives_way_and_goes_on_exactly(stack: Stack) -> None:
    endless = "tokens=100000 delay_ms=10"
    live = await ask(stack, endless, service_tier="flex", stream=True)
    client = stack.openai(1, api_key="operator-0123456789")
    response = await client.responses.create(model=MODEL, input=f"[[{endless}]]", background=True, service_tier="flex")
    assert response.service_tier == "flex"
    events = await client.responses.retrieve(response.id, stream=True)
    answers: list[list[str]] = [[], []]
    readers = [
        asyncio.create_task(heard(live, lambda chunk: chunk.choices[0].delta.content, answers[0])),
        asyncio.create_task(heard(events, lambda event: getattr(event, "delta", None), answers[1])),
    ]
    for answer in answers:
        await grows(answer, 1)
    turn = 0
    while turn == 0:  # two that come one after the other can both have the slot of the live one
        quick = await asyncio.gather(*(ask(stack, "tokens=2 delay_ms=5", api) for api in (0, 1)))
        assert [one.choices[0].message.content for one in quick] == [text(2)] * 2
        assert [one.service_tier for one in quick] == ["default"] * 2
        turn = (await stack.reaches(names.request_id(response.id), RequestStatus.PROCESSING)).turn
    for answer in answers:
        await grows(answer, 20)
        said = "".join(answer)
        assert text(100_000).startswith(said)
    await client.responses.cancel(response.id)
    readers[0].cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    await stack.idle()


async def test_what_waits_in_the_room_is_seen_and_can_be_cancelled(stack: Stack) -> None:
    busy = [asyncio.create_task(ask(stack, HELD)) for _ in range(2)]
    await processing(stack, 2)
    client = stack.openai(0, api_key=KEYS["bob"])
    waiting = [
        await client.responses.create(model=MODEL, input="[[tokens=1]]", background=True, service_tier="flex")
        for _ in range(2)
    ]
    first, second = [names.request_id(one.id) for one in waiting]
    await stack.reaches(second, RequestStatus.QUEUED)
    status = await numbers(stack)
    assert (status["deferred"], status["models"][0]["deferred"], status["queue_size"]) == (2, 2, 0)
    assert [(await numbers(stack, f"request/{one}"))["position"] for one in (first, second)] == [1, 2]
    cancelled = await client.responses.cancel(waiting[0].id)
    assert cancelled.status == "cancelled"
    assert (await numbers(stack))["deferred"] == 1
    assert (await numbers(stack, f"request/{second}"))["position"] == 1
    for task in busy:
        task.cancel()
    await asyncio.gather(*busy, return_exceptions=True)
    assert (await stack.reaches(second, RequestStatus.COMPLETED)).key == "bob"


async def test_keys_share_the_tokens_by_their_weights(stack: Stack) -> None:
    busy = [asyncio.create_task(ask(stack, HELD)) for _ in range(2)]
    await processing(stack, 2)
    ids: list[str] = []

    async def one(number: int, key: str) -> None:
        headers = {"authorization": f"Bearer {KEYS[key]}"}
        fields = {"messages": [{"role": "user", "content": "[[tokens=4 delay_ms=2]]"}], "service_tier": "flex"}
        url = f"{stack.apis[number % 2].url}/v1/chat/completions"
        answer = await stack.http.post(url, json={"model": MODEL, **fields}, headers=headers)
        assert answer.status_code == 200, answer.text
        ids.append(answer.headers["x-request-id"])

    tasks = [asyncio.create_task(one(number, key)) for number in range(100) for key in ("alice", "bob")]
    async with asyncio.timeout(60):
        while (await numbers(stack))["deferred"] < len(tasks):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    for task in busy:
        task.cancel()
    await asyncio.gather(*busy, *tasks, return_exceptions=True)
    assert len(ids) == len(tasks)
    # In the order in which they ran. Their clients, of two apis, have no common order.
    states = await asyncio.gather(*(stack.reaches(request_id, RequestStatus.COMPLETED) for request_id in ids))
    first = Counter(one.key for one in sorted(states, key=lambda one: one.started_at or 0)[: len(tasks) // 2])
    assert first["bob"] / first["alice"] == pytest.approx(3, rel=0.1)


async def test_what_a_key_has_beyond_its_bound_waits_its_turn(stack: Stack) -> None:
    moved = await stack.connection.client.subscribe("inference.deferred.*.carol")
    await flushed(stack.connection.client)
    busy = asyncio.create_task(ask(stack, HELD, 0, "carol"))
    await processing(stack, 1)
    answers = await asyncio.gather(*(ask(stack, "tokens=20", 0, "carol") for _ in range(3)))
    assert [answer.choices[0].message.content for answer in answers] == [text(20)] * 3
    assert {answer.service_tier for answer in answers} == {"default"}
    for _ in answers:
        await moved.next_msg(timeout=30)
    assert moved.pending_msgs == 0
    await moved.unsubscribe()
    busy.cancel()
    await asyncio.gather(busy, return_exceptions=True)


async def test_a_key_may_use_its_tiers_alone(stack: Stack) -> None:
    assert (await ask(stack, "tokens=1", 0, "nightly")).service_tier == "flex"
    with pytest.raises(Exception, match="may not use the service tier `default`") as caught:
        await ask(stack, "tokens=1", 0, "nightly", service_tier="default")
    assert (caught.value.status_code, caught.value.code) == (403, "service_tier_not_allowed")  # type: ignore[attr-defined]
