"""A request's states, as HTTP and KV tell them, from the queue to each of its ends; and the totals over all."""

import asyncio
import json
import time
from typing import Any

import httpx
import pytest

from forebay_contracts.wire.state import RequestStatus
from support.answers import chat_body, error_of, summary
from support.nats import NatsServer
from support.stack import Stack, running
from support.view import holds, idle

SLOW = "[[tokens=2000 delay_ms=20]]"
UNKNOWN = "00000000-0000-4000-8000-000000000000"

NINE_FIELDS = [
    "queue_size",
    "processing_count",
    "max_concurrent",
    "max_queue_size",
    "total_processed",
    "total_failed",
    "total_queued",
    "active_requests",
    "is_running",
]


async def request_state(stack: Stack, request_id: str, api: int = 0) -> dict[str, Any]:
    """`GET /v1/queue/request/{id}`."""
    response = await stack.http.get(f"{stack.apis[api].url}/v1/queue/request/{request_id}")
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def submitted(stack: Stack, order: str, nth: int, api: int = 0, **fields: Any) -> tuple[Any, str]:
    """The task of a chat that is the `nth` in the queue, and its id, known while it waits."""
    task = asyncio.create_task(stack.chat(order, api=api, **fields))
    return task, (await stack.taken(nth)).id


async def test_states_of_a_whole_life(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0) as stack:
        bucket = await stack.connection.jetstream.key_value("inference-requests")
        watcher = await bucket.watchall()
        before = time.time()
        task, request_id = await submitted(stack, "one [[tokens=20 delay_ms=100]]", 1)
        await stack.reaches(request_id, RequestStatus.QUEUED)
        queued = await request_state(stack, request_id)
        assert list(queued)[:5] == ["id", "status", "completion_type", "timestamp", "error"]
        assert before <= queued["timestamp"] <= time.time()
        assert queued == {
            "id": request_id,
            "status": "queued",
            "completion_type": "chat",
            "timestamp": queued["timestamp"],
            "error": None,
            "fault": None,
            "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "attempt": 0,
            "worker": None,
            "queued_at": queued["timestamp"],
            "started_at": None,
            "finished_at": None,
            "position": 1,
            "estimated_wait_s": None,
            "usage": None,
            "retryable": False,
            "retried_as": None,
            "key": None,
            "tier": "default",
            "turn": 0,
            "deadline": queued["timestamp"] + 60,
            "logged": False,
            "attempts": [],
            "attempt_at": None,
            "first_token_at": None,
            "resumed": 0,
        }
        worker = await stack.worker()
        await stack.reaches(request_id, RequestStatus.PROCESSING)
        processing = await request_state(stack, request_id)
        assert queued["queued_at"] <= processing["started_at"] <= time.time()
        assert processing == queued | {
            "status": "processing",
            "attempt": 1,
            "worker": worker.id,
            "started_at": processing["started_at"],
            "position": None,
            "estimated_wait_s": None,
        }
        assert (await task).status_code == 200
        await stack.reaches(request_id, RequestStatus.COMPLETED)
        completed = await request_state(stack, request_id)
        assert processing["started_at"] < completed["first_token_at"] < completed["finished_at"] <= time.time()
        assert completed == processing | {
            "status": "completed",
            "finished_at": completed["finished_at"],
            "first_token_at": completed["first_token_at"],
            "usage": {"prompt_tokens": 3, "completion_tokens": 20, "cached_tokens": 0, "reasoning_tokens": 0},
        }
        # What a watcher of the bucket saw: each state once, in order, nothing else.
        seen = []
        async for entry in watcher:
            if entry is not None:
                assert entry.key == request_id
                seen.append(json.loads(entry.value or b"{}"))
                if seen[-1]["status"] == "completed":
                    break
        await watcher.stop()
        assert [state["status"] for state in seen] == ["queued", "processing", "completed"]
        assert [state["worker"] for state in seen] == [None, stack.workers[0].id, stack.workers[0].id]
        assert {state["sequence"] for state in seen} == {1}
        assert {state["deadline"] - state["queued_at"] for state in seen} == {60}


async def test_completion_type_is_told(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        body = {"model": "SmolLM2-135M-Instruct", "prompt": "hi"}
        response = await stack.http.post(f"{stack.apis[0].url}/v1/completions", json=body)
        request_id = response.headers["x-request-id"]
        await stack.reaches(request_id, RequestStatus.COMPLETED)
        assert (await request_state(stack, request_id))["completion_type"] == "completion"


async def test_position_while_waiting(nats_server: NatsServer) -> None:
    async with running(nats_server, apis=2) as stack:
        first, running_id = await submitted(stack, SLOW, 1)
        await stack.reaches(running_id, RequestStatus.PROCESSING)
        others = [await submitted(stack, "[[tokens=1]]", nth, api=nth % 2) for nth in (2, 3, 4)]
        for _, request_id in others:
            await stack.reaches(request_id, RequestStatus.QUEUED)
        for api in (0, 1):
            states = [await request_state(stack, request_id, api) for _, request_id in others]
            assert [(state["status"], state["position"]) for state in states] == [
                ("queued", 1),
                ("queued", 2),
                ("queued", 3),
            ]
        assert (await request_state(stack, running_id))["position"] is None
        first.cancel()
        assert [(await task).status_code for task, _ in others] == [200] * 3
        for _, request_id in others:
            await stack.reaches(request_id, RequestStatus.COMPLETED)
            assert (await request_state(stack, request_id))["position"] is None


async def test_retry_goes_back_to_processing(nats_server: NatsServer) -> None:
    async with running(nats_server, max_deliveries=2) as stack:
        seen: list[tuple[str, int]] = []
        bucket = await stack.connection.jetstream.key_value("inference-requests")
        watcher = await bucket.watchall()
        task = asyncio.create_task(stack.chat("[[tokens=2 fail]]"))
        async for entry in watcher:
            if entry is not None:
                state = json.loads(entry.value or b"{}")
                seen.append((state["status"], state["attempt"]))
                if state["status"] == "failed":
                    break
        await watcher.stop()
        # A state is written once more with what an attempt failed of.
        assert [*dict.fromkeys(seen)][-3:] == [("processing", 1), ("processing", 2), ("failed", 2)]
        assert (await task).status_code == 500


# Cancelled by DELETE


async def test_delete(nats_server: NatsServer) -> None:
    async with running(nats_server, apis=2) as stack:
        at_work, work_id = await submitted(stack, SLOW, 1)
        await stack.reaches(work_id, RequestStatus.PROCESSING)
        waiting, wait_id = await submitted(stack, "[[tokens=1]]", 2, stream=True)
        await stack.reaches(wait_id, RequestStatus.QUEUED)
        # The waiting one, by another api than its own.
        answer = await stack.http.delete(f"{stack.apis[1].url}/v1/queue/request/{wait_id}")
        assert (answer.status_code, answer.json()) == (200, {"id": wait_id, "cancelled": True, "status": "cancelled"})
        assert summary(await waiting) == (499, "invalid_request_error", "request_cancelled", None)
        await holds(stack, 1)
        assert not at_work.done()
        answer = await stack.http.delete(f"{stack.apis[0].url}/v1/queue/request/{work_id}")
        assert (answer.status_code, answer.json()) == (200, {"id": work_id, "cancelled": True, "status": "cancelled"})
        response = await at_work
        assert summary(response) == (499, "invalid_request_error", "request_cancelled", None)
        assert error_of(response)["message"] == "the request was cancelled: by DELETE /v1/queue/request"
        for request_id in (wait_id, work_id):
            state = await request_state(stack, request_id)
            assert (state["status"], state["error"]) == ("cancelled", "by DELETE /v1/queue/request")
            assert state["finished_at"] is not None
        # The slot is free, and a second DELETE changes nothing.
        assert (await stack.chat("[[tokens=1]]")).status_code == 200
        again = await stack.http.delete(f"{stack.apis[0].url}/v1/queue/request/{work_id}")
        assert again.json() == {"id": work_id, "cancelled": False, "status": "cancelled"}
        status = await idle(stack)
        assert (status["total_cancelled"], status["total_processed"], status["total_failed"]) == (2, 1, 0)
        assert (status["total_queued"], status["processing_count"]) == (3, 0)
        unknown = await stack.http.delete(f"{stack.apis[0].url}/v1/queue/request/{UNKNOWN}")
        assert summary(unknown) == (404, "invalid_request_error", "request_not_found", None)


async def test_delete_ends_a_stream_with_an_error(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        url = f"{stack.apis[0].url}/v1"
        async with stack.http.stream("POST", f"{url}/chat/completions", json=chat_body(SLOW, stream=True)) as stream:
            assert stream.status_code == 200
            request_id = stream.headers["x-request-id"]
            events: list[str] = []
            async for line in stream.aiter_lines():
                events += [line] if line else []
                if len(events) == 3:
                    assert (await stack.http.delete(f"{url}/queue/request/{request_id}")).status_code == 200
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "request_cancelled"
        assert len(events) < 1900
        assert (await stack.chat("[[tokens=1]]")).status_code == 200
        assert (await idle(stack))["total_cancelled"] == 1


async def test_delete_of_what_has_ended_changes_nothing(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        request_id = (await stack.chat("hi")).headers["x-request-id"]
        await idle(stack)
        before = await request_state(stack, request_id)
        answer = await stack.http.delete(f"{stack.apis[0].url}/v1/queue/request/{request_id}")
        assert answer.json() == {"id": request_id, "cancelled": False, "status": "completed"}
        assert await request_state(stack, request_id) == before
        status = await stack.status()
        assert (status["total_processed"], status["total_cancelled"]) == (1, 0)


# The client closes its connection


@pytest.mark.parametrize("stream", [False, True])
async def test_client_leaves(nats_server: NatsServer, stream: bool) -> None:
    async with running(nats_server, max_queue_size=2) as stack:
        async with httpx.AsyncClient(timeout=30) as leaving:
            url = f"{stack.apis[0].url}/v1/chat/completions"
            tasks, ids = [], []
            for nth in (1, 2):
                tasks.append(asyncio.create_task(leaving.post(url, json=chat_body(SLOW, stream=stream))))
                ids.append((await stack.taken(nth)).id)
            await stack.reaches(ids[0], RequestStatus.PROCESSING)
            await stack.reaches(ids[1], RequestStatus.QUEUED)
            assert (await stack.chat("hi")).status_code == 503
            tasks[1].cancel()
            assert (await stack.reaches(ids[1], RequestStatus.CANCELLED)).attempt == 0
            await holds(stack, 1)
            tasks[0].cancel()
            assert (await stack.reaches(ids[0], RequestStatus.CANCELLED)).attempt == 1
            await holds(stack, 0)
        assert (await stack.chat("hi", stream=stream)).status_code == 200
        status = await idle(stack)
        assert (status["total_cancelled"], status["total_processed"], status["total_queued"]) == (2, 1, 3)
        assert (await request_state(stack, ids[0]))["error"] == "the client left"


# Totals


async def test_totals_over_two_apis_and_a_restart_of_everything(nats_server: NatsServer) -> None:
    settings = {"max_deliveries": 1, "max_concurrent_requests": 2, "max_queue_size": 50}
    async with running(nats_server, apis=2, **settings) as stack:
        empty = await stack.status()
        assert list(empty)[:9] == NINE_FIELDS
        assert list(empty.values())[:9] == [0, 0, 2, 50, 0, 0, 0, 0, True]
        for api in (0, 1):
            assert (await stack.chat("hi", api=api)).status_code == 200
            assert (await stack.chat("[[fail]]", api=api)).status_code == 500
            assert (await stack.chat("hi", api=api, stream=True)).status_code == 200
        await idle(stack)
        # Two at work and three that wait, seen alike by both.
        tasks = [asyncio.create_task(stack.chat(SLOW, api=nth % 2)) for nth in range(5)]
        await holds(stack, 5)
        await _processing(stack, 2)
        for api in (0, 1):
            status = await stack.status(api)
            assert list(status)[:9] == NINE_FIELDS
            assert list(status.values())[:9] == [3, 2, 2, 50, 4, 2, 11, 5, True]
        for task in tasks:
            task.cancel()
        await idle(stack)
        old_id = (await stack.chat("hi")).headers["x-request-id"]
        before = await idle(stack)
        assert list(before.values())[:9] == [0, 0, 2, 50, 5, 2, 12, 0, True]
        assert before["total_cancelled"] == 5
    await asyncio.to_thread(nats_server.restart)
    async with running(nats_server, apis=2, **settings) as stack:
        for api in (0, 1):
            # All but the workers, of whom the killed one counts until its heartbeat is too old.
            assert list((await stack.status(api)).items())[:11] == list(before.items())[:11]
        assert (await request_state(stack, old_id))["status"] == "completed"
        assert (await stack.chat("hi", api=1)).status_code == 200
        after = await idle(stack)
        assert (after["total_processed"], after["total_queued"]) == (6, 13)


async def _processing(stack: Stack, count: int) -> None:
    """Wait until `count` of the states in the bucket are `processing`."""
    bucket = await stack.connection.jetstream.key_value("inference-requests")
    watcher = await bucket.watchall()
    states: dict[str, str] = {}
    async with asyncio.timeout(30):
        async for entry in watcher:
            if entry is not None:
                states[entry.key] = json.loads(entry.value or b"{}")["status"]
                if list(states.values()).count("processing") == count:
                    break
    await watcher.stop()


async def test_status_without_workers(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0) as stack:
        status = await stack.status()
        assert (status["is_running"], status["workers"], status["workers_ready"]) == (False, 0, 0)
        assert (status["max_concurrent"], status["max_queue_size"]) == (1, 100)
        ready = await stack.http.get(f"{stack.apis[0].url}/health/ready")
        assert (ready.status_code, ready.json()["workers"]) == (200, [])
        task, _ = await submitted(stack, "[[tokens=1]]", 1)
        worker = await stack.worker()
        await stack.knows_workers()
        assert (await task).status_code == 200
        status = await idle(stack)
        assert (status["is_running"], status["workers"], status["workers_ready"]) == (True, 1, 1)
        ready = await stack.http.get(f"{stack.apis[0].url}/health/ready")
        assert [(one["id"], one["status"]) for one in ready.json()["workers"]] == [(worker.id, "ready")]


async def test_waiting_requests_survive_a_restart_of_everything_but_their_api(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0) as stack:
        tasks = [(await submitted(stack, f"[[tokens={nth}]]", nth))[0] for nth in (1, 2, 3)]
        await asyncio.to_thread(nats_server.restart)
        await stack.worker()
        answers = [(await task).json()["choices"][0]["message"]["content"] for task in tasks]
        assert answers == ["t0", "t0 t1", "t0 t1 t2"]


async def test_an_api_that_may_not_drain_tells_its_clients_at_once(nats_server: NatsServer) -> None:
    async with running(nats_server, max_concurrent_requests=2, drain_timeout=0) as stack:
        api, began = stack.apis[0], time.monotonic()
        url = f"{api.url}/v1/chat/completions"
        whole = asyncio.create_task(stack.http.post(url, json=chat_body(SLOW)))
        async with stack.http.stream("POST", url, json=chat_body(SLOW, stream=True)) as streamed:
            lines = streamed.aiter_lines()
            await anext(lines)
            await holds(stack, 2)
            assert await api.stop() == 0
            rest = [line async for line in lines]
        assert "api_stopped" in rest[-2]
        answer = await whole
        assert (answer.status_code, error_of(answer)["code"]) == (503, "api_stopped")
        assert time.monotonic() - began < 20, "generating takes twice as long"


async def test_unknown_request(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0) as stack:
        response = await stack.http.get(f"{stack.apis[0].url}/v1/queue/request/{UNKNOWN}")
        assert summary(response) == (404, "invalid_request_error", "request_not_found", None)
        error = error_of(response)
        assert (error["param"], error["message"]) == ("request_id", f"No request '{UNKNOWN}' is known.")
