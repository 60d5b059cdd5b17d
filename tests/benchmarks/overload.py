"""More load than there is capacity: goodput, latency of what was accepted, time to refuse.

    python tests/benchmarks/overload.py [--quick]

The simulated engine takes 100 ms for an answer in each of 8 slots: 80 a second at most, far below what the processors
could relay. Requests arrive by a Poisson process at multiples of that, whatever becomes of the earlier ones.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import systems
from benchmarks.common import drive, log, part_main, spread

BUDGET_S = 150
SLOTS, WAITING, TOKENS, DELAY_MS = 8, 16, 5, 20
CAPACITY = SLOTS * 1000 / (TOKENS * DELAY_MS)
LOADS = (0.5, 1, 1.5, 2, 3, 4)


async def measure(quick: bool) -> dict[str, Any]:
    """All loads, in rounds."""
    rounds, seconds = (1, 2) if quick else (3, 5)
    rows: dict[float, list[dict[str, Any]]] = {load: [] for load in LOADS}
    async with systems.forebay(max_concurrent_requests=SLOTS, max_queue_size=SLOTS + WAITING) as (ours, stack, _):
        await drive(ours.port, SLOTS, 1, tokens=TOKENS, delay_ms=DELAY_MS)
        for number in range(rounds):
            for load in LOADS:
                options = {"tokens": TOKENS, "delay_ms": DELAY_MS, "rate": load * CAPACITY, "seed": number + 1}
                rows[load].append(await drive(ours.port, 400, seconds, warm_up=1, **options))
                await stack.idle()
                log(f"{load} times: goodput {rows[load][-1]['requests_per_s']} of {CAPACITY:.0f}/s")
    loads: dict[str, Any] = {}
    for load, figures in rows.items():
        loads[str(load)] = {
            "offered_per_s": load * CAPACITY,
            "goodput_per_s": spread([row["requests_per_s"] for row in figures]),
            "accepted_p50_ms": spread([row["p50_ms"] for row in figures]),
            "accepted_p99_ms": spread([row["p99_ms"] for row in figures]),
            "statuses": [row["statuses"] for row in figures],
        }
        refused = [row["refused_ms"] for row in figures if row["refused_ms"]]
        if refused:
            loads[str(load)]["refused_p50_ms"] = spread([row["p50"] for row in refused])
            loads[str(load)]["refused_p99_ms"] = spread([row["p99"] for row in refused])
    peak = max(one["goodput_per_s"]["median"] for one in loads.values())
    return {
        "capacity_per_s": CAPACITY,
        "rounds": rounds,
        "loads": loads,
        "goodput_at_4_to_peak": round(loads["4"]["goodput_per_s"]["median"] / peak, 3),
    }


if __name__ == "__main__":
    sys.exit(part_main("overload", BUDGET_S, measure, __doc__ or ""))
