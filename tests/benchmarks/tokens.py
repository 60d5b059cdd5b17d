"""The part `tokens`: the real model through Forebay beside what would serve it otherwise, and beside its bare engine.

    python tests/benchmarks/tokens.py [--quick] [--quantization none]

Streams of prompts that no other turn has, greedy, in turns; whoever has no turn is stopped. Forebay and `transformers
serve` run the same weights, in bf16 or with `--quantization nf4` in NF4 (the peer quantizes its constants once more),
llama-cpp-python the GGUF that they were converted from (Q4_1), which has less to read for a token. Tokens are counted
by the usage of an answer, where a server sends none by its pieces of text. Threads of `transformers serve` are made to
yield; as shipped they spin, and it is slower beside anything else that runs. `bench_engine.py` compares with both.
"""

import asyncio
import contextlib
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx
import psutil

from benchmarks import systems
from benchmarks.bench_engine import chat, prompt
from benchmarks.common import CACHE, Background, Unavailable, free_port, log, part_main, peer_python, ratios, spread
from benchmarks.loadgen import aiperf
from forebay_contracts.settings import InferenceSettings
from forebay_inference.engine.events import Tokens
from forebay_inference.engine.text.model import TextModel
from forebay_inference.engine.transformers.engine import TransformersEngine
from support.stack import data_dir

BUDGET_S = 370
CLIENTS = (1, 4, 8, 16)
PEER_QUANTIZATION = {"none": [], "nf4": ["--quantization", "bnb-4bit"]}


@dataclass(frozen=True, slots=True)
class Server:
    """An OpenAI server: where it is, and what it calls the model."""

    url: str
    model: str


async def ask(http: httpx.AsyncClient, server: Server, text: str, tokens: int) -> tuple[float, float, int]:
    """One answer: seconds to its first and to its last piece of text, and its tokens."""
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, times, usage = time.perf_counter(), [], None
    async with http.stream("POST", f"{server.url}/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                usage = chunk.get("usage") or usage
                if any(choice["delta"].get("content") for choice in chunk.get("choices", ())):
                    times.append(time.perf_counter() - began)
    if not times:
        raise RuntimeError(f"{server.url} sent no text")
    return times[0], times[-1], usage["completion_tokens"] if usage else len(times)


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


async def bare_turn(engine: TextModel, clients: int, tokens: int, number: int) -> dict[str, float]:
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


def serve(folder: Path, *options: str) -> tuple[Background, Server]:
    """`transformers serve` on the folder of weights, not started yet."""
    port = free_port()
    binary = str(Path(sys.executable).parent / "transformers")
    command = [binary, "serve", str(folder), "--dtype", "bfloat16", "--device", "cpu", "--host", "127.0.0.1"]
    env = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    background = Background("transformers serve", [*command, "--port", str(port), *options], env)
    return background, Server(f"http://127.0.0.1:{port}", str(folder))


def llama() -> tuple[Background, Server]:
    """llama-cpp-python's server on the GGUF below `.bench/gguf`, not started yet."""
    files = sorted((CACHE / "gguf").glob("*.gguf"))
    if not files:
        raise Unavailable(f"no GGUF file in {CACHE / 'gguf'}: `make bench-prepare` says why")
    port = free_port()
    command = [peer_python("llamacpp"), "-m", "llama_cpp.server", "--model", str(files[0]), "--host", "127.0.0.1"]
    # It interrupts an answer when another is asked for unless told not to; it answers one at a time.
    command += ["--port", str(port), "--n_ctx", "2048", "--interrupt_requests", "false"]
    return Background("llama-cpp-python", command, {"PYTHONPATH": ""}), Server(f"http://127.0.0.1:{port}", "model")


async def beside_peers(
    http: httpx.AsyncClient, ours: Server, quantization: str, loads: tuple[int, ...], tokens: int, rounds: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Everybody's figures by clients, and who is missing."""
    folder, quantized = await systems.default_model(), PEER_QUANTIZATION[quantization]
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    started: dict[str, Background] = {}
    makers = {
        "transformers serve": lambda: serve(folder, *quantized),
        "transformers serve --continuous-batching": lambda: serve(folder, "--continuous-batching", *quantized),
        "llama-cpp-python": llama,
    }
    with contextlib.ExitStack() as stack:
        servers: dict[str, tuple[Background | None, Server]] = {"forebay": (None, ours)}
        for name, make in makers.items():
            try:
                background, server = make()
                started[name] = stack.enter_context(background)
                await asyncio.to_thread(background.wait_for_port, int(server.url.rpartition(":")[2]))
                async with asyncio.timeout(120):
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
    http: httpx.AsyncClient, ours: Server, worker: int, quantization: str, pairs: int, clients: int, tokens: int
) -> dict[str, Any]:
    """The engine's class in this process, and the whole system around it, in pairs that change their order."""

    def cpu(pid: int | None = None) -> float:
        return sum(psutil.Process(pid).cpu_times()[:2])

    settings = InferenceSettings(
        _env_file=None, model_quantization=quantization, max_concurrent_requests=max(CLIENTS), data_dir=data_dir()
    )
    engine = TextModel(TransformersEngine(settings))
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


async def beside_aiperf(
    http: httpx.AsyncClient, ours: Server, clients: int, tokens: int, turns: int
) -> dict[str, Any] | None:
    """The same load of Forebay as AIPerf sees it and as this script does; None where AIPerf is not installed."""
    texts = [prompt(client, 30_000 + number) for number in range(turns) for client in range(clients)]
    try:
        seen = await aiperf(ours.url, ours.model, texts, {clients: len(texts)}, tokens, temperature=0)
    except Unavailable as exc:
        log(str(exc))
        return None
    rows = [await turn(http, ours, clients, tokens, 40_000 + number) for number in range(turns)]
    own = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    return {
        "clients": clients,
        "requests": len(texts),
        "aiperf": {key: round(seen[clients][key], 2) for key in own},
        "own": {key: round(value, 2) for key, value in own.items()},
        "own_to_aiperf": {key: round(value / seen[clients][key], 3) for key, value in own.items()},
    }


async def measure(quick: bool, quantization: str) -> dict[str, Any]:
    """Both comparisons."""
    loads, tokens, rounds, pairs = ((1, 4), 8, 1, 1) if quick else (CLIENTS, 24, 3, 5)
    limits = httpx.Limits(max_connections=None)
    async with (
        systems.real_model(quantization, max(CLIENTS)) as stack,
        httpx.AsyncClient(timeout=300, limits=limits) as http,
    ):
        ours = Server(stack.apis[0].url, InferenceSettings(_env_file=None).served_model)
        await turn(http, ours, 2, 4, 10_000)
        worker = stack.workers[0].pid
        bare = await beside_bare(http, ours, worker, quantization, pairs, 8, 8 if quick else 64)
        log(f"whole ÷ bare: {bare['ratio']}")
        by_clients, missing = await beside_peers(http, ours, quantization, loads, tokens, rounds)
        seen = await beside_aiperf(http, ours, 8, tokens, 1 if quick else 4)
        log(f"by AIPerf: {seen}")
    names = next(iter(by_clients.values()))
    weights = "bf16" if quantization == "none" else quantization.upper()
    return {
        "tokens": tokens,
        "rounds": rounds,
        "weights": dict.fromkeys(names, weights) | {"llama-cpp-python": "GGUF, Q4_1"},
        "clients": by_clients,
        "bare": bare,
        "aiperf": seen,
        "missing": missing,
    }


if __name__ == "__main__":
    sys.exit(part_main("tokens", BUDGET_S, measure, __doc__ or "", quantization=tuple(PEER_QUANTIZATION)))
