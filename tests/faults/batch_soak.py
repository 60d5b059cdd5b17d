"""A batch while everything is killed in turn.

    python tests/faults/batch_soak.py [--lines 5000] [--pause 4]
    python tests/faults/batch_soak.py --memory [--lines 50000]

Apis, workers and NATS are killed one after the other, also the api that runs the batch, until the batch has ended.
Afterwards the output must have every line once and with the right answer, and no line may have come to its end twice:
an observer hears each end that the server stores. A killed nats-server loses what it has acknowledged in its last
moments and not yet written; a line whose end it lost so comes to its end again, and is counted apart. Prints JSON;
exits 1 if something is not right. With `--memory` nothing is killed, and the memory of the api is measured.
"""

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
from nats.aio.msg import Msg

sys.path.insert(0, str(Path(__file__).parents[1]))

from forebay_contracts.wire import names
from forebay_contracts.wire.state import RequestStatus
from support.nats import NatsServer
from support.stack import MODEL, Stack, running

URL = "/v1/chat/completions"
SLOTS = 4
LIMITS = {"max_concurrent_requests": SLOTS, "worker_slots": SLOTS // 2, "max_queue_size": 200, "max_deliveries": 100}
UNWRITTEN_S = 0.1
"""What a server has acknowledged so short before it is killed may be lost."""

WITHIN_S = 900
"""Within so long a batch must end."""


def tokens(number: int) -> int:
    """How many tokens the answer to a line has."""
    return 3 + number % 5


def lines(count: int, delay_ms: int) -> bytes:
    """An input file."""
    return b"".join(
        json.dumps(
            {
                "custom_id": f"line-{number}",
                "method": "POST",
                "url": URL,
                "body": {
                    "model": MODEL,
                    "messages": [{"role": "user", "content": f"[[tokens={tokens(number)} delay_ms={delay_ms}]]"}],
                },
            }
        ).encode()
        + b"\n"
        for number in range(count)
    )


def wrong(output: bytes, count: int) -> list[str]:
    """What of an output file is not as it must be."""
    found: Counter[str] = Counter()
    faults = []
    for line in output.splitlines():
        entry = json.loads(line)
        custom_id, response = entry["custom_id"], entry["response"]
        found[custom_id] += 1
        wanted = " ".join(f"t{token}" for token in range(tokens(int(custom_id.removeprefix("line-")))))
        if response["status_code"] != 200 or response["body"]["choices"][0]["message"]["content"] != wanted:
            faults.append(f"{custom_id}: {line[:300]!r}")
    faults += [
        f"line-{number}: {found[f'line-{number}']} times" for number in range(count) if found[f"line-{number}"] != 1
    ]
    return faults + [f"{custom_id} is no line" for custom_id in found if not custom_id.startswith("line-")]


@asynccontextmanager
async def ends(stack: Stack) -> AsyncIterator[dict[str, list[float]]]:
    """When the server has stored records with a last frame `completed`, by answer (monotonic seconds)."""
    heard: defaultdict[str, list[float]] = defaultdict(list)

    async def hear(msg: Msg) -> None:
        if any(frame.startswith(b'{"type":"completed"') for frame in msg.data.split(b"\n")):
            heard[msg.subject].append(time.monotonic())

    subscription = await stack.connection.client.subscribe(names.answered_subject("*"), cb=hear)
    try:
        yield heard
    finally:
        await subscription.unsubscribe()


async def kill_in_turn(
    stack: Stack, nats: NatsServer, stop: asyncio.Event, pause_s: float, nats_died: list[float]
) -> Counter[str]:
    """The api that runs the batch, a worker, NATS; what was killed comes back. Returns how often."""
    killed: Counter[str] = Counter()
    for what in itertools.cycle(("api", "worker", "nats")):
        await asyncio.wait([asyncio.create_task(stop.wait())], timeout=pause_s)
        if stop.is_set():
            return killed
        match what:
            case "api":
                old = stack.apis.pop(0)  # the longest there: it has the batch, or will be the next to get it
                await old.kill()
                await stack.api()
            case "worker":
                await stack.workers.pop(0).kill()
                await stack.worker()
            case _:
                nats_died.append(time.monotonic())
                await asyncio.to_thread(nats.kill)
                await asyncio.to_thread(nats.start)
        killed[what] += 1
    raise AssertionError


def _were_lost(times: list[float], nats_died: list[float]) -> bool:
    """Whether each end but the last came just before a nats-server was killed."""
    return all(any(-UNWRITTEN_S < died - at < UNWRITTEN_S for died in nats_died) for at in times[:-1])


async def ended(stack: Stack, batch_id: str) -> dict[str, Any]:
    """The batch, once it has ended, from whichever api answers."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            try:
                answer = await stack.http.get(f"{stack.apis[-1].url}/v1/batches/{batch_id}")
                found: dict[str, Any] = answer.json()
                if answer.status_code == 200 and found["status"] in ("completed", "failed", "expired", "cancelled"):
                    return found
            except httpx.HTTPError:
                pass
            await asyncio.sleep(0.2)


async def soak(count: int, pause_s: float, delay_ms: int = 5) -> dict[str, Any]:
    """The figures of one run."""
    with tempfile.TemporaryDirectory() as store:
        nats = NatsServer(Path(store))
        nats.start()
        try:
            async with running(nats, apis=2, workers=2, **LIMITS) as stack, ends(stack) as heard:
                client: openai.AsyncOpenAI = stack.openai(0)
                file = await client.files.create(file=("in.jsonl", lines(count, delay_ms)), purpose="batch")
                batch = await client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
                began, stop = time.monotonic(), asyncio.Event()
                nats_died: list[float] = []
                killing = asyncio.create_task(kill_in_turn(stack, nats, stop, pause_s, nats_died))
                try:
                    found = await ended(stack, batch.id)
                finally:
                    stop.set()
                took_s, killed = time.monotonic() - began, await killing
                last = stack.openai(-1)
                output = (await last.files.content(found["output_file_id"])).content if found["output_file_id"] else b""
                errors = (await last.files.content(found["error_file_id"])).content if found["error_file_id"] else b""
                faults = wrong(output, count)
                twice = {subject: times for subject, times in heard.items() if len(times) > 1}
                lost = [subject for subject, times in twice.items() if _were_lost(times, nats_died)]
                return {
                    "lines": count,
                    "took_s": round(took_s, 1),
                    "killed": dict(killed),
                    "status": found["status"],
                    "counts": found["request_counts"],
                    "wrong": faults[:5],
                    "wrong_count": len(faults),
                    "errors": errors[:1000].decode(),
                    "ends_heard": len(heard),
                    "end_lost_by_nats": len(lost),
                    "ended_twice": [subject for subject in twice if subject not in lost][:5],
                    "before_a_kill_s": [
                        round(min((died - at for died in nats_died if died > at), default=-1), 3)
                        for times in twice.values()
                        for at in times[:-1]
                    ],
                    "counted_completed": (await stack.states.totals())[RequestStatus.COMPLETED],
                    "left_in_log": (await stack.connection.jetstream.stream_info(names.ANSWERS)).state.messages,
                }
        finally:
            nats.stop()


async def memory(count: int) -> dict[str, Any]:
    """The resident memory of the api that runs a batch, in MiB: before it, and the most while it runs."""
    with tempfile.TemporaryDirectory() as store:
        nats = NatsServer(Path(store))
        nats.start()
        try:
            slots = {"max_concurrent_requests": 32, "worker_slots": 32, "max_queue_size": 200}
            async with running(nats, apis=1, workers=1, **slots) as stack:
                process = psutil.Process(stack.apis[0].pid)
                client: openai.AsyncOpenAI = stack.openai(0)
                small = await client.files.create(file=("in.jsonl", lines(100, 0)), purpose="batch")
                warm = await client.batches.create(input_file_id=small.id, endpoint=URL, completion_window="24h")
                await ended(stack, warm.id)
                before = process.memory_info().rss
                file = await client.files.create(file=("in.jsonl", lines(count, 0)), purpose="batch")
                uploaded, began = process.memory_info().rss, time.monotonic()
                batch = await client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
                ending = asyncio.create_task(ended(stack, batch.id))
                most = uploaded
                while not ending.done():
                    await asyncio.wait([ending], timeout=0.1)
                    most = max(most, process.memory_info().rss)
                return {
                    "lines": count,
                    "took_s": round(time.monotonic() - began, 1),
                    "counts": ending.result()["request_counts"],
                    "before_mib": before >> 20,
                    "after_upload_mib": uploaded >> 20,
                    "most_mib": most >> 20,
                }
        finally:
            nats.stop()


def main() -> int:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--pause", type=float, default=4, help="seconds between two kills")
    parser.add_argument("--delay-ms", type=int, default=5, help="before each token")
    options = parser.parse_args()
    if options.memory:
        print(json.dumps(asyncio.run(memory(options.lines or 50_000)), indent=1))
        return 0
    found = asyncio.run(soak(options.lines or 5_000, options.pause, options.delay_ms))
    print(json.dumps(found, indent=1))
    is_right = found["status"] == "completed" and found["counts"]["failed"] == 0
    is_right = is_right and not found["wrong_count"] and not found["ended_twice"]
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
