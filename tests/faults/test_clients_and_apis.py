"""A client or an api goes away: nobody's work is not done, and no place stays taken."""

import asyncio
import contextlib
import random
import signal

import httpx
import pytest

from forebay_contracts.nats.streams import HEARTBEAT_TTL_S
from forebay_contracts.wire.state import RequestStatus
from support.nats import NatsServer
from support.stack import MODEL, Stack, running
from support.view import keys

ENDED = (RequestStatus.CANCELLED, RequestStatus.COMPLETED)


def body(order: str, *, stream: bool, **fields: object) -> dict[str, object]:
    return {"model": MODEL, "stream": stream, "messages": [{"role": "user", "content": order}], **fields}


async def request_ids(stack: Stack) -> list[str]:
    return await keys(stack, "inference-requests")


@pytest.mark.parametrize("stream", [False, True])
async def test_client_that_leaves_frees_its_slot_and_its_place(nats_server: NatsServer, stream: bool) -> None:
    async with running(nats_server) as stack:
        url = f"{stack.apis[0].url}/v1/chat/completions"
        async with httpx.AsyncClient(timeout=60) as leaving:
            running_one = asyncio.create_task(
                leaving.post(url, json=body("[[tokens=1000 delay_ms=50]]", stream=stream))
            )
            await stack.begins()
            waiting_one = asyncio.create_task(leaving.post(url, json=body("[[tokens=1000]]", stream=stream)))
            await stack.taken(2)
            staying = asyncio.create_task(stack.chat("hi"))
            await stack.taken(3)
            for task in (waiting_one, running_one):
                task.cancel()
        answer = await staying
        assert answer.status_code == 200
        await stack.idle()
        ids = [key for key in await request_ids(stack) if key != answer.headers["x-request-id"]]
        assert len(ids) == 2
        await stack.all_reach(ids, RequestStatus.CANCELLED)
        assert (await stack.status())["total_cancelled"] == 2


async def test_clients_that_leave_at_random_points(nats_server: NatsServer) -> None:
    async with running(nats_server, max_concurrent_requests=8, max_queue_size=300) as stack:
        url = f"{stack.apis[0].url}/v1/chat/completions"
        chance = random.Random(7)

        async def visit() -> None:
            with contextlib.suppress(TimeoutError, httpx.HTTPError):
                async with asyncio.timeout(chance.uniform(0, 1.5)):
                    await stack.http.post(url, json=body("[[tokens=20 delay_ms=10]]", stream=chance.random() < 0.5))

        await asyncio.gather(*(visit() for _ in range(200)))
        await stack.idle()
        await stack.all_reach(await request_ids(stack), *ENDED)
        status = await stack.status()
        assert status["total_processed"] + status["total_cancelled"] == status["total_queued"]
        # All slots are there: as many requests as there are run at once.
        answers = await asyncio.gather(*(stack.chat("[[tokens=2 delay_ms=50]]") for _ in range(8)))
        assert [answer.status_code for answer in answers] == [200] * 8


async def test_requests_of_an_api_that_died_end(nats_server: NatsServer) -> None:
    async with running(nats_server, apis=2, max_concurrent_requests=4) as stack:
        url = f"{stack.apis[0].url}/v1/chat/completions"
        tasks = [
            asyncio.create_task(stack.http.post(url, json=body("[[tokens=2000 delay_ms=50]]", stream=bool(n % 2))))
            for n in range(20)
        ]
        await stack.taken(20)
        await stack.apis[0].kill()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, httpx.HTTPError) for result in results)
        await stack.idle(api=1)
        await stack.all_reach(await request_ids(stack), RequestStatus.CANCELLED)
        assert (await stack.chat("hi", api=1)).status_code == 200
        assert (await stack.status(api=1))["total_cancelled"] == 20


async def test_an_api_that_stands_still_for_a_while_keeps_its_requests(nats_server: NatsServer) -> None:
    async with running(nats_server, max_concurrent_requests=4) as stack:
        answers = [asyncio.create_task(stack.chat("[[tokens=300 delay_ms=20]]", stream=bool(n % 2))) for n in range(4)]
        await stack.taken(4, RequestStatus.PROCESSING)
        stack.apis[0].signal(signal.SIGSTOP)
        # As a body that holds its event loop would. Without a heartbeat it is silent, and silence leaves no event.
        await asyncio.sleep(HEARTBEAT_TTL_S + 1.5)
        stack.apis[0].signal(signal.SIGCONT)
        for answer in await asyncio.gather(*answers):
            assert answer.status_code == 200
            assert "t299" in answer.text
        await stack.idle()
        assert (await stack.status())["total_processed"] == 4


async def test_an_api_that_was_taken_for_dead_tells_its_clients_what_the_states_say(nats_server: NatsServer) -> None:
    async with running(nats_server, max_concurrent_requests=4) as stack:
        api = stack.apis[0]
        async with stack.frames("completed") as ends:
            chats = (stack.chat("[[tokens=20 delay_ms=100]]", stream=bool(n % 2)) for n in range(4))
            asked = [asyncio.create_task(chat) for chat in chats]
            await stack.taken(4, RequestStatus.PROCESSING)
            api.signal(signal.SIGSTOP)
            for _ in asked:
                await anext(ends)  # it lies in the socket of the api from now on
        # Its subscription goes with its connection, and it makes no new one. So the worker takes it for dead.
        await asyncio.to_thread(nats_server.restart)
        await stack.beats(stack.workers[0])
        await stack.all_reach(await request_ids(stack), RequestStatus.CANCELLED)
        api.signal(signal.SIGCONT)
        for answer in await asyncio.gather(*asked):
            assert "the answer was not received" in answer.text
            assert "[DONE]" not in answer.text
        assert (await stack.status())["total_cancelled"] == 4


async def test_stopping_api_finishes_its_streams(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        api = stack.apis[0]
        answer = asyncio.create_task(stack.chat("[[tokens=30 delay_ms=50]]", stream=True))
        await stack.begins()
        assert await api.stop() == 0
        response = await answer
        assert response.text.endswith("data: [DONE]\n\n")
        assert '"t29"' in response.text or '" t29"' in response.text


async def test_slow_reader_holds_nobody_up(nats_server: NatsServer) -> None:
    async with running(nats_server, max_concurrent_requests=2) as stack:
        url = f"{stack.apis[0].url}/v1/chat/completions"
        # With log probabilities a token is more than the buffers of a connection hold.
        asked = body("[[tokens=60000]]", stream=True, logprobs=True, top_logprobs=3)
        async with stack.http.stream("POST", url, json=asked) as slow:
            assert slow.status_code == 200
            # It reads nothing more; what it does not read is bounded, then it is given up.
            await stack.reaches(slow.headers["x-request-id"], RequestStatus.CANCELLED)
            assert (await stack.chat("hi")).status_code == 200
        await stack.idle()
