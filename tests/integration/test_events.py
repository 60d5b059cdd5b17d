"""`GET /v1/queue/events`: what a listener is told, how often, and that nobody listening costs nothing."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from forebay_api.clients.keys import ANYBODY, Client
from forebay_api.watching import feed
from forebay_api.watching.feed import Feed
from forebay_contracts import keys
from forebay_contracts.nats.connection import connect
from forebay_contracts.queueing.state_store import KeyValueStateStore
from forebay_contracts.queueing.status import queue_status
from forebay_contracts.settings import Settings, load
from forebay_contracts.wire.errors import QueueConflict, TooManyListeners
from forebay_contracts.wire.state import PastAttempt, RequestState, RequestStatus
from support.nats import NatsServer, flushed
from support.proxy import Proxy
from support.stack import MODEL, Stack, running
from support.view import holds

ALICE, OPS = (f"fb-{name}-key-of-more-than-sixteen" for name in ("alice", "ops"))


@contextlib.asynccontextmanager
async def listening(stack: Stack, key: str | None = None) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """The events of the first api, decoded."""

    async def events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                yield json.loads(line[6:])

    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with stack.http.stream("GET", stack.apis[0].url + "/v1/queue/events", headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield events(answer)


@contextlib.asynccontextmanager
async def feeding(stack: Stack, url: str = "") -> AsyncIterator[Feed]:
    """A feed of the test's own, whose bounds it may have changed."""
    settings = load(Settings, nats_url=url or stack.nats.url, _env_file=None)
    connection = await connect(settings, "test")
    try:
        yield Feed(connection, lambda: queue_status(connection, stack.states, settings, ()), lambda: ())
    finally:
        await connection.close()


async def told(events: AsyncGenerator[bytes, None]) -> dict[str, Any]:
    """The next event of a feed of the test's own."""
    async with asyncio.timeout(30):
        message: dict[str, Any] = json.loads((await anext(events)).removeprefix(b"event: queue\ndata: "))
    return message


def state(number: int, status: RequestStatus = RequestStatus.COMPLETED, **fields: Any) -> RequestState:
    """A request that was queued as the `number`-th."""
    now = time.time()
    times = {"timestamp": now, "queued_at": now - 5 + number / 1000, "deadline": now + 60}
    return RequestState(
        **{"id": f"request-{number}", "status": status, "completion_type": "chat", "model": MODEL, **times, **fields}
    )


async def write(stack: Stack, *states: RequestState) -> list[int]:
    """Write first states, in this order; their revisions."""
    store: KeyValueStateStore = stack.states
    return [await store.write(one, 0) for one in states]


def shown(message: dict[str, Any], page: dict[str, str]) -> dict[str, str]:
    """What a page shows after this message that showed `page` before."""
    return ({} if message["reset"] else page) | {one["id"]: one["status"] for one in message["requests"]}


async def test_each_change_is_told_once_and_not_more_often_than_four_times_a_second(nats_server: NatsServer) -> None:
    async with running(nats_server, max_concurrent_requests=8) as stack:
        before = await stack.chat("[[tokens=1]]")
        await stack.reaches(before.headers["x-request-id"], RequestStatus.COMPLETED)
        begun = time.monotonic()
        async with listening(stack) as events, asyncio.timeout(60):
            first = await anext(events)
            assert first["reset"] is True
            assert [state["id"] for state in first["requests"]] == [before.headers["x-request-id"]]
            assert first["connected"] is True
            assert first["status"]["models"][0]["paused_until"] is None
            assert [worker["id"] for worker in first["workers"]] == [stack.workers[0].id]
            messages = 1
            sent = [asyncio.create_task(stack.chat("[[tokens=2 delay_ms=20]]")) for _ in range(40)]
            told: dict[str, str] = {}
            while len(told) < 40 or set(told.values()) != {"completed"}:
                event = await anext(events)
                assert event["reset"] is False
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
        await flushed(stack.connection.client)
        # The api notices that its listener has left with the next message that it cannot send, within a second. Who
        # listens is told the numbers each second, so three seconds of heartbeats must pass without one being read.
        async with asyncio.timeout(30):
            while True:
                asked.clear()
                for _ in range(3):
                    await stack.beats(stack.apis[0])
                if not asked:
                    break


async def test_listeners_are_bounded_and_share_one_subscription(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "MAX_LISTENERS", 3)
    monkeypatch.setattr(feed, "OPERATORS_LISTENERS", 0)
    async with running(nats_server) as stack, feeding(stack) as shared:
        client = shared._connection.client
        before = client._sid
        listeners = [shared.listen(lambda: ANYBODY) for _ in range(3)]
        for listener in listeners:
            assert (await anext(listener)).startswith(b"event: queue\ndata: {")
        assert shared.listeners == 3
        with pytest.raises(TooManyListeners):
            await anext(shared.listen(lambda: ANYBODY))
        # One for the changes; reading what there was takes one that is gone again.
        assert client._sid - before <= 2
        for listener in listeners:
            await listener.aclose()
        assert shared.listeners == 0
        again = shared.listen(lambda: ANYBODY)
        assert await anext(again)
        await shared.close()
        with pytest.raises(StopAsyncIteration):
            await anext(again)


async def test_no_key_takes_the_places_of_others(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "MAX_LISTENERS", 5)
    monkeypatch.setattr(feed, "MAX_LISTENERS_OF_KEY", 2)
    monkeypatch.setattr(feed, "OPERATORS_LISTENERS", 1)
    async with running(nats_server, workers=0) as stack, feeding(stack) as shared, contextlib.AsyncExitStack() as open_:

        async def one_more(client: Client) -> None:
            await anext(await open_.enter_async_context(contextlib.aclosing(shared.listen(lambda: client))))

        alice, bob, carol, ops = (Client(name, operator=name == "ops") for name in ("alice", "bob", "carol", "ops"))
        for client in (alice, alice, bob, bob):
            await one_more(client)
        with pytest.raises(TooManyListeners, match="4 listeners watch"):
            await one_more(carol)
        await one_more(ops)
        monkeypatch.setattr(feed, "MAX_LISTENERS", 9)
        with pytest.raises(TooManyListeners, match="2 listeners with this key"):
            await one_more(alice)
        await one_more(carol)


async def test_a_listener_is_told_the_newest_requests_that_it_may_see(nats_server: NatsServer) -> None:
    """Though others' requests have changed a thousand times since."""
    fault = "attempt 1 on worker w: out of memory"
    past = (PastAttempt(number=1, worker="w", began_at=1.0, fault=fault),)
    mine = [state(number, key="alice", fault=fault, attempts=past) for number in range(60)]
    others = [state(number, key="bob") for number in range(100, 500)]
    async with running(nats_server, workers=0) as stack, feeding(stack) as shared:
        revisions = await write(stack, *mine, *others)
        for one, revision in zip(others[:200], revisions[60:], strict=False):
            await stack.states.write(one, revision)
        for client, expected in (
            (Client("alice"), mine[10:]),
            (Client("carol"), []),
            (Client("ops", operator=True), others[350:]),
        ):
            async with contextlib.aclosing(shared.listen(lambda client=client: client)) as events:  # type: ignore[misc]
                first = await told(events)
                assert first["reset"] is True
                assert first["nats"] == (nats_server.url if client.operator else None)
                assert [one["id"] for one in first["requests"]] == [one.id for one in reversed(expected)]
                # What went wrong inside is not for whoever asks.
                assert {one["fault"] for one in first["requests"]} <= {None}
                assert {past["fault"] for one in first["requests"] for past in one["attempts"]} <= {None}
        async with contextlib.aclosing(shared.listen(lambda: Client("alice", operator=True))) as events:
            await told(events)
            await write(stack, mine[0].model_copy(update={"id": "one-more", "queued_at": time.time()}))
            while not (changed := (await told(events))["requests"]):
                pass
            assert [(one["fault"], one["attempts"][0]["fault"]) for one in changed] == [(fault, fault)]


async def test_unfinished_requests_are_kept_longer_than_others(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "MAX_KEPT", 20)
    async with running(nats_server, workers=0) as stack, feeding(stack) as shared:
        await write(stack, *(state(1000 + number, RequestStatus.PROCESSING) for number in range(15)))
        async with contextlib.aclosing(shared.listen(lambda: ANYBODY)) as events:
            page = shown(await told(events), {})
            assert set(page.values()) == {"processing"}
            assert shared.complete
            last = await write(stack, *(state(2000 + number, queued_at=time.time()) for number in range(100)))
            assert last
            while "request-2099" not in page:
                page = shown(await told(events), page)
            # Whoever comes now is told all that is kept.
            async with contextlib.aclosing(shared.listen(lambda: ANYBODY)) as later:
                kept = shown(await told(later), {})
            assert kept.keys() == {f"request-{number}" for number in (*range(1000, 1015), *range(2095, 2100))}
        # Nothing is kept while nobody listens. Of the older changes then, not one is read.
        monkeypatch.setattr(feed, "MAX_CHANGES", 10)
        assert len(list(await shared.states(ANYBODY))) == 10
        assert not shared.complete


async def test_more_changes_than_a_message_holds_leave_nothing_out(nats_server: NatsServer) -> None:
    """Whoever merges messages has what the bucket has, of the newest requests, however many change at once."""
    async with (
        running(nats_server, max_concurrent_requests=64, max_queue_size=500) as stack,
        listening(stack) as events,
        asyncio.timeout(60),
    ):
        page, resets = shown(await anext(events), {}), 0
        at_once = [state(number, queued_at=time.time()) for number in range(300)]
        await asyncio.gather(*(stack.states.write(one, 0) for one in at_once))
        finished = asyncio.gather(*(stack.chat("[[tokens=3 delay_ms=100]]") for _ in range(100)))
        while not finished.done() or "processing" in page.values() or "queued" in page.values():
            message = await anext(events)
            assert len(message["requests"]) <= feed.MAX_REQUESTS
            resets += message["reset"]
            page = shown(message, page)
        assert resets
        assert len(page) >= feed.MAX_REQUESTS
        for request_id in page:
            written = await stack.state(request_id)
            assert written is not None
            assert page[request_id] == written.status


async def test_what_changed_while_nats_was_away_is_told(nats_server: NatsServer) -> None:
    proxy = await Proxy(nats_server.url).start()
    async with running(nats_server, workers=0) as stack, feeding(stack, proxy.url) as shared, asyncio.timeout(60):
        running_ones = [state(number, RequestStatus.PROCESSING) for number in range(120)]
        revisions = await write(stack, *running_ones)
        async with contextlib.aclosing(shared.listen(lambda: ANYBODY)) as events:
            page = shown(await told(events), {})
            assert set(page.values()) == {"processing"}
            await proxy.cut()
            while (message := await told(events))["connected"]:
                page = shown(message, page)
            for one, revision in zip(running_ones, revisions, strict=True):
                await stack.states.write(one.model_copy(update={"status": RequestStatus.COMPLETED}), revision)
            await proxy.start()
            while "processing" in page.values():
                page = shown(await told(events), page)
            assert page == {f"request-{number}": "completed" for number in range(70, 120)}
    await proxy.cut()


async def test_writes_that_lose_are_not_told(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first write and a later one, of requests that are kept and of such that are no longer kept."""
    monkeypatch.setattr(feed, "MAX_KEPT", 2)
    now = time.time()
    old, gone, kept = (
        state(number, RequestStatus.PROCESSING, id=name, queued_at=at)
        for number, (name, at) in enumerate({"old": now - 60, "gone": now, "kept": now}.items())
    )
    async with running(nats_server, workers=0) as stack, feeding(stack) as shared:
        await write(stack, old, state(5, id="another"), state(6, id="a-third"))
        async with contextlib.aclosing(shared.listen(lambda: ANYBODY)) as events:
            assert shown(await told(events), {}) == {"old": "processing", "a-third": "completed"}
            revisions = dict(zip(("gone", "kept"), await write(stack, gone, kept), strict=True))
            for one in (gone, kept):
                await stack.states.write(one.model_copy(update={"status": RequestStatus.COMPLETED}), revisions[one.id])
            await write(stack, state(9, id="filler", queued_at=now))
            for one in (old, gone, kept):
                for revision in (0, revisions.get(one.id, 0)):
                    with pytest.raises(QueueConflict):
                        await stack.states.write(one.model_copy(update={"status": RequestStatus.QUEUED}), revision)
            await write(stack, state(10, id="last", queued_at=now))
            seen: dict[str, set[str]] = {}
            while "last" not in seen:
                for one in (await told(events))["requests"]:
                    seen.setdefault(one["id"], set()).add(one["status"])
            assert all("queued" not in statuses for statuses in seen.values())
            assert seen.get("old", set()) <= {"processing"}
            # The next write that wins is told.
            revision = (await stack.states.get("old")).revision  # type: ignore[union-attr]
            await stack.states.write(old.model_copy(update={"status": RequestStatus.FAILED}), revision)
            page: dict[str, str] = {}
            while page.get("old") != "failed":
                page = shown(await told(events), page)


async def test_a_key_that_is_taken_away_ends_its_feed(nats_server: NatsServer, tmp_path: Path) -> None:
    def entries(*names: str, operator: bool = True) -> str:
        return "\n".join(
            keys.written(name, key, max_requests=None, operator=operator and name == "ops")
            for name, key in (("alice", ALICE), ("ops", OPS))
            if name in names
        )

    file = tmp_path / "keys.toml"
    file.write_text(entries("alice", "ops"))
    async with running(nats_server, workers=0, api_keys_file=file) as stack:
        await write(stack, state(1, key="alice"), state(2, key="ops"), state(3, key="bob"))
        async with (
            listening(stack, ALICE) as alices,
            listening(stack, OPS) as events,
            asyncio.timeout(30),
        ):
            assert set(shown(await anext(alices), {})) == {"request-1"}
            page = shown(await anext(events), {})
            assert set(page) == {"request-1", "request-2", "request-3"}

            # No operator any more: it is told its own requests, and to forget the others.
            file.write_text(entries("alice", "ops", operator=False))
            while len(page) != 1:
                page = shown(await anext(events), page)
            assert set(page) == {"request-2"}
            await write(stack, state(4, key="alice"), state(5, key="ops"))
            while "request-5" not in page:
                page = shown(await anext(events), page)
            assert set(page) == {"request-2", "request-5"}

            file.write_text(entries("alice"))
            async for message in events:
                page = shown(message, page)
            assert set(page) == {"request-2", "request-5"}
            # The other one goes on.
            assert (await anext(alices))["connected"]
        refused = await stack.http.get(
            stack.apis[0].url + "/v1/queue/events", headers={"authorization": f"Bearer {OPS}"}
        )
        assert refused.status_code == 401


async def test_it_goes_on_after_nats_was_away(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack, listening(stack) as events, asyncio.timeout(60):
        await anext(events)
        await asyncio.to_thread(nats_server.stop)
        while (await anext(events))["connected"]:
            pass
        heard = time.monotonic()
        await anext(events)
        assert time.monotonic() - heard < 10
        await asyncio.to_thread(nats_server.start)
        while not (event := await anext(events))["connected"] or event["status"] is None:
            pass
        answer = await stack.chat("[[tokens=1]]")
        page: dict[str, str] = {}
        while answer.headers["x-request-id"] not in page:
            page = shown(await anext(events), page)


async def test_a_stream_that_is_asked_for_early_tells_its_id_while_it_waits(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0, request_timeout=3) as stack:
        body = {"model": "SmolLM2-135M-Instruct", "messages": [{"role": "user", "content": "x"}], "stream": True}
        url = stack.apis[0].url + "/v1/chat/completions"
        async with stack.http.stream("POST", url, json=body, headers={"Forebay-Stream": "early"}) as answer:
            assert answer.status_code == 200
            await stack.reaches(answer.headers["x-request-id"], RequestStatus.QUEUED)
            lines = [line async for line in answer.aiter_lines() if line]
        assert lines[0] == ": queued"
        assert json.loads(lines[1].removeprefix("data: "))["error"]["code"] == "request_timeout"
        assert len(lines) == 2
