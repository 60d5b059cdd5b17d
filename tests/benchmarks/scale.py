"""More of everything: workers 1 to 8, streams open 1 to 2,000, api processes 1 to 3; the simulated engine.

    python tests/benchmarks/scale.py [--quick]

Workers have 16 slots and take 100 ms for an answer, at most 160 answers a second each: something that more of them can
do, up to where the processors are full.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import systems
from benchmarks.common import drive, log, memory_mb, part_main

BUDGET_S = 150
SLOTS = 16


def memory(ours: systems.System) -> dict[str, float]:
    """Resident MB, processes of one kind and their children together."""
    return {
        name: round(sum(memory_mb(p.pid)["rss"] for one in them for p in (one, *one.children(recursive=True))), 1)
        for name, them in ours.processes.items()
    }


async def measure(quick: bool) -> dict[str, Any]:
    """The three curves."""
    seconds = 1.5 if quick else 4
    found: dict[str, Any] = {"seconds": seconds, "workers": {}, "streams": {}, "api_processes": {}}
    for workers in (1, 2) if quick else (1, 2, 4, 8):
        limits = {"worker_slots": SLOTS, "max_concurrent_requests": SLOTS * workers, "max_queue_size": 1000}
        async with systems.forebay(workers=workers, **limits) as (ours, _, _):
            row = await drive(ours.port, 2 * SLOTS * workers, seconds, warm_up=1, tokens=5, delay_ms=20)
            found["workers"][str(workers)] = {"requests_per_s": row["requests_per_s"], "rss_mb": memory(ours)}
        log(f"{workers} workers: {found['workers'][str(workers)]}")
    many = {"max_concurrent_requests": 2000, "max_queue_size": 4000, "llm_batch_size": 2048}
    async with systems.forebay(**many) as (ours, stack, _):
        for streams in (1, 100) if quick else (1, 10, 100, 500, 1000, 2000):
            options = {"stream": True, "tokens": 20, "delay_ms": 250}
            row = await drive(ours.port, streams, max(seconds, 6), warm_up=1, **options)
            found["streams"][str(streams)] = {"tokens_per_s": row["tokens_per_s"], "rss_mb": memory(ours)}
            await stack.idle(timeout_s=30)
            log(f"{streams} streams: {found['streams'][str(streams)]}")
    for processes in (1, 2) if quick else (1, 2, 3):
        async with systems.forebay(api_processes=processes, max_concurrent_requests=64, max_queue_size=1000) as (
            ours,
            _,
            _,
        ):
            row = await drive(ours.port, 64, seconds, warm_up=1)
            found["api_processes"][str(processes)] = {
                "requests_per_s": row["requests_per_s"],
                "rss_mb": memory(ours),
            }
        log(f"{processes} api processes: {found['api_processes'][str(processes)]}")
    return found


if __name__ == "__main__":
    sys.exit(part_main("scale", BUDGET_S, measure, __doc__ or ""))
