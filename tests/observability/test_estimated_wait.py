"""`estimated_wait_s` of a request that waits, from how fast its line has moved."""

import asyncio
import time
from typing import Any

from support.nats import NatsServer
from support.stack import Stack, running


async def look(stack: Stack, request_id: str) -> dict[str, Any]:
    answer = await stack.http.get(f"{stack.apis[0].url}/v1/queue/request/{request_id}")
    found: dict[str, Any] = answer.json()
    return found


async def test_places_before_it_at_the_speed_of_the_line(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        # Each takes half a second or more, one at a time.
        tasks = [asyncio.create_task(stack.chat("[[tokens=10 delay_ms=50]]")) for _ in range(12)]
        last = (await stack.taken(12)).id
        times = [time.monotonic()]
        first_look = await look(stack, last)
        times.append(time.monotonic())
        assert first_look["position"] >= 7
        assert first_look["estimated_wait_s"] is None
        ends = asyncio.as_completed(tasks)
        for _ in range(5):
            await next(ends)
        times.append(time.monotonic())
        found = await look(stack, last)
        times.append(time.monotonic())
        assert list(found)[list(found).index("position") + 1] == "estimated_wait_s"
        # The line has moved for as long as between the looks, each of which takes a while itself.
        paces = found["position"] / (first_look["position"] - found["position"])
        shortest, longest = (times[2] - times[1]) * paces, (times[3] - times[0]) * paces
        assert shortest - 0.05 <= found["estimated_wait_s"] <= longest + 0.05
        await asyncio.gather(*tasks)
        assert (await look(stack, last))["estimated_wait_s"] is None


async def test_whoever_looks_at_the_queue_has_its_lines_measured(nats_server: NatsServer) -> None:
    """Each api for itself: by its status, its metrics, its page, so that a first look has an answer too."""
    async with running(nats_server, apis=2) as stack:
        tasks = [asyncio.create_task(stack.chat("[[tokens=10 delay_ms=50]]", api=0)) for _ in range(10)]
        last = (await stack.taken(10)).id
        await stack.status(api=1)
        await next(asyncio.as_completed(tasks))
        (await stack.http.get(f"{stack.apis[1].url}/metrics")).raise_for_status()
        answer = await stack.http.get(f"{stack.apis[1].url}/v1/queue/request/{last}")
        assert 0 < answer.json()["estimated_wait_s"] < 60
        await asyncio.gather(*tasks)
