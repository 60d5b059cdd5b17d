"""What it costs to be seen: the same load with all of observability on and with none of it, in turns.

    python tests/benchmarks/observability.py [--blocks 10] [--pairs 40] [--clients 16] [--sampled 0.01] [--silent]

Two systems stand beside each other, each with a nats-server and a load of its own, and one of them runs at a time: the
other is stopped, the load too, in the middle of whatever it does. So what a system leaves for later is done in its own
time, and turns can be short, TURN_S. They have to be: what else the machine does changes its speed by a tenth from one
second to the next, and by a third within minutes, which only turns much shorter than that share fairly. A block is one
such pair of systems; the next has new ones, since two equal systems may differ by a few percent for as long as they
live. `--parts` without any shows how equal they are.

"On" is metrics, scraped from both services every SCRAPE_S of its own time (deploy/observability: 15), a JSON log line
for each step of a request, and traces sent to a collector, the part `--sampled` of them. "Off" is METRICS=false, no
traces, and log lines in text, as they come; with `--silent` it has none below warnings (LOG_LEVEL=WARNING).

A ratio is of one block: of the requests/s, and of the CPU time that api and worker together use for a request.
"""

import argparse
import asyncio
import contextlib
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import RESULTS, START_TIMEOUT_S, free_port, log, spread, write_part
from benchmarks.driver import tally
from support.nats import NatsServer
from support.stack import Api, Service, Stack, running

HERE = Path(__file__).parent
BUDGET_S = 300
TURN_S = 0.2
WARM_UP_PAIRS = 8
SCRAPE_S = 5.0
PARTS = ("metrics", "logs", "traces")
LIMITS = {"max_concurrent_requests": 64, "max_queue_size": 1000}
SILENT = re.compile("")
"""Any first line will do; none comes."""

FOREVER_S = 3600
"""What the driver is told: it is ended with its block."""


class Collector(BaseHTTPRequestHandler):
    """Takes what OTLP exporters send and looks at none of it."""

    def do_POST(self) -> None:
        """Take it."""
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """No line."""


@contextlib.contextmanager
def collector() -> Iterator[str]:
    """Where one listens."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class System:
    """A stack under load that runs only in its turns."""

    stack: Stack
    command: tuple[str, ...]
    """What loads it."""
    answers: memoryview
    """Whole ones, and others, that its load has had."""
    services: tuple[int, ...]
    """All other processes of it."""
    metrics: tuple[str, ...]
    """What is scraped."""
    requests: int = 0
    seconds: float = 0
    scraped_at: float = 0
    scraping: asyncio.Task[None] | None = None
    driver: asyncio.subprocess.Process | None = None

    async def begin(self) -> None:
        """Load it until it has answered something, then stop it."""
        self.driver = await asyncio.create_subprocess_exec(*self.command)
        async with asyncio.timeout(30):
            while not self.answers[0]:  # noqa: ASYNC110 -- written by another process
                await asyncio.sleep(0.01)
        self.send(signal.SIGSTOP)

    async def end(self) -> None:
        """End its load; it may run again."""
        if self.driver is None:
            return
        self.send(signal.SIGCONT)
        self.driver.kill()
        await self.driver.wait()
        if self.scraping is not None:
            await self.scraping

    async def turn(self) -> None:
        """Run for TURN_S; another system's work is no part of it."""
        if self.metrics and self.seconds >= self.scraped_at:
            self.scraped_at += SCRAPE_S
            self.scraping = asyncio.create_task(self._scrape())
        before, began = self.answers[0], time.perf_counter()
        self.send(signal.SIGCONT)
        await asyncio.sleep(TURN_S)
        self.send(signal.SIGSTOP)
        self.seconds += time.perf_counter() - began
        self.requests += self.answers[0] - before
        if self.answers[1]:
            raise RuntimeError(f"{self.answers[1]} answers were not 200 or not whole")

    def send(self, number: signal.Signals) -> None:
        """A signal to all of it."""
        assert self.driver is not None
        for pid in (self.driver.pid, *self.services):
            os.kill(pid, number)

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds of api and worker so far."""
        services = {"api": self.stack.apis[0], "worker": self.stack.workers[0]}
        return {name: sum(psutil.Process(one.process.pid).cpu_times()[:2]) for name, one in services.items()}

    async def _scrape(self) -> None:
        for url in self.metrics:
            (await self.stack.http.get(url)).raise_for_status()


async def start(stack: Stack) -> None:
    """An api and a worker that say nothing: they are asked until they serve."""
    api = Api("forebay_api", SILENT, stack.env(api_port=(port := free_port())))
    worker = Service("forebay_inference", SILENT, stack.env())
    api.port = port
    stack.apis.append(api)
    stack.workers.append(worker)
    await asyncio.gather(api.launch(), worker.launch())
    async with asyncio.timeout(START_TIMEOUT_S):
        while not await serves(stack):  # noqa: ASYNC110 -- no event says so
            await asyncio.sleep(0.05)


async def serves(stack: Stack) -> bool:
    """Whether the api answers and knows a worker that is ready."""
    try:
        answer = await stack.http.get(f"{stack.apis[0].url}/health/ready")
    except httpx.TransportError:
        return False
    return any(worker["status"] == "ready" for worker in answer.json()["workers"])


@contextlib.asynccontextmanager
async def loaded(clients: int, settings: dict[str, Any]) -> AsyncIterator[System]:
    """A system under the load of so many clients."""
    with tempfile.TemporaryDirectory(prefix="forebay-bench-") as folder:
        nats, counts = NatsServer(Path(folder) / "nats"), Path(folder) / "tally"
        counts.write_bytes(bytes(16))
        nats.start()
        try:
            silent = settings.get("log_level") == "WARNING"
            services = {"apis": 0, "workers": 0} if silent else {}
            async with running(nats, **services, **LIMITS, **settings) as stack:
                if silent:
                    await start(stack)
                metrics: tuple[str, ...] = ()
                if settings["metrics"] == "true":
                    # Looked for before there are many lines.
                    port = (await stack.workers[0].logged(r"metrics on \S+:(\d+)"))[1]
                    metrics = (f"{stack.apis[0].url}/metrics", f"http://127.0.0.1:{port}/metrics")
                driver = (sys.executable, str(HERE / "driver.py"), str(stack.apis[0].port), str(clients))
                pids = (stack.apis[0].process.pid, stack.workers[0].process.pid, nats.pid)
                command = (*driver, str(FOREVER_S), "--tally", str(counts))
                system = System(stack, command, tally(counts), pids, metrics)
                try:
                    yield system
                finally:
                    await system.end()
        finally:
            nats.stop()


async def block(number: int, pairs: int, clients: int, on: dict[str, Any], off: dict[str, Any]) -> dict[str, Any]:
    """What one pair of systems did. Which is made first, and has the first turn, changes from block to block."""
    order = [("on", on), ("off", off)][:: 1 if number % 2 else -1]
    async with contextlib.AsyncExitStack() as entered:
        systems = {name: await entered.enter_async_context(loaded(clients, settings)) for name, settings in order}
        for system in systems.values():
            await system.begin()
        for _ in range(WARM_UP_PAIRS):
            for system in systems.values():
                await system.turn()
        cpu = {name: system.cpu_s() for name, system in systems.items()}
        for system in systems.values():
            system.requests, system.seconds, system.scraped_at = 0, 0, 0
        for _ in range(pairs):
            for system in systems.values():
                await system.turn()
        found: dict[str, Any] = {}
        for name, system in systems.items():
            used = {
                process: 1000 * (after - cpu[name][process]) / system.requests
                for process, after in system.cpu_s().items()
            }
            found[name] = {
                "requests_per_s": system.requests / system.seconds,
                "cpu_ms_by_process": used,
                "cpu_ms": sum(used.values()),
            }
    return found


async def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All blocks."""
    off = {"metrics": "false"} | ({"log_level": "WARNING"} if options.silent else {})
    found = []
    with collector() as endpoint:
        on: dict[str, Any] = {"metrics": "false"}
        if "metrics" in options.parts:
            on |= {"metrics": "true", "metrics_port": 0}
        if "logs" in options.parts:
            on["log_format"] = "json"
        if "traces" in options.parts:
            on |= {
                "otel_exporter_otlp_endpoint": endpoint,
                "otel_traces_sampler": "parentbased_traceidratio",
                "otel_traces_sampler_arg": options.sampled,
            }
        for number in range(options.blocks):
            figures = await block(number, options.pairs, options.clients, on, off)
            figures["ratio"] = figures["on"]["requests_per_s"] / figures["off"]["requests_per_s"]
            figures["cpu_ratio"] = figures["on"]["cpu_ms"] / figures["off"]["cpu_ms"]
            log(
                f"block {number + 1}: on {figures['on']['requests_per_s']:.0f}, "
                f"off {figures['off']['requests_per_s']:.0f} requests/s, ratio {figures['ratio']:.3f}; "
                f"CPU on {figures['on']['cpu_ms']:.3f}, off {figures['off']['cpu_ms']:.3f} ms a request"
            )
            found.append(figures)
    return found


def summary(found: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """The figures of all blocks."""
    return {
        "on": [*options.parts],
        "silent": options.silent,
        "sampled": options.sampled,
        "clients": options.clients,
        "blocks": options.blocks,
        "pairs": options.pairs,
        "turn_s": TURN_S,
        "scrape_s": SCRAPE_S,
        "requests": spread([figures["ratio"] for figures in found]),
        "cpu": spread([figures["cpu_ratio"] for figures in found]),
        "requests_per_s": {
            name: spread([figures[name]["requests_per_s"] for figures in found], 0) for name in ("on", "off")
        },
        "cpu_ms": {
            process: {
                name: round(statistics.median(figures[name]["cpu_ms_by_process"][process] for figures in found), 4)
                for name in ("on", "off")
            }
            for process in ("api", "worker")
        },
    }


def main() -> int:
    """Measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=40, help="turns of each system in a block")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--sampled", type=float, default=0.01, help="part of the requests that is traced")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="what is on")
    parser.add_argument("--silent", action="store_true", help="off has no log lines: what they cost at all")
    parser.add_argument("--quick", action="store_true", help="one short block")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of observability.json")
    options = parser.parse_args()
    if options.quick:
        options.blocks, options.pairs = 1, 10
    return write_part(
        "observability-silent" if options.silent else "observability",
        BUDGET_S,
        options.quick,
        options.results,
        lambda: summary(asyncio.run(measure(options)), options),
    )


if __name__ == "__main__":
    sys.exit(main())
