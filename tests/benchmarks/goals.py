"""Single figures with a goal each: first token at half load, relayed tokens, refusals, memory of what waits, wire.

python tests/benchmarks/goals.py [--quick]
"""

import asyncio
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import driver, systems
from benchmarks.common import cpu_s, drive, free_port, log, memory_mb, part_main, slope, spread
from support.stack import Stack, running

BUDGET_S = 200
LIMITS = {"max_concurrent_requests": 64, "max_queue_size": 1000}
WAITING = {"max_concurrent_requests": 1, "max_queue_size": 10_000, "request_timeout": 300}
"""Settings under which all requests but one wait."""


async def first_token(rounds: int, seconds: float) -> dict[str, Any]:
    """Time to first token of 64 clients at half of what 64 clients can have; the engine costs nothing.

    In turns with that engine behind HTTP alone, at the same arrivals: what is left of the time without the queue.
    """
    async with systems.forebay(**LIMITS) as (ours, stack, _):
        full = [await drive(ours.port, 64, 2, warm_up=0.5, stream=True, tokens=20) for _ in range(min(rounds, 3))]
        capacity = spread([row["requests_per_s"] for row in full])
        rows, bare = [], []
        with systems.ALL["bare HTTP"]() as engine:
            for number in range(rounds):
                options = {"stream": True, "tokens": 20, "rate": capacity["median"] / 2, "seed": number + 1}
                bare.append(await drive(engine.port, 64, seconds, warm_up=0.5, **options))
                engine.hold()
                rows.append(await drive(ours.port, 64, seconds, warm_up=0.5, **options))
                await stack.idle()
                engine.go_on()

    def figures(turns: list[dict[str, Any]]) -> dict[str, Any]:
        found = {name: spread([row["first_token_ms"][name] for row in turns]) for name in ("p50", "p99")}
        return found | {"driver_lag_p99": spread([row["lag_ms"]["p99"] for row in turns])}

    return {"capacity_streams_per_s": capacity, **figures(rows), "bare_http": figures(bare)}


async def relayed(rounds: int, seconds: float, workers: int) -> dict[str, Any]:
    """Tokens a second through one api process, 64 streams of 100 tokens."""
    async with systems.forebay(workers=workers, **LIMITS) as (ours, stack, _):
        rows, api = [], []
        for _ in range(rounds):
            before = ours.cpu()["api"]
            row = await drive(ours.port, 64, seconds, warm_up=0.5, stream=True, tokens=100)
            await stack.idle()
            rows.append(row["tokens_per_s"])
            api.append(row["requests"] * 100 / (ours.cpu()["api"] - before))
    return {"tokens_per_s": spread(rows), "tokens_per_cpu_second_of_the_api": spread(api)}


async def refusals(rounds: int, seconds: float) -> dict[str, Any]:
    """1,000 requests a second at a queue that is full."""
    async with systems.forebay(max_concurrent_requests=1, max_queue_size=4) as (ours, stack, _):
        holding = [asyncio.create_task(stack.chat("[[tokens=1 delay_ms=55000]]")) for _ in range(4)]
        async with asyncio.timeout(10):
            while (await stack.status())["active_requests"] < 4:  # noqa: ASYNC110 -- no event says so
                await asyncio.sleep(0.05)
        rows = [await drive(ours.port, 256, seconds, warm_up=0.5, rate=1000, seed=n + 1) for n in range(rounds)]
        for task in holding:
            task.cancel()
    return {
        "refusals_per_s": spread([sum(row["statuses"].values()) / seconds for row in rows]),
        "statuses": [row["statuses"] for row in rows],
        **{name: spread([row["refused_ms"][name] for row in rows]) for name in ("p50", "p99")},
    }


async def waiting_memory(stack: Stack, most: int) -> dict[str, Any]:
    """What each waiting request adds to the api's own memory, in bytes; the stack has the settings WAITING."""
    api = stack.apis[0]
    request = driver.request_bytes(1, stream=False, delay_ms=250_000)
    await stack.status()
    points = [(0.0, memory_mb(api.pid))]
    open_ones: list[asyncio.StreamWriter] = []
    while len(open_ones) < most:
        for _ in range(most // 5):
            _, writer = await asyncio.open_connection("127.0.0.1", api.port)
            writer.write(request)
            open_ones.append(writer)
        async with asyncio.timeout(60):
            while (await stack.status())["active_requests"] < len(open_ones):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        points.append((float(len(open_ones)), memory_mb(api.pid)))
    for writer in open_ones:
        writer.transport.abort()
    each = slope([(count, memory["uss"]) for count, memory in points]) * 1e6
    body = len(request.partition(b"\r\n\r\n")[2])
    return {"points": points, "bytes_each": round(each), "body_bytes": body, "bytes_each_less_body": round(each - body)}


async def waiting(most: int) -> dict[str, Any]:
    """The memory of a waiting request in a system of its own."""
    async with systems.forebay(**WAITING) as (_, stack, _):
        return await waiting_memory(stack, most)


async def wire(requests: int) -> dict[str, Any]:
    """Messages and bytes of one request at nats-server, streamed (20 tokens) and not (5)."""
    port = free_port()
    found: dict[str, Any] = {}
    with systems.nats_server("-m", str(port)) as nats:
        async with running(nats, **LIMITS) as stack, httpx.AsyncClient() as http:

            async def seen() -> dict[str, int]:
                values = (await http.get(f"http://127.0.0.1:{port}/varz")).json()
                return {name: values[name] for name in ("in_msgs", "out_msgs", "in_bytes", "out_bytes")}

            for name, stream, tokens in (("whole", False, 5), ("streamed", True, 20)):
                await stack.idle()
                before, cpu = await seen(), cpu_s([psutil.Process(nats.pid)])
                for _ in range(requests):
                    (await stack.chat(f"[[tokens={tokens}]]", stream=stream)).raise_for_status()
                await asyncio.sleep(0.1)
                after = await seen()
                found[name] = {key: round((after[key] - before[key]) / requests, 1) for key in before}
                found[name]["nats_cpu_ms"] = round(1000 * (cpu_s([psutil.Process(nats.pid)]) - cpu) / requests, 3)
    return found


async def measure(quick: bool) -> dict[str, Any]:
    """All of them, one after the other."""
    rounds, seconds = (1, 1.5) if quick else (5, 3)
    found: dict[str, Any] = {"rounds": rounds}
    steps = {
        "first_token_at_half_load": lambda: first_token(rounds, seconds),
        "relayed_by_1_worker": lambda: relayed(rounds, seconds, 1),
        "relayed_by_2_workers": lambda: relayed(rounds, seconds, 2),
        "refusals": lambda: refusals(rounds, seconds),
        "waiting_memory": lambda: waiting(500 if quick else 5000),
        "wire": lambda: wire(50 if quick else 300),
    }
    for name, step in steps.items():
        found[name] = await step()
        log(f"{name}: {found[name]}")
    return found


if __name__ == "__main__":
    sys.exit(part_main("goals", BUDGET_S, measure, __doc__ or ""))
