"""Large request bodies: requests/s, p99 and the longest pause of the event loops, by the size of the body.

    python tests/benchmarks/bodies.py [--quick]

The bodies are conversations of messages of 2 KB, such as an agent sends again with each turn; the last message is the
order to the engine, so the simulated engine reads 12 bytes of them (of one message of 400 KB its tokenizer would take
40 ms). Each system has its turn in each round; the peers are stopped meanwhile, and Forebay is idle.

In turns of their own, the health of api and worker is asked every PROBE_S. Their event loops answer, so no pause of
them was longer than the longest wait for an answer.
"""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import systems
from benchmarks.common import Unavailable, drive, log, part_main, ratios, spread
from benchmarks.systems import System
from support.stack import Stack

BUDGET_S = 180
SIZES_KB = (4, 40, 400, 800)
CLIENTS = 16
PROBE_S = 0.01
PEERS = ("bare HTTP", "LiteLLM")
LIMITS = {"max_concurrent_requests": 64, "max_queue_size": 1000, "metrics_port": 0}

Figures = dict[str, Any]


@contextlib.asynccontextmanager
async def probed(stack: Stack, waits_ms: Figures) -> AsyncIterator[None]:
    """For a block: `waits_ms` gets the longest wait for the health of each service."""

    async def probe(name: str, url: str) -> None:
        while True:
            began = time.perf_counter()
            (await stack.http.get(url)).raise_for_status()
            waits_ms[name] = max(waits_ms.get(name, 0.0), 1000 * (time.perf_counter() - began))
            await asyncio.sleep(PROBE_S)

    urls = {"api": stack.apis[0].url, "worker": stack.workers[0].url}
    probes = [asyncio.create_task(probe(name, f"{url}/health/live")) for name, url in urls.items()]
    try:
        yield
    finally:
        for one in probes:
            one.cancel()
        await asyncio.gather(*probes, return_exceptions=True)


async def turn(system: System, size_kb: int, seconds: float) -> Figures:
    """One system's turn with bodies of one size."""
    system.go_on()
    before = system.cpu()
    figures = await drive(system.port, CLIENTS, seconds, warm_up=0.5, kb=size_kb)
    if figures["not_200"]:
        raise RuntimeError(f"{system.name}: {figures['not_200']} answers were not 200")
    figures["cpu_ms"] = {
        name: 1000 * (after - before[name]) / figures["requests"] for name, after in system.cpu().items()
    }
    system.hold()
    return figures


def summary(turns: dict[str, list[Figures]]) -> Figures:
    """Spreads of each system, and the ratios of Forebay to each."""
    found: Figures = {}
    for name, rows in turns.items():
        entry: Figures = {
            field: spread([row[field] for row in rows]) for field in ("requests_per_s", "p50_ms", "p99_ms")
        }
        for field in ("cpu_ms", "pause_ms"):
            if field in rows[0]:
                entry[field] = {one: spread([row[field][one] for row in rows], 2) for one in rows[0][field]}
        if name != "forebay":
            entry["forebay_to_this"] = ratios(
                [row["requests_per_s"] for row in turns["forebay"]], [row["requests_per_s"] for row in rows]
            )
        found[name] = entry
    return found


async def measure(quick: bool) -> Figures:
    """All sizes, all systems."""
    rounds, seconds = (1, 1) if quick else (5, 1.2)
    found: Figures = {"rounds": rounds, "clients": CLIENTS, "sizes_kb": {}, "missing": {}}
    async with systems.forebay(log_level="INFO", **LIMITS) as (ours, stack, _):
        await turn(ours, 4, 1)
        with contextlib.ExitStack() as others:
            there = {"forebay": ours}
            for name in PEERS:
                try:
                    there[name] = others.enter_context(systems.ALL[name]())
                    await turn(there[name], 4, 2)
                except (Unavailable, RuntimeError) as exc:
                    found["missing"][name] = str(exc)
                    log(f"without {name}: {exc}")
                    there.pop(name, None)
            for size_kb in SIZES_KB:
                turns: dict[str, list[Figures]] = {name: [] for name in there}
                for number in range(rounds):
                    for name in [*there][:: 1 if number % 2 else -1]:
                        turns[name].append(await turn(there[name], size_kb, seconds))
                        if name == "forebay":
                            await stack.idle()
                # Apart from the turns above: to ask takes a part of the cores.
                for row in turns["forebay"]:
                    row["pause_ms"] = {}
                    async with probed(stack, row["pause_ms"]):
                        await turn(ours, size_kb, seconds)
                    await stack.idle()
                found["sizes_kb"][str(size_kb)] = entry = summary(turns)
                shown = {name: round(one["requests_per_s"]["median"]) for name, one in entry.items()}
                pauses = {name: round(ms["median"]) for name, ms in entry["forebay"]["pause_ms"].items()}
                log(f"{size_kb} KB, requests/s: {shown}; pauses in ms: {pauses}")
    return found


if __name__ == "__main__":
    sys.exit(part_main("bodies", BUDGET_S, measure, __doc__ or ""))
