"""The part `tokens`: the real model through Forebay beside what would serve it otherwise, and beside its bare engine.

    python tests/benchmarks/model.py [--quick]

Streams of the same prompts, greedy, in turns; whoever has no turn is stopped. Forebay and `transformers serve` run the
same bf16 weights, llama-cpp-python the GGUF that these were converted from (Q4_1), which has less to read for a token.
Tokens are counted by the usage of an answer, where a server sends none by its pieces of text.
"""

import asyncio
import contextlib
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the worker has it, before torch is loaded
sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx
import psutil

from benchmarks import systems
from benchmarks.bench_engine import chat
from benchmarks.common import CACHE, Background, Unavailable, free_port, log, part_main, peer_python, ratios, spread
from benchmarks.tokens import START_TIMEOUT_S, Server, ask, prompt
from forebay_contracts.settings import InferenceSettings
from forebay_inference.engine.protocol import Tokens
from forebay_inference.engine.transformers import TransformersEngine
from forebay_inference.model_store import ensure_model
from support.stack import data_dir, running

BUDGET_S = 300
CLIENTS = (1, 4, 8, 16)
WEIGHTS = {
    "forebay": "bf16",
    "transformers serve": "bf16",
    "transformers serve --continuous-batching": "bf16",
    "llama-cpp-python": "GGUF, Q4_1",
}


def figures(took_s: float, answers: list[tuple[float, float, int]]) -> dict[str, float]:
    """Of one turn."""
    gaps = [(last - first) / max(1, count - 1) for first, last, count in answers]
    return {
        "tokens_per_s": sum(count for _, _, count in answers) / took_s,
        "first_ms": 1000 * statistics.median(first for first, _, _ in answers),
        "between_ms": 1000 * statistics.median(gaps),
    }


async def turn(http: httpx.AsyncClient, server: Server, clients: int, tokens: int, number: int) -> dict[str, float]:
    """All clients at once."""
    began = time.perf_counter()
    answers = await asyncio.gather(*(ask(http, server, prompt(one, number), tokens) for one in range(clients)))
    return figures(time.perf_counter() - began, answers)


async def bare_turn(engine: TransformersEngine, clients: int, tokens: int, number: int) -> dict[str, float]:
    """The same of the engine in this process."""

    async def one(client: int) -> tuple[float, float, int]:
        began, times, count = time.perf_counter(), [], 0
        async for event in engine.generate(chat(prompt(client, number), max_tokens=tokens), {}):
            if isinstance(event, Tokens):
                times.append(time.perf_counter() - began)
                count += len(event.token_ids)
        return times[0], times[-1], count

    began = time.perf_counter()
    answers = await asyncio.gather(*(one(client) for client in range(clients)))
    return figures(time.perf_counter() - began, answers)


@contextlib.asynccontextmanager
async def forebay() -> AsyncIterator[tuple[Server, int]]:
    """Forebay with the real model, and its worker's process id."""
    settings = {
        "inference_engine": "transformers",
        "model_quantization": "none",
        "max_concurrent_requests": max(CLIENTS),
        "request_timeout": 300,
        "data_dir": data_dir(),
    }
    with systems.nats_server() as nats:
        async with running(nats, workers=0, **settings) as stack:
            worker = await stack.worker()
            yield Server(stack.apis[0].url, InferenceSettings(_env_file=None).served_model), worker.process.pid


def serve(folder: Path, *options: str) -> tuple[Background, Server]:
    """`transformers serve` on the folder of weights, not started yet."""
    port = free_port()
    binary = str(Path(sys.executable).parent / "transformers")
    command = [binary, "serve", str(folder), "--dtype", "bfloat16", "--device", "cpu", "--host", "127.0.0.1"]
    env = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    background = Background("transformers serve", [*command, "--port", str(port), *options], env)
    return background, Server(f"http://127.0.0.1:{port}", str(folder))


def llama() -> tuple[Background, Server]:
    """llama-cpp-python's server on the GGUF below `.bench/gguf`, not started yet."""
    files = sorted((CACHE / "gguf").glob("*.gguf"))
    if not files:
        raise Unavailable(f"no GGUF file in {CACHE / 'gguf'}: it is in the wheel of `forebay_inference.model_store`")
    port = free_port()
    command = [peer_python("llamacpp"), "-m", "llama_cpp.server", "--model", str(files[0]), "--host", "127.0.0.1"]
    # It interrupts an answer when another is asked for unless told not to; it answers one at a time.
    command += ["--port", str(port), "--n_ctx", "2048", "--interrupt_requests", "false"]
    return Background("llama-cpp-python", command, {"PYTHONPATH": ""}), Server(f"http://127.0.0.1:{port}", "model")


async def beside_peers(
    http: httpx.AsyncClient, ours: Server, folder: Path, loads: tuple[int, ...], tokens: int, rounds: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Everybody's figures by clients, and who is missing."""
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    started: dict[str, Background] = {}
    makers = {
        "transformers serve": lambda: serve(folder),
        "transformers serve --continuous-batching": lambda: serve(folder, "--continuous-batching"),
        "llama-cpp-python": llama,
    }
    with contextlib.ExitStack() as stack:
        servers: dict[str, tuple[Background | None, Server]] = {"forebay": (None, ours)}
        for name, make in makers.items():
            try:
                background, server = make()
                started[name] = stack.enter_context(background)
                await asyncio.to_thread(
                    background.wait_for_port, int(server.url.rpartition(":")[2]), START_TIMEOUT_S / 4
                )
                async with asyncio.timeout(60):
                    await turn(http, server, 2, 4, 10_000)
                background.hold()
                servers[name] = (background, server)
            except (Unavailable, RuntimeError, TimeoutError, httpx.HTTPError) as exc:
                if name in started:
                    started[name].hold()
                missing[name] = str(exc)[-500:] or type(exc).__name__
                log(f"without {name}: {missing[name]}")
        number = 0
        for clients in loads:
            rows: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
            for shift in range(rounds):
                names = [*servers][shift % len(servers) :] + [*servers][: shift % len(servers)]
                for name in names:
                    background_or_none, server = servers[name]
                    if background_or_none:
                        background_or_none.go_on()
                    rows[name].append(await turn(http, server, clients, tokens, number))
                    if background_or_none:
                        background_or_none.hold()
                number += 1
            found[str(clients)] = summary(rows)
            shown = {name: round(one["tokens_per_s"]["median"], 1) for name, one in found[str(clients)].items()}
            log(f"{clients} clients, tokens/s: {shown}")
    return found, missing


def summary(rows: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Spreads, and Forebay's ratio to each."""
    speeds = {name: [row["tokens_per_s"] for row in turns] for name, turns in rows.items()}
    return {
        name: {key: spread([row[key] for row in turns]) for key in turns[0]}
        | ({} if name == "forebay" else {"forebay_to_this": ratios(speeds["forebay"], speeds[name])})
        for name, turns in rows.items()
    }


async def beside_bare(
    http: httpx.AsyncClient, ours: Server, worker: int, pairs: int, clients: int, tokens: int
) -> dict[str, Any]:
    """The engine's class in this process, and the whole system around it, in pairs that change their order."""

    def cpu(pid: int | None = None) -> float:
        return sum(psutil.Process(pid).cpu_times()[:2])

    settings = InferenceSettings(
        _env_file=None, model_quantization="none", max_concurrent_requests=max(CLIENTS), data_dir=data_dir()
    )
    engine = TransformersEngine.from_settings(settings)
    await engine.start(lambda line: None)
    whole, bare = [], []
    try:
        for number in range(pairs + 1):
            pair: dict[str, dict[str, float]] = {}
            for name in ("whole", "bare") if number % 2 else ("bare", "whole"):
                pid = worker if name == "whole" else None
                before = cpu(pid)
                if name == "whole":
                    pair[name] = await turn(http, ours, clients, tokens, 20_000 + number)
                else:
                    pair[name] = await bare_turn(engine, clients, tokens, 20_000 + number)
                pair[name]["cpu_ms_per_token"] = 1000 * (cpu(pid) - before) / (clients * tokens)
            if number:  # the first pair warms up
                whole.append(pair["whole"])
                bare.append(pair["bare"])
    finally:
        await engine.close()
    return {
        "clients": clients,
        "pairs": pairs,
        "whole": {key: spread([row[key] for row in whole]) for key in whole[0]},
        "bare": {key: spread([row[key] for row in bare]) for key in bare[0]},
        "ratio": ratios([row["tokens_per_s"] for row in whole], [row["tokens_per_s"] for row in bare]),
        "worker_cpu_to_bare": ratios(
            [row["cpu_ms_per_token"] for row in whole], [row["cpu_ms_per_token"] for row in bare]
        ),
    }


async def measure(quick: bool) -> dict[str, Any]:
    """Both comparisons."""
    loads, tokens, rounds, pairs = ((1, 4), 8, 1, 1) if quick else (CLIENTS, 24, 3, 5)
    folder = await asyncio.to_thread(
        ensure_model, InferenceSettings(_env_file=None).default_model, data_dir(), lambda line: None
    )
    limits = httpx.Limits(max_connections=None)
    async with forebay() as (ours, worker), httpx.AsyncClient(timeout=300, limits=limits) as http:
        await turn(http, ours, 2, 4, 10_000)
        bare = await beside_bare(http, ours, worker, pairs, 8, 8 if quick else 32)
        log(f"whole ÷ bare: {bare['ratio']}")
        by_clients, missing = await beside_peers(http, ours, folder, loads, tokens, rounds)
    return {
        "tokens": tokens,
        "rounds": rounds,
        "weights": WEIGHTS,
        "clients": by_clients,
        "bare": bare,
        "missing": missing,
    }


if __name__ == "__main__":
    sys.exit(part_main("tokens", BUDGET_S, measure, __doc__ or ""))
