"""The part `served`: an inference server through Forebay beside the same server asked directly, in turns.

    python tests/benchmarks/served.py [--quick] [--engine vllm]

One server with 16 slots runs all the time; so the ratio is what queue, api and worker cost it, on the cores that they
share with it here. Greedy; no prompt comes twice, since the server keeps the prefixes it has computed. Which of the two
is first changes from turn to turn. vLLM is
that of `make test-vllm` or of VLLM_PYTHON, in bf16, compiled as it ships; llama.cpp is that of the wheel `xllamacpp`,
on the GGUF that the weights come from (Q4_1).
"""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx

from benchmarks.common import Background, Unavailable, free_port, log, part_main, ratios, spread
from benchmarks.systems import nats_server
from benchmarks.tokens import Server, turn
from forebay_contracts.settings import InferenceSettings
from forebay_inference.engine.served.dialects import DIALECTS
from forebay_inference.engine.served.process import filled
from forebay_inference.models.store import ensure_gguf, ensure_model
from support.stack import data_dir, running

BUDGET_S = 360
SLOTS: Final = 16
CLIENTS: Final = {"vllm": (1, 8, 16), "llamacpp": (1, 8)}
START_S: Final = 400
VLLM: Final = Path(__file__).parents[2] / "build" / "vllm" / "bin" / "python"


def server(engine: str) -> tuple[Background, int, str]:
    """The server as a worker would start it, not started yet; its port, and what it calls the model."""
    python = os.environ.get("VLLM_PYTHON", str(VLLM)) if engine == "vllm" else sys.executable
    if not Path(python).exists():
        raise Unavailable(f"{python} is missing: `make test-vllm` installs vLLM")
    settings = InferenceSettings(
        _env_file=None, inference_engine=engine, data_dir=data_dir(), max_concurrent_requests=SLOTS
    )
    dialect = DIALECTS[engine]()
    ensure = ensure_gguf if dialect.weights == "gguf" else ensure_model
    model = ensure(settings.default_model, settings.data_dir, log)
    port, name = free_port(), settings.served_model
    values = {"python": python, "model": model, "name": name, "port": port, "slots": SLOTS}
    env = {"PYTHONPATH": ""} if engine == "vllm" else {}
    return Background(engine, filled(dialect.command(settings), values), env), port, name


async def in_turns(
    http: httpx.AsyncClient, ours: Server, alone: Server, clients: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """Both at one number of clients."""
    rows: dict[str, list[dict[str, float]]] = {"forebay": [], "alone": []}
    for number in range(rounds):
        pair = (("forebay", ours), ("alone", alone))
        for first, (name, target) in enumerate(pair[:: 1 if number % 2 else -1]):
            rows[name].append(await turn(http, target, clients, tokens, 1000 * clients + 2 * number + first))
    found: dict[str, Any] = {
        name: {key: spread([row[key] for row in turns]) for key in turns[0]} for name, turns in rows.items()
    }
    for key in ("tokens_per_s", "first_ms"):
        found[f"{key}_to_alone"] = ratios([row[key] for row in rows["forebay"]], [row[key] for row in rows["alone"]])
    return found


async def measure(quick: bool, engine: str) -> dict[str, Any]:
    """All numbers of clients."""
    tokens, rounds = (16, 2) if quick else (64, 7)
    background, port, name = server(engine)
    by_clients: dict[str, Any] = {}
    with background, nats_server() as nats:
        await asyncio.to_thread(background.wait_for_port, port, START_S)
        url = f"http://127.0.0.1:{port}"
        settings = {"inference_engine": engine, "engine_url": url, "max_concurrent_requests": SLOTS}
        async with (
            running(nats, data_dir=data_dir(), request_timeout=300, **settings) as stack,
            # llama.cpp closes kept connections without a word, so none is kept.
            httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_keepalive_connections=0)) as http,
        ):
            ours, alone = Server(stack.apis[0].url, name), Server(url, name)
            for warm in (ours, alone):
                await turn(http, warm, max(CLIENTS[engine]), 8, 10)
            for clients in CLIENTS[engine]:
                by_clients[str(clients)] = found = await in_turns(http, ours, alone, clients, tokens, rounds)
                log(f"{clients} clients: {found}")
    return {"engine": engine, "tokens": tokens, "rounds": rounds, "clients": by_clients}


if __name__ == "__main__":
    sys.exit(part_main("served", BUDGET_S, measure, __doc__ or "", engine=tuple(CLIENTS)))
