"""`make bench`: what the queue costs, with an engine that costs nothing.

    python tests/benchmarks/overhead.py [--seconds 5] [--rounds 3] [--apis 1] [--json FILE]

In each round the load goes through HTTP, the stream, a worker and back, and then over the bare floor of NATS on
the same server, so that whatever else the machine does hits both. Ratios are of the same round.
"""

import argparse
import asyncio
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.nats import NatsServer
from support.stack import Stack, running

HERE = Path(__file__).parent
CLIENTS = (1, 16, 64)
IDLE_S = 15
SETTLE_S = 3


async def run(*command: str) -> dict[str, float]:
    """The figures that a script prints."""
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}")
    figures: dict[str, float] = json.loads(output)
    return figures


def cpu_s(processes: dict[str, psutil.Process]) -> dict[str, float]:
    """CPU seconds so far, children included."""
    used = {}
    for name, process in processes.items():
        family = [process, *process.children(recursive=True)]
        used[name] = sum(sum(member.cpu_times()[:2]) for member in family)
    return used


async def idle_share(processes: dict[str, psutil.Process]) -> float:
    """How much of one core everything together uses when nobody asks anything, in percent."""
    await asyncio.sleep(SETTLE_S)
    before = cpu_s(processes)
    began = time.monotonic()
    await asyncio.sleep(IDLE_S)
    used = sum(after - before[name] for name, after in cpu_s(processes).items())
    return 100 * used / (time.monotonic() - began)


async def measure(stack: Stack, nats: NatsServer, seconds: float, rounds: int) -> dict[str, Any]:
    """All figures of a running system."""
    processes = {
        "nats-server": psutil.Process(nats.pid),
        "api": psutil.Process(stack.apis[0].process.pid),
        "worker": psutil.Process(stack.workers[0].process.pid),
    }
    found: dict[str, Any] = {"idle_percent_of_a_core": round(await idle_share(processes), 2), "clients": {}}
    for clients in CLIENTS:
        pairs = []
        for _ in range(rounds):
            before = cpu_s(processes)
            ours = await run(str(HERE / "driver.py"), str(stack.apis[0].port), str(clients), str(seconds))
            ours["cpu_ms_per_request"] = {  # type: ignore[assignment]
                name: round(1000 * (after - before[name]) / ours["requests"], 3)
                for name, after in cpu_s(processes).items()
            }
            await stack.idle()
            floor = await run(str(HERE / "floor.py"), nats.url, str(clients), str(seconds))
            pairs.append({"forebay": ours, "floor": floor})
        found["clients"][clients] = pairs
    return found


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown, medians over the rounds with the least and the most."""

    def spread(values: list[float], unit: str = "") -> str:
        return f"{statistics.median(values):.4g}{unit} ({min(values):.4g} to {max(values):.4g})"

    lines = [
        "| clients | requests/s | p50 ms | p95 ms | p99 ms | floor requests/s | floor p50 ms | ÷ floor's requests/s "
        "| CPU ms a request: nats-server, api, worker |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for clients, pairs in found["clients"].items():
        ours, floor = [pair["forebay"] for pair in pairs], [pair["floor"] for pair in pairs]
        cells = [spread([one[name] for one in ours]) for name in ("requests_per_s", "p50_ms", "p95_ms", "p99_ms")]
        cells += [spread([one[name] for one in floor]) for name in ("requests_per_s", "p50_ms")]
        cells.append(spread([a["requests_per_s"] / b["requests_per_s"] for a, b in zip(ours, floor, strict=True)]))
        cpu = [one["cpu_ms_per_request"] for one in ours]
        cells.append(", ".join(f"{statistics.median(each[name] for each in cpu):.2f}" for name in cpu[0]))
        lines.append(f"| {clients} | {' | '.join(cells)} |")
    refused = sum(pair["forebay"]["not_200"] for pairs in found["clients"].values() for pair in pairs)
    lines.append(
        f"\nIdle, all together: {found['idle_percent_of_a_core']} % of a core. Answers that were not 200: {refused}."
    )
    return "\n".join(lines)


async def main() -> int:
    """Start a system, measure it, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5, help="of load at a time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--apis", type=int, default=1, help="api processes behind the port")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    options = parser.parse_args()
    limits = {"max_concurrent_requests": 64, "max_queue_size": 1000, "api_processes": options.apis}
    with tempfile.TemporaryDirectory() as folder:
        nats = NatsServer(Path(folder) / "nats")
        nats.start()
        try:
            async with running(nats, log_level="INFO", **limits) as stack:
                found = await measure(stack, nats, options.seconds, options.rounds)
        finally:
            nats.stop()
    found["machine"] = f"{platform.processor() or platform.machine()}, {psutil.cpu_count()} cores"
    print(f"{found['machine']}, {options.apis} api process(es), {options.rounds} rounds of {options.seconds:g} s\n")
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
