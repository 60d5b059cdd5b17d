"""Memory of a worker process on the default model, by quantization, measured.

    python tests/benchmarks/memory.py [--quantization none nf4] [--slots 1] [--requests 8] [--json FILE]

Each worker is a process of its own behind a real queue. It is read once it is ready, and again after some
requests; private is what no other process shares (private clean and dirty of `smaps_rollup`), resident is all
that it has in memory, the pages of shared libraries included. Linux only.
"""

import argparse
import asyncio
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.tokens import real_worker

BYTES_PER_CACHED_TOKEN = 23_040
"""Of the default model; see docs/engine.md."""

_LIBRARIES = "import sys, forebay_inference.worker, forebay_inference.engine.transformers, bitsandbytes, torch\n"
# The first product starts the threads and their buffers, which are not the model's.
_IMPORTED = _LIBRARIES + "torch.ones(64, 64) @ torch.ones(64, 64)\nprint('ready', flush=True)\nsys.stdin.read()"


def memory_mb(pid: int) -> dict[str, float]:
    """Resident and private memory of a process, in MB (10⁶ bytes)."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kib = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    return {
        "resident": kib["Rss"] * 1024 / 1e6,
        "private": (kib["Private_Clean"] + kib["Private_Dirty"]) * 1024 / 1e6,
    }


async def libraries() -> dict[str, float]:
    """A process that has imported what a worker imports, and loaded no model."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _IMPORTED, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    await process.stdout.readline()
    found = memory_mb(process.pid)
    await process.communicate(b"")  # its end of input, which ends it
    return found


async def worker(quantization: str, slots: int, requests: int) -> dict[str, dict[str, float]]:
    """A worker when it is ready, and after `requests` requests at once."""
    async with real_worker(quantization, slots) as (stack, service):
        cached = int((await service.logged(r"KV cache for (\d+) tokens"))[1])
        ready = memory_mb(service.process.pid)
        questions = (stack.chat(f"{number}: tell a story.", max_tokens=48) for number in range(requests))
        for answer in await asyncio.gather(*questions):
            answer.raise_for_status()
        return {
            "ready": ready,
            "used": memory_mb(service.process.pid),
            "cache": {"private": cached * BYTES_PER_CACHED_TOKEN / 1e6},
        }


async def main() -> int:
    """Measure what the arguments name, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", nargs="+", default=["none", "nf4"])
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--json", type=Path, help="also write all figures here")
    arguments = parser.parse_args()
    base = await libraries()
    found = {name: await worker(name, arguments.slots, arguments.requests) for name in arguments.quantization}
    print(
        f"{arguments.slots} slot(s), MB. A process that has the libraries and no model: "
        f"{base['resident']:.0f} resident, {base['private']:.0f} private.\n"
    )
    print("| | resident | private | of it KV cache | less libraries and cache | private after requests |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, one in found.items():
        ready, cache = one["ready"], one["cache"]["private"]
        own = ready["private"] - base["private"] - cache
        print(
            f"| `{name}` | {ready['resident']:.0f} | {ready['private']:.0f} | {cache:.0f} | {own:.0f} "
            f"| {one['used']['private']:.0f} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"libraries": base, **found}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
