"""What the queue costs, with an engine that costs nothing: Forebay beside the floor of NATS and beside its peers.

    python tests/benchmarks/overhead.py [--quick]

HTTP → JetStream → worker → reply → states, streamed (20 tokens) and not (5 tokens). In each round every system has its
turn with the same load, in an order that changes; who has no turn is stopped, or not there yet, and ratios are of the
same round. What is not streamed is loaded by wrk, streams by `driver.py`; `ceiling.py` shows what both could do.
"""

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import ceiling, systems
from benchmarks.common import HERE, Unavailable, cpu_s, drive, log, part_main, ratios, run_json, spread, wrk
from benchmarks.systems import System
from support.nats import NatsServer
from support.stack import Stack

BUDGET_S = 540
FULL = (1, 16, 64, 256)
WHO: dict[str, dict[str, tuple[int, ...]]] = {
    "whole": {
        "forebay": FULL,
        "floor": FULL,
        "bare HTTP": FULL,
        "core NATS": FULL,
        "LiteLLM": (1, 16, 64),
        "taskiq, NATS": (1, 64),
        "taskiq, Redis": (1, 64),
        "Celery, Redis": (1, 64),
    },
    "streamed": {"forebay": FULL, "bare HTTP": FULL, "core NATS": FULL, "LiteLLM": (1, 16, 64)},
}
"""With how many clients each is measured. Some have so few answers a second that 256 clients would wait longer than a
turn lasts."""
COMPANIES = (("bare HTTP", "core NATS", "LiteLLM"), ("taskiq, NATS", "taskiq, Redis", "Celery, Redis"))
"""Who is there at the same time. Those of the second cannot be stopped while others have their turn."""
TURN_S = 1
TOKENS = {"whole": 5, "streamed": 20}
SLOW_S = 5
"""A turn of one that has some fifty answers a second, where many wait for it."""
DRAIN_S = 1.5
LIMITS = {"max_concurrent_requests": 64, "max_queue_size": 1000}


async def turn(system: System, mode: str, clients: int, seconds: float) -> dict[str, Any]:
    """One system's turn with one load."""
    system.go_on()
    before = system.cpu()
    if mode == "whole":
        figures = await wrk(system.port, clients, max(1, round(seconds)), TOKENS[mode])
    else:
        figures = await drive(system.port, clients, seconds, warm_up=0.3, stream=True, tokens=TOKENS[mode])
    if figures["not_200"]:
        raise RuntimeError(f"{system.name}: {figures['not_200']} answers were not 200")
    # What it has still to do for clients that left is done before it is stopped.
    await asyncio.sleep(min(figures["p99_ms"] / 1000, DRAIN_S))
    figures["cpu_s_per_1000"] = {
        name: 1000 * (after - before[name]) / figures["requests"] for name, after in system.cpu().items()
    }
    system.hold()
    return figures


async def floor(url: str, nats: psutil.Process, clients: int, seconds: float) -> dict[str, Any]:
    """The turn of the floor, on the server of Forebay."""
    before = cpu_s([nats])
    figures = await run_json(sys.executable, str(HERE / "floor.py"), url, str(clients), str(seconds))
    figures["cpu_s_per_1000"] = {
        "both ends": 1000 * figures.pop("client_cpu_s") / figures["requests"],
        "nats-server": 1000 * (cpu_s([nats]) - before) / figures["requests"],
    }
    return figures


def summary(turns: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Spreads of each system, and the ratios of Forebay to each."""
    found: dict[str, Any] = {}
    ours = turns["forebay"]
    for name, rows in turns.items():
        fields = ("requests_per_s", "p50_ms", "p95_ms", "p99_ms")
        entry: dict[str, Any] = {field: spread([row[field] for row in rows]) for field in fields}
        if "first_token_ms" in rows[0]:
            entry["first_token_p99_ms"] = spread([row["first_token_ms"]["p99"] for row in rows])
            entry["first_token_p50_ms"] = spread([row["first_token_ms"]["p50"] for row in rows])
        entry["cpu_s_per_1000"] = {
            process: spread([row["cpu_s_per_1000"][process] for row in rows]) for process in rows[0]["cpu_s_per_1000"]
        }
        if name != "forebay":
            entry["forebay_to_this"] = {
                field: ratios([row[field] for row in ours], [row[field] for row in rows])
                for field in ("requests_per_s", "p50_ms")
            }
        found[name] = entry
    return found


async def measure(quick: bool) -> dict[str, Any]:
    """All systems, all loads."""
    rounds = 1 if quick else 5
    found: dict[str, Any] = {"rounds": rounds, "seconds": TURN_S, "missing": {}}
    found |= {mode: {str(clients): {} for clients in FULL} for mode in WHO}
    found["ceiling"] = await ceiling.measure(1 if quick else 2)
    async with systems.forebay(log_level="INFO", **LIMITS) as (ours, running, nats):
        await turn(ours, "whole", 16, 1)
        for company in COMPANIES:
            with contextlib.ExitStack() as stack:
                there: dict[str, System] = {"forebay": ours}
                for name in company:
                    try:
                        there[name] = stack.enter_context(systems.ALL[name]())
                        await turn(there[name], "whole", 16, SLOW_S if name == "LiteLLM" else TURN_S)
                    except (Unavailable, RuntimeError) as exc:
                        found["missing"][name] = str(exc)
                        log(f"without {name}: {exc}")
                        there.pop(name, None)
                await _rounds(there, running, nats, rounds, found)
    return found


async def _rounds(
    there: dict[str, System], running: Stack, nats: NatsServer, rounds: int, found: dict[str, Any]
) -> None:
    """All loads of those that are there and have not been measured before; the floor where nobody else can run."""
    nats_process = psutil.Process(nats.pid)
    for mode, who in WHO.items():
        for clients in FULL:
            names = [name for name, loads in who.items() if clients in loads and name in there]
            if names == ["forebay"]:
                continue
            into = found[mode][str(clients)]
            if "floor" in who and not into:
                names.append("floor")
            turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
            for number in range(rounds):
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    if name not in turns:
                        continue
                    seconds = SLOW_S if name == "LiteLLM" and clients >= 64 else TURN_S
                    if name == "floor":
                        turns[name].append(await floor(nats.url, nats_process, clients, seconds))
                        continue
                    try:
                        turns[name].append(await turn(there[name], mode, clients, seconds))
                    except RuntimeError as exc:
                        if name == "forebay":
                            raise
                        found["missing"][name] = f"{mode}, {clients} clients: {exc}"
                        log(f"from here on without {name}: {exc}")
                        del turns[name], there[name]
                    if name == "forebay":
                        await running.idle()
            # Forebay's own figures are those with nobody beside it.
            into |= summary(turns) | into
            shown = {name: round(one["requests_per_s"]["median"]) for name, one in into.items()}
            log(f"{mode}, {clients} clients, requests/s: {shown}")


if __name__ == "__main__":
    sys.exit(part_main("overhead", BUDGET_S, measure, __doc__ or ""))
