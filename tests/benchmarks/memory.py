"""Memory of a worker process on the default model, by quantization, measured.

    python tests/benchmarks/memory.py [--quantization none nf4] [--slots 1] [--requests 8] [--json FILE]

Each worker is a process of its own behind a real queue. It is read once it is ready, and again after some
requests; its own is what no other process shares, resident is all that it has in memory, the pages of shared
libraries included.
"""

import argparse
import asyncio
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import systems
from benchmarks.common import memory_mb

BYTES_PER_CACHED_TOKEN = 23_040
"""Of the default model; see docs/engine.md."""

_LIBRARIES = "import sys, forebay_inference.worker, forebay_inference.engine.transformers.engine, bitsandbytes, torch\n"
# The first product starts the threads and their buffers, which are not the model's.
_IMPORTED = _LIBRARIES + "torch.ones(64, 64) @ torch.ones(64, 64)\nprint('ready', flush=True)\nsys.stdin.read()"


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
    async with systems.real_model(quantization, slots) as stack:
        service = stack.workers[0]
        cached = int((await service.logged(r"KV cache for (\d+) tokens"))[1])
        ready = memory_mb(service.pid)
        questions = (stack.chat(f"{number}: tell a story.", max_tokens=48) for number in range(requests))
        for answer in await asyncio.gather(*questions):
            answer.raise_for_status()
        return {
            "ready": ready,
            "used": memory_mb(service.pid),
            "cache": {"uss": cached * BYTES_PER_CACHED_TOKEN / 1e6},
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
        f"{base['rss']:.0f} resident, {base['uss']:.0f} its own.\n"
    )
    print("| | resident | own | of it KV cache | less libraries and cache | own after requests |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, one in found.items():
        ready, cache = one["ready"], one["cache"]["uss"]
        own = ready["uss"] - base["uss"] - cache
        row = (ready["rss"], ready["uss"], cache, own, one["used"]["uss"])
        print(f"| `{name}` | {' | '.join(f'{value:.0f}' for value in row)} |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"libraries": base, **found}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
