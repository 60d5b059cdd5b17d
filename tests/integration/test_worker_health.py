"""What a worker tells probes: loading is alive, a deaf engine is not, and only one that serves is ready."""

import asyncio
import concurrent.futures
import contextlib
import signal
from typing import Any

import httpx
import pytest

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.state import RequestStatus
from forebay_inference import exposition
from forebay_inference.health import Health
from support.nats import NatsServer
from support.service import Worker
from support.stack import Stack, running

LIVE, READY = "/health/live", "/health/ready"


async def ask(stack: Stack, worker: Worker, path: str) -> tuple[int, dict[str, Any]]:
    answer = await stack.http.get(worker.url + path)
    return answer.status_code, answer.json()


async def becomes(stack: Stack, worker: Worker, path: str, status: int) -> dict[str, Any]:
    """Ask until the answer has `status`: a probe too has nothing but the next probe."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(httpx.ConnectError):  # it has only just been launched
                found, body = await ask(stack, worker, path)
                if found == status:
                    return body
            await asyncio.sleep(0.05)


async def test_a_worker_that_serves_is_live_and_ready(nats_server: NatsServer) -> None:
    async with running(nats_server, metrics_port=0) as stack:
        worker = stack.workers[0]
        for path in (LIVE, READY):
            assert await ask(stack, worker, path) == (200, {"status": "ready", "nats": "connected"})
        assert "forebay_worker_slots 1.0" in (await stack.http.get(worker.url + "/metrics")).text
        assert (await stack.http.get(worker.url + "/")).status_code == 404
        assert (await stack.http.get(worker.url + "/health")).status_code == 404


async def test_health_is_told_without_metrics_too(nats_server: NatsServer) -> None:
    async with running(nats_server, metrics="false", metrics_port=0) as stack:
        worker = stack.workers[0]
        await becomes(stack, worker, READY, 200)
        assert (await stack.http.get(worker.url + "/metrics")).status_code == 404


async def test_one_that_drains_is_live_and_not_ready(nats_server: NatsServer) -> None:
    async with running(nats_server, metrics_port=0) as stack:
        worker = stack.workers[0]
        under_way = asyncio.create_task(stack.chat("[[tokens=100000 delay_ms=50]]"))
        await stack.begins()
        worker.signal(signal.SIGTERM)
        assert (await becomes(stack, worker, READY, 503))["status"] == "draining"
        assert await ask(stack, worker, LIVE) == (200, {"status": "draining", "nats": "connected"})
        under_way.cancel()
        assert await worker.ended() == 0


@pytest.mark.model
async def test_one_that_loads_is_live_and_not_ready(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0) as stack:
        worker = await stack.launched_worker(metrics_port=0, inference_engine="transformers")
        assert (await becomes(stack, worker, LIVE, 200))["status"] == "loading"
        status, found = await ask(stack, worker, READY)
        assert (status, found["status"]) == (503, "loading")
        await stack.serves(worker)
        assert (await becomes(stack, worker, READY, 200))["status"] == "ready"


async def test_without_nats_one_is_live_and_not_ready_until_it_is_back(nats_server: NatsServer) -> None:
    async with running(nats_server, metrics_port=0) as stack:
        worker = stack.workers[0]
        await asyncio.to_thread(nats_server.stop)
        assert (await becomes(stack, worker, READY, 503))["nats"] == "disconnected"
        assert (await ask(stack, worker, LIVE))[0] == 200
        await asyncio.to_thread(nats_server.start)
        await becomes(stack, worker, READY, 200)


async def test_a_stuck_engine_is_not_live_and_its_request_goes_to_another_worker(nats_server: NatsServer) -> None:
    async with running(nats_server, metrics_port=0, engine_stall_timeout=1, max_deliveries=2) as stack:
        first = stack.workers[0]
        under_way = asyncio.create_task(stack.chat("[[tokens=2 delay_ms=900000]]"))
        await stack.begins()
        assert await first.ended() == 1
        # It may be the request that the engine is stuck at: it counts as an attempt and is not tried for ever.
        begins = asyncio.create_task(stack.begins(attempt=2))  # it does not live long
        second = await stack.worker()
        assert (await begins).worker == second.id
        assert await second.ended() == 1
        answer = await under_way
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "inference_failed")
        state = await stack.reaches(answer.headers["x-request-id"], RequestStatus.FAILED)
        assert state.attempt == 2
        assert state.fault is not None
        assert "no step in 1 s with requests in the batch" in state.fault


async def test_a_process_that_was_stopped_for_a_while_is_not_stuck(nats_server: NatsServer) -> None:
    async with running(nats_server, metrics_port=0, engine_stall_timeout=1, ack_wait=30) as stack:
        worker = stack.workers[0]
        under_way = asyncio.create_task(stack.chat("[[tokens=5 delay_ms=300]]"))
        await stack.begins()
        worker.signal(signal.SIGSTOP)
        # Its event loop says nothing, which a probe notices by its own time limit.
        with pytest.raises(httpx.ReadTimeout):
            await stack.http.get(worker.url + LIVE, timeout=2)
        worker.signal(signal.SIGCONT)
        assert (await ask(stack, worker, LIVE))[0] == 200
        assert (await under_way).json()["choices"][0]["message"]["content"] == "t0 t1 t2 t3 t4"


async def test_an_event_loop_that_does_not_answer_is_not_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "LOOP_PATIENCE_S", 0.2)
    port = exposition.serve(InferenceSettings(_env_file=None, metrics_port=0), lambda: Health("ready", True, None))
    with concurrent.futures.ThreadPoolExecutor(1) as elsewhere:
        asked = elsewhere.submit(httpx.get, f"http://127.0.0.1:{port}{LIVE}", timeout=20)
        # What a probe must notice: this holds the loop.
        answer = asked.result()
    assert (answer.status_code, answer.json()["fault"]) == (503, "the event loop does not answer")


async def test_a_fault_is_told_with_its_reason() -> None:
    settings = InferenceSettings(_env_file=None, metrics_port=0)
    port = exposition.serve(settings, lambda: Health("ready", True, "no memory"))
    async with httpx.AsyncClient() as client:
        for path in (LIVE, READY):
            answer = await client.get(f"http://127.0.0.1:{port}{path}")
            assert (answer.status_code, answer.json()["fault"]) == (503, "no memory")
