"""What it would bring if each conversation stayed at one worker, whose cache has what was said before.

    python tests/benchmarks/affinity.py [--quick] [--engine llamacpp]

Two workers share the queue of a model, as ever; two more have a model each, and a client asks always for the same one.
Both pairs take turns with conversations of the same lengths. The first token is the mean of the requests after the
first of a conversation. No part of `make bench`.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx

from benchmarks.common import log, part_main, ratios, spread
from benchmarks.prompts import Kind, turn
from benchmarks.systems import nats_server
from benchmarks.tokens import Server
from support.stack import data_dir, running

BUDGET_S: Final = 300
SLOTS: Final = 4
KINDS: Final = {
    "1 client, 300 tokens": Kind(1, 300, requests=4),
    "1 client, 2,000 tokens": Kind(1, 2000, requests=4),
    "4 clients, 1,000 tokens": Kind(4, 1000, requests=4),
}


async def measure(quick: bool, engine: str) -> dict[str, Any]:
    """Both pairs, with each kind of conversation."""
    tokens, rounds = (4, 1) if quick else (16, 5)
    found: dict[str, Any] = {}
    settings: dict[str, Any] = {
        "inference_engine": engine,
        "data_dir": data_dir(),
        "max_concurrent_requests": 2 * SLOTS,
    }
    settings |= {"worker_slots": SLOTS, "request_timeout": 300}
    async with contextlib.AsyncExitStack() as stack:
        nats = stack.enter_context(nats_server())
        services = await stack.enter_async_context(running(nats, workers=2, model_name="shared", **settings))
        for name in ("one", "two"):
            await services.worker(model_name=name)
        await services.knows_workers()
        http = await stack.enter_async_context(httpx.AsyncClient(timeout=300))
        servers = [Server(services.apis[0].url, name) for name in ("shared", "one", "two")]
        sides = {"shared": servers[:1], "apart": servers[1:]}
        for place, (name, kind) in enumerate(KINDS.items()):
            rows: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
            for number in range(rounds):
                for side in [*sides][:: 1 if number % 2 else -1]:
                    rows[side].append(
                        await turn(http, sides[side], kind, tokens, 1000 * place + 2 * number + (side == "apart"))
                    )
            one: dict[str, Any] = {
                side: {key: spread([row[key] for row in turns]) for key in turns[0]} for side, turns in rows.items()
            }
            for key in ("first_ms", "tokens_per_s"):
                one[f"{key}_shared_to_apart"] = ratios(*([row[key] for row in rows[side]] for side in sides))
            found[name] = one
            log(f"{name}: {one}")
    return {"engine": engine, "tokens": tokens, "rounds": rounds, "kinds": found}


if __name__ == "__main__":
    choices = {"engine": ("llamacpp", "transformers")}
    sys.exit(part_main("affinity", BUDGET_S, measure, __doc__ or "", **choices))
