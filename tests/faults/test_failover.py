"""A worker dies or stalls in the middle of an answer: its client must not notice but for a pause."""

import asyncio
import re
import signal
from collections.abc import AsyncIterator

from forebay_contracts.wire.state import RequestStatus
from support.nats import NatsServer
from support.stack import MODEL, Stack, running


def expected(tokens: int) -> str:
    return " ".join(f"t{token}" for token in range(tokens))


async def streamed(stack: Stack, order: str, started: asyncio.Event | None = None) -> str:
    """The text of a streamed chat; `started` is set at the third piece."""
    client = stack.openai()
    stream = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": order}], stream=True
    )
    pieces: list[str] = []
    async for chunk in stream:
        pieces.append(chunk.choices[0].delta.content or "")
        if started is not None and len(pieces) == 3:
            started.set()
    return "".join(pieces)


async def test_stream_goes_on_when_its_worker_is_killed(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        begun = asyncio.Event()
        answer = asyncio.create_task(streamed(stack, "[[tokens=40 delay_ms=50]]", begun))
        await begun.wait()
        await stack.workers[0].kill()
        await stack.worker()
        assert await answer == expected(40)
        await stack.idle()
        status = await stack.status()
        assert (status["total_processed"], status["total_failed"], status["active_requests"]) == (1, 0, 0)


async def test_whole_answer_survives_the_death_of_its_worker(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=1) as stack:
        async with stack.frames("delta") as deltas:
            answer = asyncio.create_task(stack.chat("[[tokens=40 delay_ms=50]]"))
            await anext(deltas)  # some tokens are out
            await stack.workers[0].kill()
        second = await stack.worker()
        response = await answer
        assert response.status_code == 200
        assert response.json()["choices"][0]["message"]["content"] == expected(40)
        assert response.json()["usage"]["completion_tokens"] == 40
        state = await stack.reaches(response.headers["x-request-id"], RequestStatus.COMPLETED)
        assert (state.attempt, state.worker) == (2, second.id)


async def test_worker_that_was_only_slow_cannot_interfere(nats_server: NatsServer) -> None:
    async with running(nats_server, max_concurrent_requests=2, worker_slots=1, ack_wait=5) as stack:
        slow = stack.workers[0]
        begun = asyncio.Event()
        answer = asyncio.create_task(streamed(stack, "[[tokens=20 delay_ms=100]]", begun))
        await begun.wait()
        async with stack.frames("started") as frames:
            slow.signal(signal.SIGSTOP)
            fast = await stack.worker()
            assert (await anext(frames))["attempt"] == 2  # from here on the api hears the second alone
        request_id = (await stack.begins(attempt=2)).id
        # The slow one comes to its end first, notices by its own write, and is of use again.
        fast.signal(signal.SIGSTOP)
        slow.signal(signal.SIGCONT)
        await stack.becomes_idle(slow)
        assert not answer.done()
        fast.signal(signal.SIGCONT)
        assert await answer == expected(20)
        state = await stack.reaches(request_id, RequestStatus.COMPLETED)
        assert (state.attempt, state.worker) == (2, fast.id)
        assert [r.status_code for r in await asyncio.gather(*(stack.chat("hi") for _ in range(4)))] == [200] * 4
        await stack.idle()
        status = await stack.status()
        assert (status["total_processed"], status["total_queued"], status["active_requests"]) == (5, 5, 0)


async def test_request_that_kills_every_worker_ends(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0, max_deliveries=2) as stack:
        answer = asyncio.create_task(stack.chat("[[tokens=2 crash]]"))
        for _ in range(2):
            worker = await stack.launched_worker()  # it may be gone before it has said that it serves
            assert await worker.ended() == 70
        await stack.worker()
        response = await answer
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "inference_failed"
        assert response.headers["x-should-retry"] == "false"
        state = await stack.reaches(response.headers["x-request-id"], RequestStatus.FAILED)
        assert state.attempt == 3
        assert state.fault is not None
        assert re.match(rf"attempt 2 on worker \S+-{worker.pid}-\w+: it ended without a report", state.fault)
        await stack.idle()


async def test_drained_worker_hands_its_stream_over(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=2, ack_wait=60, drain_timeout=0) as stack:
        begun = asyncio.Event()
        answer = asyncio.create_task(streamed(stack, "[[tokens=30 delay_ms=75]]", begun))
        await begun.wait()
        leaving = stack.worker_of(await stack.begins())
        assert await leaving.stop() == 0
        # Far sooner than the ack wait: the message was given back.
        async with asyncio.timeout(30):
            assert await answer == expected(30)


async def test_rolling_restart_of_workers_fails_nothing(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=2, max_concurrent_requests=16, worker_slots=8) as stack:
        stop = asyncio.Event()

        async def load() -> AsyncIterator[str]:
            while not stop.is_set():
                yield await streamed(stack, "[[tokens=10 delay_ms=20]]")

        async def client() -> int:
            count = 0
            async for text in load():
                assert text == expected(10)
                count += 1
            return count

        clients = [asyncio.create_task(client()) for _ in range(8)]
        for old in list(stack.workers):
            await stack.worker()
            assert await old.stop() == 0
        stop.set()
        assert sum(await asyncio.gather(*clients)) >= 8
        await stack.idle()
        status = await stack.status()
        assert status["total_failed"] == status["active_requests"] == 0


async def test_handing_over_is_no_failed_attempt(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=3, ack_wait=60, drain_timeout=0, max_deliveries=1) as stack:
        begun = asyncio.Event()
        answer = asyncio.create_task(streamed(stack, "[[tokens=100 delay_ms=75]]", begun))
        await begun.wait()
        left = list(stack.workers)
        for number in (1, 2):
            leaving = stack.worker_of(await stack.begins(attempt=number))
            left.remove(leaving)
            assert await leaving.stop() == 0
        assert (await stack.begins(attempt=3)).worker == left[0].id
        assert await answer == expected(100)
