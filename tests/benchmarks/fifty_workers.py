"""Fifty workers on one machine, on the simulated engine: is all work shared, is anything lost, what do they cost idle?

    python tests/benchmarks/fifty_workers.py [--quick]

Closed load on all of them, then ten are killed in the middle of it; an answer that is not the whole text ends it.
`completed` is each worker's own count of log lines.
"""

import asyncio
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import systems
from benchmarks.common import cpu_s, drive, free_port, log, memory_mb, part_main
from support.stack import Stack, running

BUDGET_S = 150
TOKENS, DELAY_MS = 5, 100
STARTED_AT_ONCE = 4


async def load(stack: Stack, clients: int, seconds: float, kill: int) -> dict[str, Any]:
    """Closed load; `kill` workers are killed a third of the way through. Fails unless every answer is whole."""
    port = stack.apis[0].port
    loading = asyncio.create_task(drive(port, clients, seconds, tokens=TOKENS, delay_ms=DELAY_MS))
    if kill:
        await asyncio.sleep(seconds / 3)
        victims, stack.workers[:] = stack.workers[:kill], stack.workers[kill:]
        await asyncio.gather(*(victim.kill() for victim in victims))
    figures = await loading
    return {
        "outcomes": {"whole": figures["requests"], "not 200": figures["not_200"]},
        "requests_per_s": figures["requests_per_s"],
        "p50_s": round(figures["p50_ms"] / 1000, 3),
        "max_s": round(figures["max_ms"] / 1000, 3),
    }


async def measure(quick: bool) -> dict[str, Any]:
    """Start, idle, load, kill."""
    count, seconds = (8, 6) if quick else (50, 20)
    clients, port = count * 2, free_port()
    settings = {"max_concurrent_requests": count * 2, "worker_slots": 2, "max_queue_size": 1000, "ack_wait": 2}
    found: dict[str, Any] = {"workers": count, "slots_each": 2, "clients": clients}
    with systems.nats_server("-m", str(port)) as nats:
        async with running(nats, workers=0, **settings) as stack, httpx.AsyncClient() as http:
            began, gate = time.monotonic(), asyncio.Semaphore(STARTED_AT_ONCE)

            async def start() -> None:
                async with gate:
                    await stack.worker()

            await asyncio.gather(*(start() for _ in range(count)))
            found["started_in_s"] = round(time.monotonic() - began, 1)
            workers = [psutil.Process(worker.pid) for worker in stack.workers]

            async def messages() -> int:
                return int((await http.get(f"http://127.0.0.1:{port}/varz")).json()["in_msgs"])

            await asyncio.sleep(3)
            idle_s = 5 if quick else 15
            used, nats_used, seen = cpu_s(workers), cpu_s([psutil.Process(nats.pid)]), await messages()
            await asyncio.sleep(idle_s)
            found["idle"] = {
                "workers_percent_of_a_core": round(100 * (cpu_s(workers) - used) / idle_s, 2),
                "nats_percent_of_a_core": round(100 * (cpu_s([psutil.Process(nats.pid)]) - nats_used) / idle_s, 2),
                "messages_per_s": round((await messages() - seen) / idle_s, 1),
                "worker_uss_mb": round(statistics.median(memory_mb(one.pid)["uss"] for one in workers), 1),
                "nats_rss_mb": memory_mb(nats.pid)["rss"],
            }
            log(f"idle: {found['idle']}")
            found["undisturbed"] = await load(stack, clients, seconds, 0)
            done = [sum(" completed after" in line for line in worker.log) for worker in stack.workers]
            found["completed_by_worker"] = {
                "least": min(done),
                "median": statistics.median(done),
                "most": max(done),
                "sum": sum(done),
            }
            killed = count // 5
            found["killed"] = {"workers": killed, **await load(stack, clients, seconds, killed)}
            await stack.idle()
            found["left_in_the_queue"] = (await stack.status())["active_requests"]
            log(f"{found}")
    return found


if __name__ == "__main__":
    sys.exit(part_main("fifty_workers", BUDGET_S, measure, __doc__ or ""))
