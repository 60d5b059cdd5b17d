"""The limits hold: what the server says they are, what it never exceeds, and a change while requests wait."""

import asyncio
import json
import math
from typing import Any

import pytest
from nats.js.kv import KeyValue

from forebay_contracts.wire.state import RequestStatus
from support.answers import user
from support.nats import NatsServer, flushed
from support.stack import MODEL, Stack, running
from support.view import consumer_reaches, holds, idle, jetstream

CONSUMER = "HuggingFaceTB-SmolLM2-135M-Instruct"


async def limits(stack: Stack, consumer: str = CONSUMER) -> tuple[int, int]:
    """`max_msgs` of the stream and `max_ack_pending` of the consumer, from the server."""
    stream = await jetstream(stack, "STREAM.INFO.INFERENCE")
    found = await jetstream(stack, f"CONSUMER.INFO.INFERENCE.{consumer}")
    return stream["config"]["max_msgs"], found["config"]["max_ack_pending"]


async def waiting(stack: Stack, count: int, first: int = 1, **fields: Any) -> list[asyncio.Task[Any]]:
    """Requests that the queue has taken; each asks for as many tokens as its place."""
    tasks = []
    for nth in range(first, first + count):
        tasks.append(asyncio.create_task(stack.chat(f"[[tokens={nth}]]", **fields)))
        await stack.taken(nth)
    return tasks


def text(tokens: int) -> str:
    return " ".join(f"t{n}" for n in range(tokens))


async def test_limits_are_the_servers(nats_server: NatsServer) -> None:
    async with running(nats_server, max_queue_size=7, max_concurrent_requests=3) as stack:
        assert await limits(stack) == (7, 3)
        status = await stack.status()
        assert (status["max_queue_size"], status["max_concurrent"]) == (7, 3)


async def test_never_more_than_two_at_once(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=2, max_concurrent_requests=2) as stack:
        await consumer_reaches(stack, CONSUMER, num_waiting=4)  # each worker pulls for both slots
        bucket = await stack.connection.jetstream.key_value("inference-requests")
        watching = asyncio.create_task(_most_processing(bucket, 50))
        done = asyncio.Event()
        sampling = asyncio.create_task(_most_ack_pending(stack, done))
        answers = await asyncio.gather(*(stack.chat("[[tokens=3 delay_ms=10]]") for _ in range(50)))
        assert [answer.json()["choices"][0]["message"]["content"] for answer in answers] == ["t0 t1 t2"] * 50
        most_processing, workers = await asyncio.wait_for(watching, 30)
        done.set()
        most_out, samples = await sampling
        assert most_processing == 2
        assert most_out == 2
        assert samples > 5
        # Both took part, though each could have held both slots.
        assert workers == {worker.id for worker in stack.workers}
        status = await idle(stack)
        assert (status["total_processed"], status["max_concurrent"]) == (50, 2)


async def _most_processing(bucket: KeyValue, requests: int) -> tuple[int, set[str]]:
    """Most requests in `processing` at once until all are done, as the bucket tells it; the workers that had one."""
    watcher = await bucket.watchall()
    now: dict[str, str] = {}
    most, workers = 0, set()
    async for entry in watcher:
        if entry is not None:
            state = json.loads(entry.value or b"{}")
            now[entry.key] = state["status"]
            most = max(most, list(now.values()).count("processing"))
            workers |= {state["worker"]} - {None}
            if list(now.values()).count("completed") == requests:
                break
    await watcher.stop()
    return most, workers


async def _most_ack_pending(stack: Stack, done: asyncio.Event) -> tuple[int, int]:
    """The most that the consumer had out in any sample until `done`, and how many samples there were."""
    most, samples = -math.inf, 0
    while not done.is_set():
        most = max(most, (await jetstream(stack, f"CONSUMER.INFO.INFERENCE.{CONSUMER}"))["num_ack_pending"])
        samples += 1
    return int(most), samples


async def test_slots_bound_one_worker(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0, max_concurrent_requests=4, worker_slots=1) as stack:
        tasks = await waiting(stack, 4)
        first = await stack.worker()
        bucket = await stack.connection.jetstream.key_value("inference-requests")
        most, workers = await asyncio.wait_for(_most_processing(bucket, 4), 30)
        assert (most, workers) == (1, {first.id})
        assert [(await task).status_code for task in tasks] == [200] * 4


async def test_in_order_of_arrival(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0) as stack:
        tasks = await waiting(stack, 6)
        await stack.worker()
        ids = [(await task).headers["x-request-id"] for task in tasks]
        began = [(await stack.reaches(request_id, RequestStatus.COMPLETED)).started_at or 0 for request_id in ids]
        assert began == sorted(began)


async def test_changed_limits_are_applied_to_the_live_queue(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0, max_queue_size=4) as stack:
        tasks = await waiting(stack, 4)
        assert (await stack.chat("hi")).status_code == 503
        assert await limits(stack) == (4, 1)
        await stack.api(max_queue_size=6, max_concurrent_requests=2)
        assert await limits(stack) == (6, 2)
        # At once for an api that started with the old ones, too.
        tasks += await waiting(stack, 2, first=5)
        assert (await stack.chat("hi")).status_code == 503
        assert {(s["max_queue_size"], s["max_concurrent"]) for s in [await stack.status(n) for n in (0, 1)]} == {(6, 2)}
        # Smaller than what waits: nothing is dropped, and nothing is taken until there is room.
        await stack.api(max_queue_size=3, max_concurrent_requests=2)
        assert await limits(stack) == (3, 2)
        await holds(stack, 6)
        assert (await stack.chat("hi")).status_code == 503
        await stack.worker(max_queue_size=3, max_concurrent_requests=2)
        answers = [await task for task in tasks]
        assert [answer.json()["choices"][0]["message"]["content"] for answer in answers] == [
            text(nth) for nth in range(1, 7)
        ]
        status = await idle(stack)
        assert (status["total_queued"], status["total_processed"]) == (6, 6)
        assert (await stack.chat("hi")).status_code == 200


async def test_same_settings_change_nothing(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        changes = await stack.connection.client.subscribe("$JS.EVENT.ADVISORY.*.*.>")
        await flushed(stack.connection.client)
        await stack.api()
        await stack.worker()
        await stack.connection.jetstream.add_stream(name="LATER", subjects=["later"])
        # Whatever they had changed would have been told of before.
        assert (await changes.next_msg(timeout=10)).subject == "$JS.EVENT.ADVISORY.STREAM.CREATED.LATER"


async def test_larger_concurrency_reaches_the_workers_that_run(nats_server: NatsServer) -> None:
    """Slots are each worker's own, the limit is the consumer's: a new worker brings the old one more."""
    async with running(nats_server, max_concurrent_requests=1) as stack:
        slow = [asyncio.create_task(stack.chat("[[tokens=1000 delay_ms=20]]")) for _ in range(2)]
        await stack.taken(2)
        second = await stack.worker(max_concurrent_requests=2, worker_slots=1)
        await stack.becomes(lambda state: state.worker == second.id)
        assert not any(task.done() for task in slow)
        for task in slow:
            task.cancel()
        await idle(stack)


async def test_two_models(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0, max_concurrent_requests=2) as stack:
        small = await stack.worker(model_name="org/Small-1.5")
        large = await stack.worker(model_name="large", max_concurrent_requests=3, model_aliases="big")
        await stack.knows_workers()
        client = stack.openai()
        models = [model async for model in client.models.list()]
        # The api's own default model is listed too, since requests for it would wait for its worker.
        assert {model.id: (model.model_extra or {})["status"] for model in models} == {
            f"HuggingFaceTB/{MODEL}": "no_worker",
            "org/Small-1.5": "ready",
            "large": "ready",
        }
        assert (await limits(stack, "org-Small-1-5"), await limits(stack, "large")) == ((100, 2), (100, 3))
        consumers = await jetstream(stack, "CONSUMER.LIST.INFERENCE", {})
        assert {one["name"]: one["config"]["filter_subject"] for one in consumers["consumers"]} == {
            CONSUMER: f"inference.requests.{CONSUMER}.*",
            "org-Small-1-5": "inference.requests.org-Small-1-5.*",
            "large": "inference.requests.large.*",
        }
        assert (await stack.status())["max_concurrent"] == 7
        for name, served, worker in [
            ("org/Small-1.5", "org/Small-1.5", small),
            ("Small-1.5", "org/Small-1.5", small),
            ("large", "large", large),
            ("big", "large", large),
        ]:
            raw = await client.chat.completions.with_raw_response.create(model=name, messages=user("[[tokens=2]]"))
            assert raw.parse().model == served
            state = await stack.reaches(raw.headers["x-request-id"], RequestStatus.COMPLETED)
            assert (state.model, state.worker) == (served, worker.id)
        # A request for the one does not wait behind those for the other.
        blocked = [asyncio.create_task(stack.chat("[[tokens=1000 delay_ms=20]]", model="large")) for _ in range(5)]
        await holds(stack, 5)
        assert (await stack.chat("hi", model="Small-1.5")).status_code == 200
        assert not any(task.done() for task in blocked)
        for task in blocked:
            task.cancel()
        await idle(stack)


async def test_two_models_of_one_token_are_refused(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0, model_name="org/model") as stack:
        api = await _fails_to_start(stack, model_name="org-model")
        assert "the models 'org/model' and 'org-model' both become 'org-model' on NATS" in api


async def _fails_to_start(stack: Stack, **settings: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        await stack.api(**settings)
    assert await stack.apis[-1].ended() == 2
    return str(caught.value)
