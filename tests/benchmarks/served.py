"""The part `served`: an inference server through Forebay beside the same server asked directly, in turns.

    python tests/benchmarks/served.py [--quick] [--engine vllm] [--prompts short]

One server with 16 slots runs all the time; so the ratio is what queue, api and worker cost it, on the cores that they
share with it here. No prompt is sent twice, to either, so that none is found in a cache. Both get prompts of the same
length in a turn, greedy; which one is first changes from turn to turn. vLLM is that of `make test-vllm` or of
VLLM_PYTHON, in bf16, compiled as it ships; llama.cpp is that of the wheel `xllamacpp`, on the GGUF that the weights
come from (Q4_1).

`--engine transformers` is Forebay's own engine beside `transformers serve --continuous-batching`, as shipped, which is
stopped while Forebay has its turn. `--prompts long` sends those of `prompts.py`.
"""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx
import psutil

from benchmarks import prompts, systems, tokens
from benchmarks.common import Background, cpu_s, log, part_main, ratios, spread
from benchmarks.tokens import START_S, Server
from forebay_contracts.settings import InferenceSettings
from support.stack import data_dir, running

BUDGET_S = 600
SLOTS: Final = 16
CLIENTS: Final = {"vllm": (1, 8, 16), "llamacpp": (1, 8), "transformers": (1, 8, 16)}
Turn = Callable[[Server, int], Awaitable[dict[str, float]]]
"""A turn of a server; turns with another number have other prompts."""
Pids = dict[str, int]


@contextlib.asynccontextmanager
async def both(engine: str) -> AsyncIterator[tuple[Server, Server, Background | None, Pids]]:
    """Forebay and the server alone, what is to be stopped in Forebay's turns, and Forebay's processes."""
    model = InferenceSettings(_env_file=None).served_model
    if engine == "transformers":
        background, alone = tokens.serve(await systems.default_model(), spins=True)
    else:
        background, port, _ = systems.inference_server(engine, SLOTS)
        alone = Server(f"http://127.0.0.1:{port}", model)
    settings: dict[str, Any] = {"inference_engine": engine, "max_concurrent_requests": SLOTS, "data_dir": data_dir()}
    settings |= {"model_quantization": "none"} if engine == "transformers" else {"engine_url": alone.url}
    with background, systems.nats_server() as nats:
        await asyncio.to_thread(background.wait_for_port, int(alone.url.rpartition(":")[2]), START_S)
        async with running(nats, request_timeout=300, **settings) as stack:
            pids = {"api": stack.apis[0].pid, "worker": stack.workers[0].pid, "nats-server": nats.pid}
            yield Server(stack.apis[0].url, model), alone, background if engine == "transformers" else None, pids


async def in_turns(
    ours: Server, alone: Server, held: Background | None, pids: Pids, turn: Turn, rounds: int, first: int
) -> dict[str, Any]:
    """Both with one kind of load; `first` is the number of the first turn. `cpu_s` is Forebay's, of all its turns."""
    cpu = dict.fromkeys(pids, 0.0)
    rows: dict[str, list[dict[str, float]]] = {"forebay": [], "alone": []}
    for number in range(rounds):
        pair = (("forebay", ours), ("alone", alone))
        for name, target in pair[:: 1 if number % 2 else -1]:
            if held and name == "forebay":
                held.hold()
            before = {one: cpu_s([psutil.Process(pid)]) for one, pid in pids.items()}
            rows[name].append(await turn(target, first + 2 * number + (name == "alone")))
            if name == "forebay":
                for one, pid in pids.items():
                    cpu[one] += cpu_s([psutil.Process(pid)]) - before[one]
            if held:
                held.go_on()
    found: dict[str, Any] = {
        name: {key: spread([row[key] for row in turns]) for key in turns[0]} for name, turns in rows.items()
    }
    found["cpu_s"] = {one: round(seconds, 2) for one, seconds in cpu.items()}
    for key in ("tokens_per_s", "first_ms"):
        found[f"{key}_to_alone"] = ratios([row[key] for row in rows["forebay"]], [row[key] for row in rows["alone"]])
    return found


def loads(http: httpx.AsyncClient, engine: str, kinds: str, quick: bool) -> dict[str, Turn]:
    """Each kind of load by its name."""

    def short(clients: int) -> Turn:
        count = 16 if quick else 64
        return lambda server, number: tokens.turn(http, server, clients, count, number)

    def long(kind: prompts.Kind) -> Turn:
        return lambda server, number: prompts.turn(http, (server,), kind, 8 if quick else 32, number)

    if kinds == "short":
        return {str(clients): short(clients) for clients in CLIENTS[engine]}
    return {f"{kind.clients}: {name}": long(kind) for name, kind in prompts.KINDS.items()}


async def measure(quick: bool, engine: str, prompts: str) -> dict[str, Any]:
    """All loads."""
    rounds = 2 if quick else 5
    by_clients: dict[str, Any] = {}
    async with (
        both(engine) as (ours, alone, held, pids),
        httpx.AsyncClient(timeout=300, limits=tokens.LIMITS) as http,
    ):
        for warm in (ours, alone):
            await tokens.turn(http, warm, max(CLIENTS[engine]), 8, 10)
        for place, (name, turn) in enumerate(loads(http, engine, prompts, quick).items(), 1):
            for number, warm in enumerate((ours, alone)):
                await turn(warm, 1000 * place + 900 + number)
            by_clients[name] = found = await in_turns(ours, alone, held, pids, turn, rounds, 1000 * place)
            log(f"{name} clients: {found}")
    return {"engine": engine, "prompts": prompts, "rounds": rounds, "clients": by_clients}


if __name__ == "__main__":
    choices = {"engine": tuple(CLIENTS), "prompts": ("short", "long")}
    sys.exit(part_main("served", BUDGET_S, measure, __doc__ or "", **choices))
