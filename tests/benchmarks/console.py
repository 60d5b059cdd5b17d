"""What a viewer of the page costs an api, and what changes cost the page, with thousands of requests known.

    python tests/benchmarks/console.py

The api's share of a core is measured while nobody watches, and while the overview or the requests are open: each while
nothing changes, and while RATE requests a second end. Needs Debian's chromium.
"""

import asyncio
import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import cpu_s, log, part_main
from benchmarks.systems import nats_server
from support.browser import Windows, busy_s
from support.page import past, remember
from support.stack import Stack, running

BUDGET_S = 180
RATE = 20.0
VIEWS = ("overview", "requests")


async def change(stack: Stack, numbers: Iterator[int], seconds: float, rate: float) -> int:
    """Let `rate` requests a second end; how many did."""
    began, ended = time.monotonic(), 0
    while (passed := time.monotonic() - began) < seconds:
        if ended < passed * rate:
            newest = past(0, id=f"00000000-0000-4000-8000-{next(numbers):012x}")
            await stack.states.write(newest, 0)
            ended += 1
        else:
            await asyncio.sleep(0.005)
    return ended


async def shares(stack: Stack, numbers: Iterator[int], seconds: float) -> tuple[dict[str, float], int]:
    """The api's percent of a core while nothing changes and while requests end, and how many ended."""
    api, found, changes = psutil.Process(stack.apis[0].pid), dict[str, float](), 0
    for name, rate in (("quiet", 0), ("changing", RATE)):
        before = cpu_s([api])
        changes = await change(stack, numbers, seconds, rate)
        found[name] = round(100 * (cpu_s([api]) - before) / seconds, 2)
    return found, changes


async def measure(quick: bool) -> dict[str, Any]:
    """All of it."""
    known, seconds = (500, 3.0) if quick else (5_000, 15.0)
    chromium = shutil.which("chromium")
    assert chromium, "there is no chromium here: apt-get install chromium"
    numbers = itertools.count(100)
    with nats_server() as nats, tempfile.TemporaryDirectory() as folder:
        async with running(nats) as stack:
            await remember(stack, (past(next(numbers)) for _ in range(known)))
            unwatched, _ = await shares(stack, numbers, seconds)
            found: dict[str, Any] = {"requests": known, "rate": RATE, "nobody": unwatched}
            log(f"nobody: {unwatched}")
            for view in VIEWS:
                async with Windows(chromium, Path(folder) / view).open(stack) as window:
                    await window.to(view)
                    await window.live()
                    session = await window.page.context.new_cdp_session(window.page)
                    await session.send("Performance.enable")
                    before = await busy_s(session)
                    watched, changes = await shares(stack, numbers, seconds)
                    worked_s = await busy_s(session) - before
                viewer = {name: round(watched[name] - unwatched[name], 2) for name in watched}
                found[view] = {"viewer": viewer, "page_ms_a_change": round(1000 * worked_s / changes, 2)}
                log(f"{view}: {found[view]}")
    return found


if __name__ == "__main__":
    sys.exit(part_main("console", BUDGET_S, measure, __doc__ or ""))
