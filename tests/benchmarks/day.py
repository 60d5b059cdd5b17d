"""One day of two teams on one simulated model: office hours of one, and a nightly batch of the other that takes longer
than the night. Who waits how long with service tiers, and without.

    python tests/benchmarks/day.py [--quick]

An hour of the day takes HOUR_S, and the engine's steps are as much shorter. The same day is run three times:

- `tiers`: the batch goes to `/v1/batches`, so its requests are flex.
- `at_once`: a script sends all requests of the batch at once, without a tier.
- `few`: the script has no more than FEW requests unfinished.

It writes docs/images/classes-day.svg too.
"""

import argparse
import asyncio
import json
import math
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import MODEL, RESULTS, ROOT, log, write_part
from benchmarks.systems import nats_server
from support.stack import Stack, running

BUDGET_S = 170
HOUR_S = 1.7
SLOTS = 4
STEP_MIN = 0.5
"""Minutes of the day for a token."""
OFFICE_TOKENS = 4
BATCH_TOKENS = 8
BATCH_SIZE = 900
BATCH_AT_H = 1.0
FEW = 8
BUSIEST = 90
"""Requests an hour of the office."""
OFFICE = {8: 0.3, 9: 0.8, 10: 1.0, 11: 1.0, 12: 0.5, 13: 0.7, 14: 1.0, 15: 1.0, 16: 0.8, 17: 0.4}
"""Of that, the part in each hour; in all others NIGHT."""
NIGHT = 0.03
LABELS = {
    "at_once": "without tiers, batch sent at once",
    "few": f"without tiers, {FEW} of the batch at a time",
    "tiers": "with tiers",
}


def arrivals(hours: float) -> list[float]:
    """When the office asks, in hours; the same on each day."""
    chance, at, found = random.Random(16), 0.0, []
    while (at := at + chance.expovariate(BUSIEST)) < hours:
        if chance.random() < OFFICE.get(int(at), NIGHT):
            found.append(at)
    return found


class Day:
    """One run of the day: what the office waited for its first tokens, and how far the batch was."""

    def __init__(self, stack: Stack, hours: float, size: int) -> None:
        self._stack = stack
        self._hours = hours
        self._size = size
        self._began = 0.0
        self.waits: list[tuple[float, float]] = []
        """Hour of the day, minutes."""
        self.done: list[tuple[float, int]] = []
        """Hour of the day, requests of the batch."""

    async def run(self, batch: str) -> None:
        """The office, and the batch as `tiers`, `at_once` or `few`."""
        self._began = time.perf_counter()
        work = self._batch() if batch == "tiers" else self._script(FEW if batch == "few" else self._size)
        await asyncio.gather(work, *(self._office(at) for at in arrivals(self._hours)))

    async def _office(self, at: float) -> None:
        await self._until(at)
        async for _ in self._tokens(OFFICE_TOKENS):
            self.waits.append((at, (self._now() - at) * 60))
            return

    async def _script(self, most: int) -> None:
        await self._until(BATCH_AT_H)
        free = asyncio.Semaphore(most)

        async def one() -> None:
            async with free:
                async for _ in self._tokens(BATCH_TOKENS):
                    pass
            self._count(1 + (self.done[-1][1] if self.done else 0))

        await asyncio.gather(*(one() for _ in range(self._size)))

    async def _batch(self) -> None:
        await self._until(BATCH_AT_H)
        client = self._stack.openai()
        body = {"model": MODEL, "messages": [{"role": "user", "content": orders(BATCH_TOKENS)}]}
        line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
        data = "".join(json.dumps({"custom_id": str(number)} | line) + "\n" for number in range(self._size))
        file = await client.files.create(file=("night.jsonl", data.encode()), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        while batch.status not in ("completed", "failed", "expired", "cancelled"):
            await asyncio.sleep(HOUR_S / 10)
            batch = await client.batches.retrieve(batch.id)
            self._count(batch.request_counts.completed if batch.request_counts else 0)
        assert self.done[-1][1] == self._size, batch

    async def _tokens(self, count: int) -> AsyncIterator[str]:
        body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": orders(count)}]}
        async with self._stack.http.stream(
            "POST", f"{self._stack.apis[0].url}/v1/chat/completions", json=body
        ) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                if '"content":"' in line.replace(" ", "") and '"content":""' not in line.replace(" ", ""):
                    yield line

    def _count(self, done: int) -> None:
        self.done.append((self._now(), done))

    def _now(self) -> float:
        return (time.perf_counter() - self._began) / HOUR_S

    async def _until(self, hour: float) -> None:
        await asyncio.sleep((hour - self._now()) * HOUR_S)


def orders(tokens: int) -> str:
    """For the simulated engine."""
    return f"[[tokens={tokens} delay_ms={STEP_MIN / 60 * HOUR_S * 1000:.3f}]]"


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Each run of the day."""
    found: dict[str, Any] = {}
    limits = {"max_concurrent_requests": SLOTS, "max_queue_size": 5000, "llm_batch_size": 64, "request_timeout": 3600}
    for batch in LABELS:
        with nats_server() as nats:
            async with running(nats, **limits) as stack:
                day = Day(stack, options.hours, options.size)
                await day.run(batch)
        waits = sorted(minutes for _, minutes in day.waits)
        found[batch] = {
            "office_requests": len(waits),
            "wait_p50_min": round(statistics.median(waits), 2),
            "wait_p95_min": round(waits[math.ceil(0.95 * len(waits)) - 1], 2),
            "wait_max_min": round(waits[-1], 2),
            "batch_done_h": round(day.done[-1][0], 2),
            "waits": [(round(hour, 3), round(minutes, 2)) for hour, minutes in sorted(day.waits)],
            "done": [(round(hour, 2), count) for hour, count in day.done[:: max(len(day.done) // 100, 1)]]
            + [(round(day.done[-1][0], 2), day.done[-1][1])],
        }
        log(json.dumps({batch: {name: value for name, value in found[batch].items() if name.count("_")}}))
    return found


def draw(figures: dict[str, Any], path: Path) -> None:
    """The waits of the office and the progress of the batch, over the hours of the day."""
    from benchmarks.plots import pyplot

    figure, (waits, progress) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(2, 1))
    for color, (batch, label) in zip(("C3", "C1", "C0"), LABELS.items(), strict=True):
        one = figures[batch]
        waits.scatter(*zip(*one["waits"], strict=True), s=4, color=color, label=label)
        hours, counts = zip(*one["done"], strict=True)
        progress.plot(hours, [100 * count / counts[-1] for count in counts], color=color)
    waits.set(yscale="log", ylabel="office: minutes until the first token")
    waits.legend(fontsize="small")
    progress.set(ylabel="batch: done, %", xlabel="hour of the day", xlim=(0, 24), xticks=range(0, 25, 3))
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    path.write_text("\n".join(text.rstrip() for text in path.read_text().splitlines()) + "\n")
    pyplot.close(figure)


def main() -> int:
    """Measure, write the results and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=24)
    parser.add_argument("--size", type=int, default=BATCH_SIZE, help="requests of the batch")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "images" / "classes-day.svg")
    parser.add_argument("--quick", action="store_true", help="until 10 o'clock, with a batch of 100 requests")
    options = parser.parse_args()
    if options.quick:
        options.hours, options.size = 10, 100
    ended = write_part("day", BUDGET_S, options.quick, options.results, lambda: asyncio.run(measure(options)))
    draw(json.loads((options.results / "day.json").read_text())["figures"], options.plot)
    return ended


if __name__ == "__main__":
    sys.exit(main())
