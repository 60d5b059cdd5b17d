"""What may wait: how little others feel of it, how busy the slots are, and the room with 100,000 requests in it.

    python tests/benchmarks/classes.py [--quick] [--only interactive busy room shares]

`interactive`: first tokens of streams that come at random times while flex requests have all slots, beside the same
without them, in turns. `busy`: slots that run while flex requests alone wait. `room`: admission, move and status with
100,000 requests of 50 keys in the waiting room, beside an empty one on a server of its own, in turns. `shares`: tokens
of two keys with the weights 1 and 3, and what one key feels of another that sends 200 requests at once, with
KEY_OVERFLOW=defer. The engine is simulated, and takes STEP_MS for a token.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import MODEL, RESULTS, log, write_part
from benchmarks.systems import nats_server
from forebay_contracts import keys
from forebay_contracts.nats import topology
from forebay_contracts.nats.connection import connect
from forebay_contracts.queueing.admission import JetStreamAdmission
from forebay_contracts.queueing.recent_requests import recent_states
from forebay_contracts.queueing.room import JetStreamRoom
from forebay_contracts.queueing.state_store import KeyValueStateStore
from forebay_contracts.queueing.status import queue_status
from forebay_contracts.settings import Settings, load
from forebay_contracts.wire import names
from forebay_contracts.wire.request import CompletionType, InferenceRequest, Tier
from support.stack import Stack, running

BUDGET_S = 170
SLOTS = 4
STEP_MS = 20
PROMPT = 2
"""Tokens of each prompt, which count too."""
LIMITS: dict[str, Any] = {"max_concurrent_requests": SLOTS, "max_queue_size": 2000, "llm_batch_size": 64}
KEYS = {name: f"key-of-{name}-0123456789" for name in ("one", "three", "flood", "other")}


def quantile(values: list[float], part: float) -> float:
    """In ms, of seconds."""
    ordered = sorted(values)
    return round(1000 * ordered[min(int(part * len(ordered)), len(ordered) - 1)], 2)


async def chat(stack: Stack, tokens: int, key: str = "", **fields: Any) -> float:
    """Ask; returns the seconds until the first piece of a stream, or until the whole answer."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": f"[[tokens={tokens} delay_ms={STEP_MS}]]"}]}
    headers = {"authorization": f"Bearer {KEYS[key]}"} if key else {}
    began, first = time.perf_counter(), 0.0
    url = f"{stack.apis[0].url}/v1/chat/completions"
    async with stack.http.stream("POST", url, json=body | fields, headers=headers) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if b'"t0' in line.encode() and not first:
                first = time.perf_counter() - began
    return first if fields.get("stream") else time.perf_counter() - began


async def interactive(options: argparse.Namespace) -> dict[str, Any]:
    """First tokens with and without flex requests in all slots."""
    waits: dict[str, list[float]] = {"alone": [], "beside_flex": []}
    with nats_server() as nats:
        async with running(nats, **LIMITS) as stack:
            for turn in range(2 * options.turns):
                kind = "alone" if turn % 2 else "beside_flex"
                flex = []
                if kind == "beside_flex":
                    flex = [asyncio.create_task(_again(stack)) for _ in range(3 * SLOTS)]
                    await asyncio.sleep(1)
                asked = []
                for _ in range(options.samples):
                    await asyncio.sleep(random.expovariate(1000 / STEP_MS / 10))
                    asked.append(asyncio.create_task(chat(stack, 3, stream=True)))
                waits[kind] += await asyncio.gather(*asked)
                for task in flex:
                    task.cancel()
                await asyncio.gather(*flex, return_exceptions=True)
                await stack.idle()
    found: dict[str, Any] = {
        kind: {name: quantile(times, part) for name, part in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))}
        for kind, times in waits.items()
    }
    found["samples"], found["step_ms"] = len(waits["alone"]), STEP_MS
    beside, alone = found["beside_flex"]["p95"], found["alone"]["p95"]
    found["p95_less_a_step_to_alone"] = round((beside - STEP_MS) / alone, 3)
    found["yield_p99_ms"] = round(found["beside_flex"]["p99"] - found["alone"]["p50"], 2)
    return found


async def _again(stack: Stack) -> None:
    while True:
        await chat(stack, 100, service_tier="flex")


async def busy(options: argparse.Namespace) -> dict[str, Any]:
    """The part of the time in which slots run, from the first start to the last."""
    found: dict[str, Any] = {}
    with nats_server() as nats:
        async with running(nats, **LIMITS) as stack:
            for tokens in (10, 50):
                since, count = time.time(), SLOTS * options.requests
                await asyncio.gather(*(chat(stack, tokens, service_tier="flex") for _ in range(count)))
                states = [one for one in await recent_states(stack.connection, 10 * count) if one.queued_at >= since]
                spans = sorted((one.started_at or 0, one.finished_at or 0) for one in states)
                until = spans[-SLOTS][0]
                worked = sum(max(min(end, until) - began, 0) for began, end in spans)
                found[f"{tokens * STEP_MS}_ms"] = round(worked / SLOTS / (until - spans[0][0]), 4)
    return found


def request(key: str) -> InferenceRequest:
    """A short flex chat."""
    now = time.time()
    return InferenceRequest(
        id=str(uuid.uuid4()),
        completion_type=CompletionType.CHAT,
        model=MODEL,
        created_at=now,
        deadline=now + 3000,
        reply_to="inference.replies.benchmark.0",
        key=key,
        messages=({"role": "user", "content": "[[tokens=5]]"},),
        tier=Tier.FLEX,
    )


async def room(options: argparse.Namespace) -> dict[str, Any]:
    """Median ms with a full room ÷ with an empty one."""
    times: dict[str, dict[str, list[float]]] = {}
    with nats_server() as first, nats_server() as second:
        sides = {}
        for name, nats in (("empty", first), ("full", second)):
            settings = load(Settings, nats_url=nats.url, _env_file=None, max_queue_size=100_000, default_model=MODEL)
            link = await connect(settings, "forebay-benchmark")
            await topology.ensure(link, settings, MODEL)
            admission = JetStreamAdmission(link)
            sides[name] = link, settings, admission, JetStreamRoom(link, admission), KeyValueStateStore(link)
            times[name] = {"admission": [], "move": [], "status": []}
        left = iter(range(options.waiting))

        async def fill() -> None:
            for number in left:
                await sides["full"][2].publish(request(f"key-{number % 50}"))

        began = time.perf_counter()
        await asyncio.gather(*(fill() for _ in range(200)))
        log(f"{options.waiting} waiting after {time.perf_counter() - began:.0f} s")
        token = names.model_token(MODEL)
        for number in range(options.rounds):
            for name in sorted(sides, reverse=bool(number % 2)):
                link, settings, admission, waiting, states = sides[name]
                key = f"key-{number % 50}"

                async def move() -> None:
                    await asyncio.gather(waiting.idle(token, 4), waiting.backlog(token))  # noqa: B023
                    found = await waiting.first(token, key)  # noqa: B023
                    assert found is not None
                    await waiting.move(found)  # noqa: B023

                steps: dict[str, Callable[[], Awaitable[Any]]] = {
                    "admission": lambda: admission.publish(request(key)),  # noqa: B023
                    "status": lambda: queue_status(link, states, settings, ()),  # noqa: B023
                    "move": move,
                }
                for step, work in steps.items():
                    began = time.perf_counter()
                    await work()
                    times[name][step].append(time.perf_counter() - began)
        for link, *_ in sides.values():
            await link.close()
    found: dict[str, Any] = {"waiting": options.waiting}
    for step in times["empty"]:
        empty, full = (1000 * statistics.median(times[name][step]) for name in ("empty", "full"))
        found[step] = {"empty_ms": round(empty, 3), "full_ms": round(full, 3), "ratio": round(full / empty, 3)}
    return found


async def shares(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens of two keys by weight, and one key beside another that floods."""
    file = Path(tempfile.mkdtemp()) / "keys.toml"
    limits = {"one": "weight = 1", "three": "weight = 3", "flood": "max_requests = 2", "other": ""}
    digests = {name: keys.digest(key.encode()) for name, key in KEYS.items()}
    file.write_text("\n".join(f'[{name}]\nsha256 = "{digests[name]}"\n{limits[name]}' for name in KEYS))
    found: dict[str, Any] = {}
    with nats_server() as nats:
        async with running(nats, **LIMITS, api_keys_file=file, key_overflow="defer") as stack:
            tokens = {"one": 8, "three": 4}
            done: list[str] = []

            async def ask(key: str) -> None:
                await chat(stack, tokens[key], key, service_tier="flex")
                done.append(key)

            block = [asyncio.create_task(chat(stack, 150, "other")) for _ in range(SLOTS)]
            await asyncio.sleep(0.5)
            counts = {"one": options.requests, "three": 6 * options.requests}
            await asyncio.gather(*block, *(ask(key) for key in counts for _ in range(counts[key])))
            both = min(len(done) - done[::-1].index(key) for key in counts)  # then one of the two has nothing left
            used = {key: count * (PROMPT + tokens[key]) for key, count in Counter(done[:both]).items()}
            found["three_to_one"] = round(used["three"] / used["one"], 3)
            for kind in ("alone", "beside_flood", "alone", "beside_flood"):
                flood = []
                if kind == "beside_flood":
                    flood = [asyncio.create_task(chat(stack, 20, "flood")) for _ in range(200)]
                    await asyncio.sleep(1)
                waits = [await chat(stack, 5, "other") for _ in range(options.samples)]
                found.setdefault(kind, []).extend(waits)
                for task in flood:
                    task.cancel()
                await asyncio.gather(*flood, return_exceptions=True)
                await asyncio.sleep(1)
    for kind in ("alone", "beside_flood"):
        found[kind] = quantile(found[kind], 0.95)
    found["flood_p95_ratio"] = round(found["beside_flood"] / found["alone"], 3)
    return found


PARTS = {"interactive": interactive, "busy": busy, "room": room, "shares": shares}


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The parts that are asked for."""
    found: dict[str, Any] = {}
    for part in options.only:
        found[part] = await PARTS[part](options)
        log(f"{part}: {json.dumps(found[part])}")
    return found


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--waiting", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.turns, options.samples, options.requests, options.waiting = 1, 30, 8, 5_000
    return write_part("classes", BUDGET_S, options.quick, options.results, lambda: asyncio.run(measure(options)))


if __name__ == "__main__":
    sys.exit(main())
