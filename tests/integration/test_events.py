"""`GET /v1/queue/events`: what a listener is told, how often, and that nobody listening costs nothing."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from forebay_api import feed
from forebay_api.feed import Feed
from forebay_contracts.connection import connect
from forebay_contracts.errors import TooManyListeners
from forebay_contracts.settings import Settings, load
from forebay_contracts.status import queue_status
from support.nats import NatsServer
from support.stack import Stack, running
from support.view import holds


@contextlib.asynccontextmanager
async def listening(stack: Stack) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """The events of the first api, decoded."""

    async def events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                yield json.loads(line[6:])

    async with stack.http.stream("GET", stack.apis[0].url + "/v1/queue/events") as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield events(answer)


async def test_each_change_is_told_once_and_not_more_often_than_four_times_a_second(nats_server: NatsServer) -> None:
    async with running(nats_server, max_concurrent_requests=8) as stack:
        before = await stack.chat("[[tokens=1]]")
        begun = time.monotonic()
        async with listening(stack) as events, asyncio.timeout(60):
            first = await anext(events)
            assert [state["id"] for state in first["requests"]] == [before.headers["x-request-id"]]
            assert first["connected"] is True
            assert first["status"]["models"][0]["paused_until"] is None
            assert [worker["id"] for worker in first["workers"]] == [stack.workers[0].id]
            messages = 1
            sent = [asyncio.create_task(stack.chat("[[tokens=2 delay_ms=20]]")) for _ in range(40)]
            told: dict[str, str] = {}
            while len(told) < 40 or set(told.values()) != {"completed"}:
                event = await anext(events)
                messages += 1
                changed = {state["id"]: state["status"] for state in event["requests"]}
                assert before.headers["x-request-id"] not in changed
                told.update(changed)
            # The first one comes besides.
            assert messages <= 4 * (time.monotonic() - begun) + 2
            assert {answer.headers["x-request-id"] for answer in await asyncio.gather(*sent)} == set(told)
            await holds(stack, 0)
            status = await stack.status()
            assert status["total_processed"] == 41
            while event["status"] != status:
                event = await anext(events)


async def test_while_nobody_listens_nothing_is_asked(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        asked: list[str] = []

        async def hear(msg: Any) -> None:
            asked.append(msg.subject)

        async with listening(stack) as events:
            await anext(events)
        await stack.connection.client.subscribe("$JS.API.STREAM.INFO.>", cb=hear)
        await stack.connection.client.flush()
        # The api notices that its listener has left with the next message that it cannot send, within a second.
        async with asyncio.timeout(30):
            while True:
                asked.clear()
                await asyncio.sleep(2.2)
                if not asked:
                    break


async def test_listeners_are_bounded_and_share_one_subscription(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "MAX_LISTENERS", 3)
    async with running(nats_server) as stack:
        settings = load(Settings, nats_url=nats_server.url, _env_file=None)
        connection = await connect(settings, "test")
        try:
            shared = Feed(connection, lambda: queue_status(connection, stack.states, settings, ()), lambda: ())
            before = connection.client._sid
            listeners = [shared.listen(lambda _: True) for _ in range(3)]
            for listener in listeners:
                assert (await anext(listener)).startswith(b"event: queue\ndata: {")
            assert shared.listeners == 3
            with pytest.raises(TooManyListeners):
                await anext(shared.listen(lambda _: True))
            # One for the changes; reading what there was takes one that is gone again.
            assert connection.client._sid - before <= 2
            for listener in listeners:
                await listener.aclose()
            assert shared.listeners == 0
            again = shared.listen(lambda _: True)
            assert await anext(again)
            await shared.close()
            with pytest.raises(StopAsyncIteration):
                await anext(again)
        finally:
            await connection.close()


async def test_it_goes_on_after_nats_was_away(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack, listening(stack) as events, asyncio.timeout(60):
        await anext(events)
        await asyncio.to_thread(nats_server.stop)
        while (await anext(events))["connected"]:
            pass
        await asyncio.to_thread(nats_server.start)
        while not (event := await anext(events))["connected"] or event["status"] is None:
            pass
        answer = await stack.chat("[[tokens=1]]")
        told: set[str] = set()
        while answer.headers["x-request-id"] not in told:
            told |= {state["id"] for state in (await anext(events))["requests"]}


async def test_a_stream_that_is_asked_for_early_tells_its_id_while_it_waits(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0, request_timeout=3) as stack:
        body = {"model": "SmolLM2-135M-Instruct", "messages": [{"role": "user", "content": "x"}], "stream": True}
        url = stack.apis[0].url + "/v1/chat/completions"
        async with stack.http.stream("POST", url, json=body, headers={"Forebay-Stream": "early"}) as answer:
            assert answer.status_code == 200
            state = await stack.state(answer.headers["x-request-id"])
            assert state is not None
            assert state.status.value == "queued"
            lines = [line async for line in answer.aiter_lines() if line]
        assert lines[0] == ": queued"
        assert json.loads(lines[1].removeprefix("data: "))["error"]["code"] == "request_timeout"
        assert len(lines) == 2
