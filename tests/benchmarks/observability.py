"""What observability costs: the same load with all of it on and with none of it, in turns (turns.py).

    python tests/benchmarks/observability.py [--blocks 5] [--pairs 20] [--clients 16] [--sampled 0.01] [--silent]

"On" is metrics, scraped from both services every SCRAPE_S of the system's own time (deploy/observability: 15 s), JSON
log lines, and traces of the part `--sampled` of the requests, sent to a collector. "Off" is METRICS=false, no traces
and text lines; with `--silent`, "off" has no lines below warnings (LOG_LEVEL=WARNING).

The engine takes 10 ms for a token, which has the goal, and then no time, which has none: it shows the cost of the path
alone. A block is one pair of systems with both engines; the next block has new systems, since two equal systems differ
by a few percent for as long as they live. `--parts` with no part shows by how much. A ratio is of one block: of the
requests/s, and of the CPU time of api and worker for a request.
"""

import argparse
import asyncio
import contextlib
import statistics
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import RESULTS, log, spread, write_part
from benchmarks.turns import SCRAPE_S, TURN_S, orders, pairs, started

BUDGET_S = 300
DELAYS_MS = (10, 0)
"""Time of a token, by engine."""
PARTS = ("metrics", "logs", "traces")


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


async def block(names: list[str], settings: dict[str, dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one pair of systems, by engine."""
    found: dict[str, Any] = {}
    async with contextlib.AsyncExitStack() as running:
        systems = {name: await running.enter_async_context(started(**settings[name])) for name in names}
        for delay_ms in DELAYS_MS:
            async with contextlib.AsyncExitStack() as loads:
                for system in systems.values():
                    await loads.enter_async_context(system.load(options.clients, "--delay-ms", str(delay_ms)))
                await pairs([*systems.values()], options.pairs)
                one: dict[str, Any] = {
                    name: {"requests_per_s": system.requests_per_s(), "cpu_ms": system.cpu_ms()}
                    for name, system in systems.items()
                }
            on, off = one["on"], one["off"]
            one["ratio"] = on["requests_per_s"] / off["requests_per_s"]
            one["cpu_ratio"] = sum(on["cpu_ms"].values()) / sum(off["cpu_ms"].values())
            found[str(delay_ms)] = one
    return found


async def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All blocks."""
    off = {"metrics": "false"} | ({"log_level": "WARNING"} if options.silent else {})
    found = []
    with collector() as endpoint:
        on: dict[str, Any] = {"metrics": "true" if "metrics" in options.parts else "false"}
        if "logs" in options.parts:
            on["log_format"] = "json"
        if "traces" in options.parts:
            on |= {
                "otel_exporter_otlp_endpoint": endpoint,
                "otel_traces_sampler": "parentbased_traceidratio",
                "otel_traces_sampler_arg": options.sampled,
            }
        for number, names in orders(("on", "off"), options.blocks):
            figures = await block(names, {"on": on, "off": off}, options)
            for delay_ms, one in figures.items():
                rates = ", ".join(f"{name} {one[name]['requests_per_s']:.0f}" for name in ("on", "off"))
                ratios = f"ratio {one['ratio']:.3f}, CPU {one['cpu_ratio']:.3f}"
                log(f"block {number}, {delay_ms} ms a token: {rates} requests/s, {ratios}")
            found.append(figures)
    return found


def summary(found: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """The figures of all blocks, by engine."""

    def engine(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "requests": spread([row["ratio"] for row in rows]),
            "cpu": spread([row["cpu_ratio"] for row in rows]),
            "requests_per_s": {
                name: spread([row[name]["requests_per_s"] for row in rows], 0) for name in ("on", "off")
            },
            "cpu_ms": {
                process: {
                    name: round(statistics.median(row[name]["cpu_ms"][process] for row in rows), 4)
                    for name in ("on", "off")
                }
                for process in ("api", "worker")
            },
        }

    return {
        "on": [*options.parts],
        "silent": options.silent,
        "sampled": options.sampled,
        "clients": options.clients,
        "blocks": options.blocks,
        "pairs": options.pairs,
        "turn_s": TURN_S,
        "scrape_s": SCRAPE_S,
        "by_token_ms": {str(delay_ms): engine([row[str(delay_ms)] for row in found]) for delay_ms in DELAYS_MS},
    }


def main() -> int:
    """Measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=20, help="turns of each system in a block, for each engine")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--sampled", type=float, default=0.01, help="part of the requests that is traced")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="what is on")
    parser.add_argument("--silent", action="store_true", help="off has no log lines below warnings")
    parser.add_argument("--quick", action="store_true", help="one short block")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of observability.json")
    options = parser.parse_args()
    if options.quick:
        options.blocks, options.pairs = 1, 6
    return write_part(
        "observability-silent" if options.silent else "observability",
        BUDGET_S,
        options.quick,
        options.results,
        lambda: summary(asyncio.run(measure(options)), options),
    )


if __name__ == "__main__":
    sys.exit(main())
