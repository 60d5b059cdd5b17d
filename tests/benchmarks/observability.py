"""What it costs to be seen: the same load with all of observability on and with none of it, in turns.

    python tests/benchmarks/observability.py [--seconds 1] [--rounds 30] [--clients 16] [--sampled 0.01]

Two systems stand beside each other on one nats-server each and take short turns, so many that what else the machine
does hits both alike. Not at the same time: they would compete, and the one that is a little slower lose its share of
the cores. "On" is metrics, scraped from both services once in each turn (deploy/observability does it every fifteen
seconds), JSON log lines, and traces sent to a collector, the part `--sampled` of them; "off" is METRICS=false, no
traces, text log lines: to have log lines is no option.

A ratio is of one round: of the requests/s, and of the CPU time that api and worker together use for a request.
"""

import argparse
import asyncio
import contextlib
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import RESULTS, spread, stamp
from support.nats import NatsServer
from support.stack import Stack, running

HERE = Path(__file__).parent
BUDGET_S = 90
PARTS = ("metrics", "logs", "traces")
LIMITS = {"max_concurrent_requests": 64, "max_queue_size": 1000}


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


def cpu_s(stack: Stack) -> dict[str, float]:
    """CPU seconds of api and worker so far."""
    services = {"api": stack.apis[0], "worker": stack.workers[0]}
    return {name: sum(psutil.Process(one.process.pid).cpu_times()[:2]) for name, one in services.items()}


async def load(stack: Stack, clients: int, seconds: float) -> dict[str, Any]:
    """The driver's figures for one turn."""
    command = (str(HERE / "driver.py"), str(stack.apis[0].port), str(clients), str(seconds))
    before = cpu_s(stack)
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"the driver ended with {process.returncode}")
    await stack.idle()
    figures: dict[str, Any] = json.loads(output)
    used = {name: after - before[name] for name, after in cpu_s(stack).items()}
    figures["cpu_ms_by_process"] = {name: 1000 * one / figures["requests"] for name, one in used.items()}
    figures["cpu_ms"] = sum(figures["cpu_ms_by_process"].values())
    if figures["not_200"]:
        raise RuntimeError(f"{figures['not_200']} answers were not 200")
    return figures


@contextlib.asynccontextmanager
async def scraped(stack: Stack, port: str | None) -> AsyncIterator[None]:
    """Both services, the worker's on `port`, scraped once meanwhile."""

    async def scrape() -> None:
        for url in (f"{stack.apis[0].url}/metrics", f"http://127.0.0.1:{port}/metrics"):
            (await stack.http.get(url)).raise_for_status()

    scraping = asyncio.create_task(scrape()) if port is not None else None
    yield
    if scraping is not None:
        await scraping


async def measure(on: Stack, off: Stack, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rounds."""
    # Looked for before there are many lines.
    port = (await on.workers[0].logged(r"metrics on \S+:(\d+)"))[1] if "metrics" in options.parts else None
    for stack in (on, off):
        await load(stack, options.clients, 1)
    found = []
    for number in range(options.rounds):
        figures: dict[str, Any] = {}
        for name in ("on", "off") if number % 2 else ("off", "on"):
            if name == "on":
                async with scraped(on, port):
                    figures[name] = await load(on, options.clients, options.seconds)
            else:
                figures[name] = await load(off, options.clients, options.seconds)
        figures["ratio"] = figures["on"]["requests_per_s"] / figures["off"]["requests_per_s"]
        figures["cpu_ratio"] = figures["on"]["cpu_ms"] / figures["off"]["cpu_ms"]
        print(
            f"round {number + 1}: on {figures['on']['requests_per_s']:.0f}, "
            f"off {figures['off']['requests_per_s']:.0f} requests/s, ratio {figures['ratio']:.3f}; "
            f"CPU on {figures['on']['cpu_ms']:.2f}, off {figures['off']['cpu_ms']:.2f} ms a request",
            flush=True,
        )
        found.append(figures)
    return found


async def main() -> int:
    """Start both, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1, help="of a turn")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--sampled", type=float, default=0.01, help="part of the requests that is traced")
    parser.add_argument(
        "--parts", nargs="*", choices=PARTS, default=PARTS, help="what is on; none: how equal the two systems are"
    )
    parser.add_argument("--json", type=Path, help="also write all figures here")
    parser.add_argument("--quick", action="store_true", help="two short rounds")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of observability.json")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.rounds = 0.5, 3
    header, began = stamp(), time.monotonic()
    collector = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    Thread(target=collector.serve_forever, daemon=True).start()
    visible: dict[str, Any] = {"metrics_port": 0} if "metrics" in options.parts else {"metrics": "false"}
    if "logs" in options.parts:
        visible["log_format"] = "json"
    if "traces" in options.parts:
        visible |= {
            "otel_exporter_otlp_endpoint": f"http://127.0.0.1:{collector.server_port}",
            "otel_traces_sampler": "parentbased_traceidratio",
            "otel_traces_sampler_arg": options.sampled,
        }
    with tempfile.TemporaryDirectory() as folder:
        servers = [NatsServer(Path(folder) / name) for name in ("on", "off")]
        for server in servers:
            server.start()
        try:
            async with (
                running(servers[0], **LIMITS, **visible) as on,
                running(servers[1], **LIMITS, metrics="false") as off,
            ):
                found = await measure(on, off, options)
        finally:
            for server in servers:
                server.stop()
            collector.shutdown()
    ratios = [figures["ratio"] for figures in found]
    cpu = [figures["cpu_ratio"] for figures in found]
    machine = f"{platform.processor() or platform.machine()}, {psutil.cpu_count()} cores, {options.clients} clients"
    traced = f" ({options.sampled:.0%} of the requests)" if "traces" in options.parts else ""
    print(
        f"{machine}; on: {', '.join(options.parts) or 'nothing'}{traced}: {statistics.median(ratios):.3f} of the "
        f"requests/s of off ({min(ratios):.3f} to {max(ratios):.3f}), {statistics.median(cpu):.3f} of its CPU time "
        f"a request ({min(cpu):.3f} to {max(cpu):.3f})"
    )
    for process in ("api", "worker"):
        used = {
            name: statistics.median(figures[name]["cpu_ms_by_process"][process] for figures in found)
            for name in ("on", "off")
        }
        print(f"{process}: {used['on']:.3f} ms of CPU a request on, {used['off']:.3f} off")
    took_s = round(time.monotonic() - began)
    header |= {"part": "observability", "quick": options.quick, "took_s": took_s, "budget_s": BUDGET_S}
    figures = {
        "on": [*options.parts],
        "sampled": options.sampled,
        "clients": options.clients,
        "rounds": options.rounds,
        "requests": spread(ratios),
        "cpu": spread(cpu),
    }
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "observability.json"
    path.write_text(json.dumps({"stamp": header, "figures": figures}, indent=1) + "\n")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
