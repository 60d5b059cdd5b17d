"""`estimated_wait_s` of a request that waits, from how fast its line has moved."""

import asyncio
from typing import Any

from support.nats import NatsServer
from support.stack import Stack, running


async def look(stack: Stack, request_id: str) -> dict[str, Any]:
    answer = await stack.http.get(f"{stack.apis[0].url}/v1/queue/request/{request_id}")
    found: dict[str, Any] = answer.json()
    return found


async def test_places_before_it_at_the_speed_of_the_line(nats_server: NatsServer) -> None:
    async with running(nats_server) as stack:
        # Each takes 0.3 s, one at a time.
        tasks = [asyncio.create_task(stack.chat("[[tokens=10 delay_ms=30]]")) for _ in range(12)]
        last = (await stack.apis[0].logged(r"(\S+) queued for \S+ at 12$"))[1]
        first_look = await look(stack, last)
        assert first_look["position"] >= 8
        assert first_look["estimated_wait_s"] is None
        ends = asyncio.as_completed(tasks)
        for _ in range(5):
            await next(ends)
        found = await look(stack, last)
        assert list(found)[list(found).index("position") + 1] == "estimated_wait_s"
        assert 0.2 * found["position"] <= found["estimated_wait_s"] <= 1.5 * found["position"]
        await asyncio.gather(*tasks)
        assert (await look(stack, last))["estimated_wait_s"] is None
