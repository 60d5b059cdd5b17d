"""Stored answers outlive whatever is killed: a short run of `stored_soak.py`."""

import asyncio
import json
import time

import httpx
import pytest

from faults.stored_soak import soak
from support.nats import NatsServer
from support.stack import MODEL, Stack, running

STREAMS = 100
TAKEN_UP_WITHIN_S = 20.0


@pytest.mark.timeout(180)
async def test_every_answer_is_whole_and_exact_whatever_is_killed() -> None:
    found = await soak(seconds=12, clients=30, pause_s=2)
    assert (found["lost"], found["wrong"]) == ([], []), found
    assert found["responses"] >= 30
    assert found["taken_up"] >= 10
    assert set(found["killed"]) == {"api", "worker", "nats"}


async def test_streams_of_a_killed_api_are_taken_up_at_another(nats_server: NatsServer) -> None:
    limits = {"max_concurrent_requests": STREAMS, "worker_slots": STREAMS, "max_queue_size": 2 * STREAMS}
    async with running(nats_server, apis=2, workers=1, **limits) as stack:
        begun = asyncio.Semaphore(0)
        streams = [asyncio.create_task(_until_it_breaks(stack, begun)) for _ in range(STREAMS)]
        for _ in range(STREAMS):
            await begun.acquire()
        await stack.apis[0].kill()
        killed_at = time.monotonic()
        broken = await asyncio.gather(*streams)
        await asyncio.gather(*(_taken_up(stack, events, killed_at) for events in broken))


async def _until_it_breaks(stack: Stack, begun: asyncio.Semaphore) -> list[dict[str, object]]:
    """The events that a stream had brought when its api was killed."""
    body = {"model": MODEL, "input": "[[tokens=60 delay_ms=100]]", "stream": True}
    events: list[dict[str, object]] = []
    try:
        async with stack.http.stream("POST", f"{stack.apis[0].url}/v1/responses", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    events.append(json.loads(line[6:]))
                    if len(events) == 8:
                        begun.release()
    except httpx.HTTPError:
        return events
    raise AssertionError("its api was not killed")


async def _taken_up(stack: Stack, events: list[dict[str, object]], killed_at: float) -> None:
    first: dict[str, dict[str, str]] = events[0]  # type: ignore[assignment]
    path = f"/v1/responses/{first['response']['id']}?stream=true&starting_after={events[-1]['sequence_number']}"
    before = len(events)
    async with stack.http.stream("GET", stack.apis[1].url + path) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                if len(events) == before:
                    assert time.monotonic() - killed_at < TAKEN_UP_WITHIN_S
                events.append(json.loads(line[6:]))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    text = "".join(str(event["delta"]) for event in events if event["type"] == "response.output_text.delta")
    assert text == " ".join(f"t{number}" for number in range(60))
