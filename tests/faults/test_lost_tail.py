"""A server that lost power has lost the last records of a stream: clients, states and counters agree all the same."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from forebay_contracts.queueing.recent_requests import recent_states
from forebay_contracts.wire.state import RequestStatus
from support.killed_broker import text_of
from support.nats import NatsServer
from support.stack import Stack, running

STREAMS = ("INFERENCE", "KV_inference-requests", "INFERENCE_COUNTERS")


@pytest.fixture
def server(tmp_path: Path) -> NatsServer:
    return NatsServer(tmp_path / "nats")


@pytest.fixture
async def stack(server: NatsServer) -> AsyncIterator[Stack]:
    server.start()
    try:
        limits = {"max_concurrent_requests": 2, "worker_slots": 1, "admission_patience": 30}
        async with running(server, workers=2, **limits) as stack:
            yield stack
    finally:
        server.stop()


async def test_all_that_is_told_of_a_request_agrees_after_a_stream_lost_its_tail(
    server: NatsServer, stack: Stack, tmp_path: Path
) -> None:
    """Each stream in turn loses its tail, and then all of them."""
    folder, saved, sent = tmp_path / "nats" / "jetstream" / "$G" / "streams", tmp_path / "saved", 0
    for streams in (*([stream] for stream in STREAMS), STREAMS):
        await asyncio.to_thread(server.kill)
        shutil.copytree(folder, saved)
        await asyncio.to_thread(server.start)
        assert await stack.connection.wait_connected(10)
        ended = await asyncio.gather(*(stack.chat("[[tokens=3]]") for _ in range(3)))
        running = [asyncio.create_task(stack.chat("[[tokens=40 delay_ms=50]]", stream=True)) for _ in range(2)]
        waiting = asyncio.create_task(stack.chat("[[tokens=3]]"))
        sent += 6
        await stack.becomes(lambda state: state.status is RequestStatus.QUEUED)
        await asyncio.to_thread(server.kill)
        for stream in streams:
            shutil.rmtree(folder / stream)
            shutil.copytree(saved / stream, folder / stream)
        shutil.rmtree(saved)
        await asyncio.to_thread(server.start)
        assert await stack.connection.wait_connected(10)
        texts = [text_of(answer) for answer in (*ended, *await asyncio.gather(*running, waiting))]
        assert texts == [text(3)] * 3 + [text(40)] * 2 + [text(3)], streams
        await stack.idle()
        states = [state.status for state in await recent_states(stack.connection, 1000)]
        assert states == [RequestStatus.COMPLETED] * sent, streams
        status = await stack.status()
        assert (status["total_processed"], status["total_cancelled"], status["total_failed"]) == (sent, 0, 0), streams


def text(tokens: int) -> str:
    return " ".join(f"t{token}" for token in range(tokens))
