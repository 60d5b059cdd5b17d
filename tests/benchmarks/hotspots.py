"""Where api and worker spend their CPU time under load: the innermost frames that py-spy sees, by what they are for.

    python tests/benchmarks/hotspots.py [--clients 64] [--seconds 10]

py-spy comes from PyPI (`pip install py-spy`). It slows what it looks at, so parts are right and rates are not.
"""

import argparse
import asyncio
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import systems
from benchmarks.common import wrk

LIMITS = {"max_concurrent_requests": 64, "max_queue_size": 1000}
TOKENS = 5

PURPOSES = (
    ("the client's socket", ("forebay_api/http", "_flush")),
    ("NATS's socket", ("writelines",)),
    ("event loop, reads", ("Runner.run", "run (uvloop")),
    ("Pydantic, JSON", ("pydantic", "json")),
    ("NATS client", ("nats/", "asyncio/queues", "contracts/nats/request_reply", "contracts/queueing/deliveries")),
    ("HTTP", ("uvicorn", "starlette", "forebay_api/http")),
    ("metrics", ("prometheus",)),
    ("Forebay's own", ("forebay_",)),
)
"""By the first whose words the innermost frame has: of the first all, of the others one."""


def purpose(frames: list[str]) -> str:
    """What a stack is there for."""
    if any("logging/" in frame or "telemetry/logs" in frame for frame in frames):
        return "log lines"
    for name, words in PURPOSES:
        if (all if name == PURPOSES[0][0] else any)(word in frames[-1] for word in words):
            return name
    return "the rest"


def shares(raw: Path) -> dict[str, float]:
    """Parts of the samples in what `py-spy record --format raw` wrote; threads that wait are no part."""
    counts: Counter[str] = Counter()
    for line in raw.read_text().splitlines():
        stack, _, samples = line.rpartition(" ")
        if "serve_forever" not in stack:
            counts[purpose(stack.split(";"))] += int(samples)
    return {name: count / counts.total() for name, count in counts.most_common()}


async def main() -> int:
    """Load, look, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=int, default=10)
    options = parser.parse_args()
    spy = shutil.which("py-spy")
    if spy is None:
        print("py-spy is missing: pip install py-spy", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        async with systems.forebay(log_level="INFO", **LIMITS) as (ours, _, _):
            await wrk(ours.port, options.clients, 1, TOKENS)
            spies = []
            for name in ("api", "worker"):
                process = ("-p", str(ours.processes[name][0].pid), "-o", f"{folder}/{name}")
                command = (spy, "record", "--format", "raw", "-r", "300", "-d", str(options.seconds), *process)
                devnull = asyncio.subprocess.DEVNULL
                spies.append(await asyncio.create_subprocess_exec(*command, stdout=devnull, stderr=devnull))
            await wrk(ours.port, options.clients, options.seconds + 2, TOKENS)
            for one in spies:
                await one.wait()
        for name in ("api", "worker"):
            found = shares(Path(folder) / name)
            print(f"{name}: " + ", ".join(f"{what} {share:.0%}" for what, share in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
