"""What it costs that an answer is stored: streamed responses with `store` beside the same without, in one run.

    python tests/benchmarks/stored.py [--blocks 3] [--pairs 15] [--clients 64] [--tokens 100] [--answers 20000]

The tokens a second come from two systems in turns (turns.py), with an engine that takes 10 ms for a token and with one
that takes no time. The time to the first token comes from one system that is asked for both in turns, with one client,
with eight, and with as many as half of its slots, which come in step. Then so many answers of 50 tokens are stored in
one system: bytes of a token in NATS, memory of nats-server and api before and after, and the time of a retrieval, of
answers drawn at random.
"""

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import RESULTS, drive, log, memory_mb, spread, write_part
from benchmarks.systems import nats_server
from benchmarks.turns import LIMITS, orders, pairs, started
from support.stack import Stack, running

BUDGET_S = 420
KINDS = ("stored", "live")
DELAYS_MS = (10, 0)
STORED_TOKENS = 50
RETRIEVALS = 300
FIRST_TOKEN_CLIENTS = (1, 8, 32)


async def speeds(options: argparse.Namespace) -> dict[str, Any]:
    """Stored ÷ live tokens a second, by the engine's time for a token."""
    found: dict[str, list[float]] = {str(delay_ms): [] for delay_ms in DELAYS_MS}
    for number, names in orders(KINDS, options.blocks):
        async with contextlib.AsyncExitStack() as stack:
            systems = {name: await stack.enter_async_context(started()) for name in names}
            for delay_ms in DELAYS_MS:
                load = ("--stream", "--tokens", str(options.tokens), "--delay-ms", str(delay_ms))
                async with contextlib.AsyncExitStack() as loads:
                    for name, system in systems.items():
                        await loads.enter_async_context(system.load(options.clients, *load, "--response", name))
                    await pairs([*systems.values()], options.pairs)
                    rates = {name: system.requests_per_s() * options.tokens for name, system in systems.items()}
                found[str(delay_ms)].append(rates["stored"] / rates["live"])
                shown = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
                log(f"block {number}, {delay_ms} ms a token: {shown} tokens/s, {found[str(delay_ms)][-1]:.3f}")
    return {delay_ms: spread(ratios) for delay_ms, ratios in found.items()}


async def first_tokens(stack: Stack, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds to the first token (p50) by the number of clients, in turns of two seconds."""
    found: dict[str, Any] = {}
    for clients in FIRST_TOKEN_CLIENTS:
        turns: dict[str, list[float]] = {name: [] for name in KINDS}
        for _ in range(options.blocks * 2):
            for name in KINDS:
                load = {"stream": True, "tokens": 20, "delay_ms": 10, "response": name, "warm_up": 0.3}
                figures = await drive(stack.apis[0].port, clients, 2, **load)
                turns[name].append(figures["first_token_ms"]["p50"])
        medians = {name: round(statistics.median(values), 3) for name, values in turns.items()}
        found[str(clients)] = medians | {"later": spread([a - b for a, b in zip(*turns.values(), strict=True)])}
        log(f"first token p50, {clients} clients, ms: {found[str(clients)]}")
    return found


async def many(stack: Stack, nats_pid: int, options: argparse.Namespace) -> dict[str, Any]:
    """Store answers, then retrieve some of them."""
    api, js = stack.apis[0], stack.connection.jetstream

    def memory() -> dict[str, float]:
        return {"nats": memory_mb(nats_pid)["rss"], "api": memory_mb(api.pid)["rss"]}

    before, began = memory(), time.perf_counter()
    state = (await js.stream_info("INFERENCE_ANSWERS")).state
    bytes_before, bucket = state.bytes, "$KV.inference-responses.>"
    await drive(api.port, 64, 600, stream=True, tokens=STORED_TOKENS, requests=options.answers, response="stored")
    took_s = time.perf_counter() - began
    state = (await js.stream_info("INFERENCE_ANSWERS")).state
    records = (await js.stream_info("KV_inference-responses", subjects_filter=bucket)).state
    after, tokens = memory(), options.answers * STORED_TOKENS
    ids = [subject.rsplit(".", 1)[1] for subject in records.subjects or {}]
    times: list[float] = []
    for identifier in random.Random(1).choices(ids, k=RETRIEVALS):
        asked = time.perf_counter()
        answer = await stack.http.get(f"{api.url}/v1/responses/{identifier}")
        times.append(time.perf_counter() - asked)
        assert json.loads(answer.content)["status"] == "completed", answer.text
    ordered = sorted(1000 * one for one in times)
    found = {
        "answers": options.answers,
        "tokens": tokens,
        "seconds": round(took_s, 1),
        "log_bytes_a_token": round((state.bytes - bytes_before) / tokens, 1),
        "log_messages_a_token": round(state.messages / tokens, 3),
        "record_bytes": round(records.bytes / len(ids)),
        "memory_mb": {"before": before, "after": after},
        "retrieval_ms": {"p50": round(ordered[len(ordered) // 2], 2), "p99": round(ordered[-len(ordered) // 100], 2)},
    }
    log(json.dumps(found))
    return found


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    found: dict[str, Any] = {
        "clients": options.clients,
        "tokens": options.tokens,
        "stored_to_live": await speeds(options),
    }
    with nats_server() as nats:
        async with running(nats, **LIMITS | {"answer_log_bytes": 8 << 30}) as stack:
            found["first_token_ms"] = await first_tokens(stack, options)
            found["stored"] = await many(stack, nats.pid, options)
    return found


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--answers", type=int, default=20_000)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.blocks, options.pairs, options.answers = 1, 5, 500
    return write_part("stored", BUDGET_S, options.quick, options.results, lambda: asyncio.run(measure(options)))


if __name__ == "__main__":
    sys.exit(main())
