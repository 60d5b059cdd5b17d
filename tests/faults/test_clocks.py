"""Services whose clocks are ten minutes wrong, in both directions."""

import asyncio
import re
import time
from collections.abc import AsyncIterator

import pytest

from forebay_contracts.nats import clock
from forebay_contracts.wire.state import RequestStatus
from support.nats import NatsServer
from support.stack import Stack, running

OFF_S = 600
TIMEOUT_S = 3
TOLERANCE_S = 2
"""A measurement of the time may be wrong by half of its round trip on a busy machine."""


@pytest.fixture
async def stack(nats_server: NatsServer) -> AsyncIterator[Stack]:
    """Three apis and three workers: one of each has the right time, one is ahead, one behind."""
    limits = {"max_concurrent_requests": 6, "worker_slots": 2, "request_timeout": TIMEOUT_S, "metrics_port": 0}
    async with running(nats_server, apis=0, workers=0, **limits) as stack:
        for ahead_s in (0, OFF_S, -OFF_S):
            await stack.api(clock_ahead_s=ahead_s)
            await stack.worker(clock_ahead_s=ahead_s)
        await stack.knows_workers()
        yield stack


async def test_every_request_has_its_true_time_and_all_times_are_of_one_clock(stack: Stack) -> None:
    began = time.time()
    orders = [("[[tokens=5 delay_ms=20]]", api) for api in range(3) for _ in range(6)]
    answers = await asyncio.gather(*(stack.chat(order, api) for order, api in orders))
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == {"t0 t1 t2 t3 t4"}
    assert all(abs(answer.json()["created"] - time.time()) < 10 for answer in answers)
    ids = [answer.headers["x-request-id"] for answer in answers]
    await stack.all_reach(ids, RequestStatus.COMPLETED)
    states = [await stack.state(request_id) for request_id in ids]
    assert {state.worker for state in states if state} == {worker.id for worker in stack.workers}
    for state in states:
        assert state is not None
        assert state.started_at is not None
        assert state.finished_at is not None
        assert began - TOLERANCE_S < state.queued_at <= state.started_at <= state.finished_at
        assert state.finished_at < time.time() + TOLERANCE_S
        assert abs(state.deadline - state.queued_at - TIMEOUT_S) < 0.01
    for worker in stack.workers:
        text = (await stack.http.get(f"{worker.url}/metrics")).text
        for metric in ("forebay_queue_wait_seconds", "forebay_time_to_first_token_seconds"):
            (total_s,) = re.findall(rf"^{metric}_sum.* (.*)$", text, re.M)
            (count,) = re.findall(rf"^{metric}_count.* (.*)$", text, re.M)
            assert 0 <= float(total_s) < TIMEOUT_S * float(count)


async def test_a_deadline_comes_when_it_is_due(stack: Stack) -> None:
    began = time.monotonic()
    answers = await asyncio.gather(*(stack.chat("[[tokens=100000 delay_ms=50]]", api) for api in (0, 1, 2) * 3))
    assert {answer.status_code for answer in answers} == {408}
    assert TIMEOUT_S - TOLERANCE_S < time.monotonic() - began < TIMEOUT_S + 20
    await stack.all_reach([answer.headers["x-request-id"] for answer in answers], RequestStatus.TIMED_OUT)
    await stack.idle()
    status = await stack.status()
    assert (status["total_timed_out"], status["total_cancelled"], status["total_processed"]) == (len(answers), 0, 0)


async def test_a_wrong_clock_is_a_warning(nats_server: NatsServer) -> None:
    async with running(nats_server, workers=0) as stack:
        api = await stack.api(clock_ahead_s=-OFF_S)
        assert await api.logged(r"this machine's clock is (59[89]|60[01])\.\d s behind that of NATS")


async def test_the_time_of_nats_is_asked_for(nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(nats_server, workers=0) as stack:
        monkeypatch.setattr(clock, "_zero", clock._zero + OFF_S)
        await clock.measure(stack.connection.requests)
        assert abs(clock.skew_s()) < TOLERANCE_S
        measured = clock._zero
        await clock.measure(stack.connection.requests)
        assert clock._zero == pytest.approx(measured, abs=TOLERANCE_S)
        nats_server.stop()
        before = clock._zero
        await clock.measure(stack.connection.requests)
        assert clock._zero == before
        nats_server.start()
