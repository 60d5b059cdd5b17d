"""Every way in which a request can end badly, as its client sees it: by the SDK's exceptions and on the wire."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from forebay_contracts.wire.state import RequestStatus
from support.answers import error_of, summary, user
from support.nats import NatsServer
from support.stack import MODEL, Stack, running
from support.view import holds, idle, stream_state

SLOW = "[[tokens=1000 delay_ms=20]]"
TIMEOUT_S = 2
"""So that what is quick ends within it on a busy machine too."""


async def registered(stack: Stack, count: int) -> int:
    """Wait until `count` states have been written and one is being processed; the bucket's last sequence."""
    bucket = await stack.connection.jetstream.key_value("inference-requests")
    watcher = await bucket.watchall()
    seen: dict[str, str] = {}
    async with asyncio.timeout(30):
        async for entry in watcher:
            if entry is not None:
                seen[entry.key] = json.loads(entry.value or b"{}")["status"]
                if len(seen) == count and "processing" in seen.values():
                    break
    await watcher.stop()
    return int((await stream_state(stack, "KV_inference-requests"))["last_seq"])


# Queue full: 503


async def test_queue_full(nats_server: NatsServer) -> None:
    async with running(nats_server, max_queue_size=5) as stack:
        endless = asyncio.create_task(stack.chat("[[tokens=100000 delay_ms=50]]"))
        await stack.taken(1)
        slow = [asyncio.create_task(stack.chat("[[tokens=2 delay_ms=20]]")) for _ in range(4)]
        await stack.taken(5)
        written = await registered(stack, 5)
        refused = await stack.chat("hi")
        assert summary(refused) == (503, "server_error", "queue_full", "true")
        streamed = await stack.chat("hi", stream=True)
        assert summary(streamed) == (503, "server_error", "queue_full", "true")
        for path, body in (("completions", {"prompt": "hi"}), ("completions", {"prompt": "hi", "stream": True})):
            response = await stack.http.post(f"{stack.apis[0].url}/v1/{path}", json={"model": MODEL, **body})
            assert summary(response) == (503, "server_error", "queue_full", "true")
        with pytest.raises(openai.InternalServerError) as caught:
            await stack.openai().chat.completions.create(model=MODEL, messages=user("hi"))
        assert (caught.value.status_code, caught.value.code) == (503, "queue_full")
        # None of them waited for a place.
        assert not any(task.done() for task in (endless, *slow))
        status = await stack.status()
        assert (status["queue_size"], status["processing_count"], status["active_requests"]) == (4, 1, 5)
        # Nothing was written for those that were refused.
        assert (await stream_state(stack, "KV_inference-requests"))["last_seq"] == written
        assert await stack.state(refused.headers["x-request-id"]) is None
        endless.cancel()
        assert [(await task).status_code for task in slow] == [200] * 4
        status = await idle(stack)
        assert (status["queue_size"], status["processing_count"], status["active_requests"]) == (0, 0, 0)
        assert (status["total_queued"], status["total_processed"], status["total_failed"]) == (5, 4, 0)


async def test_retry_after_is_measured(nats_server: NatsServer) -> None:
    async with running(nats_server, max_queue_size=1) as stack:
        began = time.monotonic()
        await stack.status()
        slow = asyncio.create_task(stack.chat("[[tokens=40 delay_ms=50]]"))
        await stack.taken(1)
        unmeasured = await stack.chat("hi")
        assert unmeasured.status_code == 503
        assert unmeasured.headers["retry-after"] == "1"
        await slow
        await idle(stack)  # reads the status once more: one request has left since
        measured_s = time.monotonic() - began
        slow = asyncio.create_task(stack.chat("[[tokens=40 delay_ms=50]]"))
        await stack.taken(2)
        refused = await stack.chat("hi")
        assert refused.status_code == 503
        assert 1 <= int(refused.headers["retry-after"]) <= math.ceil(measured_s)
        # A client that retries by itself, as the SDK does, gets its answer.
        patient = stack.openai(max_retries=10)
        answer = await patient.chat.completions.create(model=MODEL, messages=user("[[tokens=2]]"))
        assert answer.choices[0].message.content == "t0 t1"
        assert (await slow).status_code == 200


# NATS unreachable: 503


async def test_nats_unreachable(nats_server: NatsServer) -> None:
    async with running(nats_server, request_timeout=2) as stack:
        api = stack.apis[0]
        assert (await stack.chat("hi")).status_code == 200
        await idle(stack)
        await asyncio.to_thread(nats_server.stop)
        await stack.loses_nats(api)
        began = time.monotonic()
        paths = ("queue/status", "queue/request/00000000-0000-4000-8000-000000000000")
        asked = [await stack.http.get(f"{api.url}/v1/{path}") for path in paths]
        asked.append(await stack.http.delete(f"{api.url}/v1/{paths[1]}"))
        assert time.monotonic() - began < 5
        # Admission waits for a NATS that may be back soon, but no longer than the request could.
        began = time.monotonic()
        refused = await asyncio.gather(*(stack.chat("[[tokens=7]]", stream=stream) for stream in (False, True)))
        with pytest.raises(openai.InternalServerError) as caught:
            await stack.openai().completions.create(model=MODEL, prompt="[[tokens=7]]")
        assert time.monotonic() - began < 10
        for response in (*refused, *asked):
            assert summary(response) == (503, "server_error", "queue_unavailable", "true")
        assert (caught.value.status_code, caught.value.code) == (503, "queue_unavailable")
        live, ready = [await stack.http.get(f"{api.url}/health/{kind}") for kind in ("live", "ready")]
        assert (live.status_code, ready.status_code) == (200, 503)
        assert (ready.json()["status"], ready.json()["nats"]) == ("not_ready", "disconnected")

        await asyncio.to_thread(nats_server.start)
        await stack.beats(api)
        await stack.beats(stack.workers[0])
        assert await stack.connection.wait_connected(10)
        assert (await stack.chat("hi")).status_code == 200
        status = await idle(stack)
        assert (status["total_queued"], status["total_processed"]) == (2, 2)
        assert await stack.state(refused[0].headers["x-request-id"]) is None
        assert (await stack.http.get(f"{api.url}/health/ready")).status_code == 200


# Deadline passed: 408


async def test_deadline_while_running(nats_server: NatsServer) -> None:
    async with running(nats_server, request_timeout=TIMEOUT_S) as stack:
        began = time.monotonic()
        response = await stack.chat(SLOW)
        assert 0.9 * TIMEOUT_S < time.monotonic() - began < 5 * TIMEOUT_S
        await _timed_out(stack, response, attempt=1)
        # The one slot is free again.
        assert (await stack.chat("[[tokens=1]]")).status_code == 200
        status = await idle(stack)
        assert (status["total_timed_out"], status["total_failed"], status["total_processed"]) == (1, 1, 1)
        assert (status["processing_count"], status["total_queued"]) == (0, 2)


async def test_deadline_while_waiting(nats_server: NatsServer) -> None:
    async with running(nats_server, request_timeout=TIMEOUT_S) as stack:
        await stack.api(request_timeout=60)
        at_work = asyncio.create_task(stack.chat(SLOW, api=1))
        await stack.begins()
        began = time.monotonic()
        waiting = await asyncio.gather(*(stack.chat("hi", stream=stream) for stream in (False, True)))
        assert 0.9 * TIMEOUT_S < time.monotonic() - began < 5 * TIMEOUT_S
        for response in waiting:
            await _timed_out(stack, response, attempt=0)
        # They have left the queue, and only they.
        await holds(stack, 1)
        assert not at_work.done()
        at_work.cancel()
        status = await idle(stack)
        assert (status["total_timed_out"], status["total_failed"], status["total_cancelled"]) == (2, 2, 1)
        assert status["total_queued"] == 3


async def _timed_out(stack: Stack, response: httpx.Response, attempt: int) -> None:
    assert summary(response) == (408, "timeout_error", "request_timeout", "false")
    assert error_of(response)["message"] == f"the request was not finished within {TIMEOUT_S} seconds"
    request_id = response.headers["x-request-id"]
    state = await stack.reaches(request_id, RequestStatus.TIMED_OUT)
    assert state.attempt == attempt
    assert state.finished_at is not None
    found = (await stack.http.get(f"{stack.apis[0].url}/v1/queue/request/{request_id}")).json()
    assert found["status"] == "timed_out"
    assert "REQUEST_TIMEOUT" in found["error"] or f"within {TIMEOUT_S} seconds" in found["error"]


async def test_deadline_in_the_middle_of_a_stream(nats_server: NatsServer) -> None:
    async with running(nats_server, request_timeout=TIMEOUT_S) as stack:
        response = await stack.chat("[[tokens=1000 delay_ms=200]]", stream=True)
        assert response.status_code == 200
        *_, last, end = response.text.split("\n\n")
        assert end == ""
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_timeout"
        assert "[DONE]" not in response.text
        await stack.reaches(response.headers["x-request-id"], RequestStatus.TIMED_OUT)
        assert (await idle(stack))["total_timed_out"] == 1


async def test_sdk_does_not_retry_what_timed_out_or_failed(nats_server: NatsServer) -> None:
    async with running(nats_server, request_timeout=TIMEOUT_S, max_deliveries=1) as stack:
        client = stack.openai(max_retries=2)
        with pytest.raises(openai.APIStatusError) as timed_out:
            await client.chat.completions.create(model=MODEL, messages=user(SLOW))
        assert (timed_out.value.status_code, timed_out.value.code) == (408, "request_timeout")
        with pytest.raises(openai.InternalServerError) as failed:
            await client.chat.completions.create(model=MODEL, messages=user("[[fail]]"))
        assert (failed.value.status_code, failed.value.code) == (500, "inference_failed")
        assert (await idle(stack))["total_queued"] == 2


# Generation failed, attempts spent: 500


async def test_failed_generation(nats_server: NatsServer) -> None:
    async with running(nats_server, max_deliveries=2) as stack:
        response = await stack.chat("[[tokens=3 fail]]")
        assert summary(response) == (500, "server_error", "inference_failed", "false")
        state = await stack.reaches(response.headers["x-request-id"], RequestStatus.FAILED)
        assert (state.attempt, state.error) == (2, "the generation failed")
        assert (state.fault or "").startswith(f"attempt 2 on worker {stack.workers[0].id}: ")
        status = await idle(stack)
        assert (status["total_failed"], status["total_timed_out"], status["total_queued"]) == (1, 0, 1)
        assert (await stack.chat("hi")).status_code == 200


async def test_crashing_request(nats_server: NatsServer) -> None:
    async with running(nats_server, max_deliveries=1, ack_wait=1) as stack:
        answer = asyncio.create_task(stack.chat("[[tokens=2 crash]]"))
        assert await stack.workers[0].ended() == 70
        await stack.worker()
        response = await answer
        assert summary(response) == (500, "server_error", "inference_failed", "false")
        assert error_of(response)["message"] == "generation failed in 1 attempts"
        await stack.reaches(response.headers["x-request-id"], RequestStatus.FAILED)
        status = await idle(stack)
        assert (status["total_failed"], status["total_queued"]) == (1, 1)
        assert (await stack.chat("hi")).status_code == 200


async def test_own_fault_is_not_tried_twice(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        for stream in (False, True):
            response = await stack.chat("[[dance]]", stream=stream)
            assert summary(response) == (400, "invalid_request_error", None, None)
            state = await stack.reaches(response.headers["x-request-id"], RequestStatus.FAILED)
            assert (state.attempt, state.error) == (1, "the simulated engine does not know the order 'dance'")
        assert (await idle(stack))["total_failed"] == 2


async def test_stream_that_breaks_ends_with_an_error(nats_server: NatsServer) -> None:
    async with running(nats_server, max_deliveries=1) as stack:
        response = await stack.chat("[[tokens=3 delay_ms=20 fail]]", stream=True)
        assert response.status_code == 200
        events = [json.loads(event.removeprefix("data: ")) for event in response.text.strip().split("\n\n")]
        assert [event["choices"][0]["delta"]["content"] for event in events[:-1]] == ["", "t0", " t1", " t2"]
        assert events[-1] == {
            "error": {
                "message": "the generation failed",
                "type": "server_error",
                "param": None,
                "code": "inference_failed",
            }
        }
        pieces: list[str] = []

        async def read(stream: AsyncIterator[Any]) -> None:
            async for chunk in stream:
                pieces.append(chunk.choices[0].text)

        stream = await stack.openai().completions.create(model=MODEL, prompt="[[tokens=2 fail]]", stream=True)
        with pytest.raises(openai.APIError) as caught:
            await read(stream)
        assert pieces == ["t0", " t1"]
        assert (caught.value.message, caught.value.code) == ("the generation failed", "inference_failed")
