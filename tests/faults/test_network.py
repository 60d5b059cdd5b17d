"""The network between a service and NATS breaks: no hole and no double in an answer, nothing run twice."""

import asyncio

from forebay_contracts.queueing.recent_requests import recent_states
from forebay_contracts.wire.state import RequestStatus
from support.answers import error_of, summary
from support.nats import NatsServer, flushed
from support.proxy import Proxy
from support.stack import MODEL, Stack, running
from support.view import holds

ORDER = "[[tokens=100 delay_ms=30]]"
EXPECTED = " ".join(f"t{token}" for token in range(100))


async def stream(stack: Stack, begun: asyncio.Event, pieces_before: int) -> str:
    answer = await stack.openai().chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": ORDER}], stream=True
    )
    pieces: list[str] = []
    async for chunk in answer:
        pieces.append(chunk.choices[0].delta.content or "")
        if len(pieces) == pieces_before:
            begun.set()
    return "".join(pieces)


async def cut_off(stack: Stack, proxy: Proxy, pieces_before: int = 5) -> asyncio.Task[str]:
    """A stream whose network breaks once it has begun."""
    begun = asyncio.Event()
    answer = asyncio.create_task(stream(stack, begun, pieces_before))
    await begun.wait()
    await proxy.cut()
    return answer


async def test_frames_lost_on_the_way_to_the_api_are_sent_again(nats_server: NatsServer) -> None:
    proxy = Proxy(nats_server.url)
    async with running(nats_server, apis=0) as stack:
        await proxy.start()
        api = await stack.api(nats_url=proxy.url)
        answer = await cut_off(stack, proxy)
        await stack.loses_nats(api)
        async with stack.frames("delta") as deltas:
            for _ in range(10):  # they go to nobody
                await anext(deltas)
        orders = await stack.connection.client.subscribe("inference.resend.*")
        await flushed(stack.connection.client)
        await proxy.start()
        await orders.next_msg(timeout=30)
        assert await answer == EXPECTED
        await stack.idle()
        assert (await stack.status())["total_processed"] == 1
        await proxy.cut()


async def test_end_of_an_answer_lost_on_the_way_is_sent_again(nats_server: NatsServer) -> None:
    proxy = Proxy(nats_server.url)
    async with running(nats_server, apis=0) as stack:
        await proxy.start()
        api = await stack.api(nats_url=proxy.url)
        async with stack.frames("completed") as ends:
            # Late enough for the end to come before the api counts as dead.
            answer = await cut_off(stack, proxy, pieces_before=40)
            await stack.loses_nats(api)
            await anext(ends)  # the worker comes to its end, and nobody confirms it
            assert not answer.done()
            await proxy.start()
        assert await answer == EXPECTED
        await proxy.cut()


async def test_api_cut_off_for_so_long_that_it_counts_as_dead_tells_its_clients(nats_server: NatsServer) -> None:
    proxy = Proxy(nats_server.url)
    async with running(nats_server, apis=0, max_concurrent_requests=2) as stack:
        await proxy.start()
        await stack.api(nats_url=proxy.url)
        await stack.knows_workers()
        asked = [asyncio.create_task(stack.chat(f"[[tokens={tokens} delay_ms=50]]")) for tokens in (60, 2000)]
        for nth in (1, 2):
            await stack.taken(nth, RequestStatus.PROCESSING)
        await proxy.cut()
        await holds(stack, 0)  # the one is done and the other cancelled, and nobody can be told
        assert not any(answer.done() for answer in asked)
        await proxy.start()
        done, running_still = [await answer for answer in asked]
        # An answer that nobody received is not completed: state, counter and client agree.
        assert summary(done) == (499, "invalid_request_error", "request_cancelled", None)
        assert error_of(done)["message"].startswith("the request was cancelled: the answer was not received")
        assert summary(running_still) == (499, "invalid_request_error", "request_cancelled", None)
        assert error_of(running_still)["message"] == "the request was cancelled: the api that took it is gone"
        status = await stack.status()
        assert (status["total_processed"], status["total_cancelled"], status["total_failed"]) == (0, 2, 0)
        await proxy.cut()


async def test_worker_cut_off_loses_nothing(nats_server: NatsServer) -> None:
    proxy = Proxy(nats_server.url)
    async with running(nats_server, workers=0) as stack:
        await proxy.start()
        worker = await stack.worker(nats_url=proxy.url, metrics_port=0)
        answer = await cut_off(stack, proxy)
        await stack.loses_nats(worker)
        await stack.makes_tokens(worker, 10)  # they go nowhere
        await proxy.start()
        assert await answer == EXPECTED
        await stack.idle()
        status = await stack.status()
        assert (status["total_processed"], status["total_queued"]) == (1, 1)
        await proxy.cut()


async def test_publish_whose_ack_was_lost_runs_once(nats_server: NatsServer) -> None:
    proxy = Proxy(nats_server.url)
    async with running(nats_server, apis=0, max_concurrent_requests=4) as stack:
        await proxy.start()
        api = await stack.api(nats_url=proxy.url)
        proxy.swallow_answers = True
        answer = asyncio.create_task(stack.chat("[[tokens=3]]"))
        # The message is in, and the worker has it; the api does not know.
        await stack.begins()
        await proxy.cut()
        proxy.swallow_answers = False
        await proxy.start()
        await stack.beats(api)
        response = await answer
        await stack.idle()
        status = await stack.status()
        assert status["total_queued"] == 1
        assert response.status_code == 200
        assert response.json()["choices"][0]["message"]["content"] == "t0 t1 t2"
        assert status["total_processed"] == 1
        await proxy.cut()


async def test_the_same_worker_gets_the_request_again(nats_server: NatsServer) -> None:
    proxy = Proxy(nats_server.url)
    async with running(nats_server, workers=0, max_concurrent_requests=4, ack_wait=1) as stack:
        await proxy.start()
        worker = await stack.worker(nats_url=proxy.url)
        answer = await cut_off(stack, proxy)
        await asyncio.sleep(1.5)  # the ack wait passes, of which nobody is told while no worker pulls
        await proxy.start()
        assert await answer == EXPECTED
        # It has the message anew and goes on: that is no other attempt.
        (state,) = await recent_states(stack.connection, 10)
        assert (await stack.reaches(state.id, RequestStatus.COMPLETED)).attempt == 1
        assert (await stack.chat("hi")).status_code == 200
        assert worker.returncode is None
        await stack.idle()
        assert (await stack.status())["total_processed"] == 2
        await proxy.cut()
