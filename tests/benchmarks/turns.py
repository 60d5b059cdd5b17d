"""Systems that run in turns: each has its own nats-server, api, worker and load, and all of it is stopped in between.

A stopped system keeps its work for its own next turn, so turns can be as short as TURN_S. They must be short: other
work on the machine changes its speed by a tenth within a second and by a third within minutes.
"""

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import HERE
from benchmarks.driver import tally
from benchmarks.systems import nats_server
from support.stack import Stack, running

TURN_S = 0.2
WARM_UP_TURNS = 8
SCRAPE_S = 5.0
"""Time between two scrapes, of the system's own time."""

LIMITS = {"max_concurrent_requests": 64, "max_queue_size": 1000}
_FOREVER_S = 3600
"""How long the driver is told to run: it is killed at the end of its load."""


@dataclass
class System:
    """A running Forebay. `requests` and `seconds` are those of its turns since `reset`."""

    stack: Stack
    services: tuple[int, ...]
    metrics: tuple[str, ...]
    """What is scraped during a load."""
    requests: int = 0
    seconds: float = 0
    _cpu_before: dict[str, float] = field(default_factory=dict)
    _scrape_at: float = 0
    _scraping: asyncio.Task[None] | None = None
    _driver: asyncio.subprocess.Process | None = None
    _answers: memoryview = field(default_factory=lambda: tally(None))
    """Whole answers and other answers so far."""

    @contextlib.asynccontextmanager
    async def load(self, clients: int, *options: str) -> AsyncIterator[None]:
        """Start a load and stop the system; `options` are those of driver.py. At the end, the system runs again."""
        with tempfile.NamedTemporaryFile(prefix="forebay-bench-") as counts:
            counts.write(bytes(16))
            counts.flush()
            self._answers = tally(Path(counts.name))
            target = (str(self.stack.apis[0].port), str(clients), str(_FOREVER_S))
            command = (sys.executable, str(HERE / "driver.py"), *target, "--tally", counts.name, *options)
            self._driver = await asyncio.create_subprocess_exec(*command)
            try:
                async with asyncio.timeout(30):
                    while not self._answers[0]:  # noqa: ASYNC110 -- another process writes it
                        await asyncio.sleep(0.01)
                self._send(signal.SIGSTOP)
                yield
            finally:
                self._send(signal.SIGCONT)
                self._driver.kill()
                await self._driver.wait()
                if self._scraping is not None:
                    await self._scraping
        await self.stack.idle()

    async def turn(self) -> None:
        """Run for TURN_S."""
        if self.metrics and self.seconds >= self._scrape_at:
            self._scrape_at += SCRAPE_S
            self._scraping = asyncio.create_task(self._scrape())
        before, began = self._answers[0], time.perf_counter()
        self._send(signal.SIGCONT)
        await asyncio.sleep(TURN_S)
        self._send(signal.SIGSTOP)
        self.seconds += time.perf_counter() - began
        self.requests += self._answers[0] - before
        if self._answers[1]:
            raise RuntimeError(f"{self._answers[1]} answers were not 200 or not whole")

    def reset(self) -> None:
        """Count from here."""
        self.requests, self.seconds, self._scrape_at = 0, 0, 0
        self._cpu_before = self._cpu_s()

    def requests_per_s(self) -> float:
        """Requests a second of its own time."""
        return self.requests / self.seconds

    def cpu_ms(self) -> dict[str, float]:
        """CPU time of a request in ms, by service."""
        return {name: 1000 * (s - self._cpu_before[name]) / self.requests for name, s in self._cpu_s().items()}

    def _cpu_s(self) -> dict[str, float]:
        services = {"api": self.stack.apis[0], "worker": self.stack.workers[0]}
        return {name: sum(psutil.Process(one.pid).cpu_times()[:2]) for name, one in services.items()}

    def _send(self, number: signal.Signals) -> None:
        assert self._driver is not None
        for pid in (self._driver.pid, *self.services):
            os.kill(pid, number)

    async def _scrape(self) -> None:
        for url in self.metrics:
            (await self.stack.http.get(url)).raise_for_status()


@contextlib.asynccontextmanager
async def started(**settings: Any) -> AsyncIterator[System]:
    """A nats-server, an api and a worker with the simulated engine; with `metrics="true"` both are scraped."""
    measured = settings.get("metrics") == "true"
    if measured:
        settings["metrics_port"] = 0
    with nats_server() as nats:
        async with running(nats, **LIMITS | settings) as stack:
            api, worker = stack.apis[0], stack.workers[0]
            metrics = (f"{api.url}/metrics", f"{worker.url}/metrics") if measured else ()
            yield System(stack, (api.pid, worker.pid, nats.pid), metrics)


async def pairs(systems: Sequence[System], count: int) -> None:
    """So many turns of each system, after turns that warm them up."""
    for _ in range(WARM_UP_TURNS):
        for system in systems:
            await system.turn()
    for system in systems:
        system.reset()
    for _ in range(count):
        for system in systems:
            await system.turn()


def orders(names: Sequence[str], blocks: int) -> Iterator[tuple[int, list[str]]]:
    """The number of each block and the order of its systems: which is first changes from block to block."""
    for number in range(1, blocks + 1):
        yield number, [*names][:: 1 if number % 2 else -1]
