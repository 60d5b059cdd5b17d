"""The part `tokens`: the real model through Forebay beside what would serve it otherwise, and beside its bare engine.

    python tests/benchmarks/tokens.py [--quick] [--quantization none] [--beside nothing]

Streams of prompts that no other turn has, greedy, in turns; whoever has no turn is stopped. Forebay, vLLM and
`transformers serve` run the same weights in bf16, with `--quantization nf4` the first and the last in NF4 (the peer
quantizes its constants once more). llama.cpp's server has the GGUF that they were converted from (Q4_1), with less to
read for a token. Tokens are counted by the usage of an answer.

The threads of `transformers serve` spin as shipped, and it is slower beside anything else that runs. So it also runs
with threads that yield. `--beside busy` measures these and Forebay beside two processes that want a CPU each.
"""

import asyncio
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx
import psutil

from benchmarks import systems
from benchmarks.bench_engine import busy_processes, chat, prompt
from benchmarks.common import Background, Unavailable, free_port, log, part_main, ratios, spread
from benchmarks.loadgen import aiperf
from forebay_contracts.settings import InferenceSettings
from forebay_inference.engine.events import Tokens
from forebay_inference.engine.text.model import TextModel
from forebay_inference.engine.transformers.engine import TransformersEngine
from support.stack import data_dir

BUDGET_S = 900
CLIENTS = (1, 8, 16)
LIMITS = httpx.Limits(max_keepalive_connections=0)
"""llama.cpp closes kept connections without a word, so none is kept."""
START_S = 400
"""vLLM compiles the model."""
BUSY = {"nothing": 0, "busy": 2}
PEER = "transformers serve --continuous-batching"
PEER_BLOCKS = 176
"""Of 256 tokens, for the KV cache: 1 GB, as Forebay's on a CPU. By itself it takes most of the machine's memory."""
PEER_QUANTIZATION = {"none": [], "nf4": ["--quantization", "bnb-4bit"]}
WEIGHTS = {"none": "bf16", "nf4": "NF4"}
Peers = Mapping[str, tuple[str, Callable[[], "tuple[Background, Server]"]]]


@dataclass(frozen=True, slots=True)
class Server:
    """An OpenAI server: where it is, what it calls the model, and how it is asked to go on behind an end token."""

    url: str
    model: str
    endless: Mapping[str, Any] = field(default_factory=lambda: {"ignore_eos": True})


class Answer(NamedTuple):
    """Seconds to the first and to the last piece of its text; tokens; the text."""

    first_s: float
    last_s: float
    tokens: int
    text: str = ""


async def ask(http: httpx.AsyncClient, server: Server, messages: list[dict[str, Any]], tokens: int) -> Answer:
    """One answer."""
    body = {
        "model": server.model,
        "messages": messages,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **server.endless,
    }
    began, times, texts, usage = time.perf_counter(), [], [], None
    async with http.stream("POST", f"{server.url}/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                usage = chunk.get("usage") or usage
                if text := "".join(choice["delta"].get("content") or "" for choice in chunk.get("choices", ())):
                    times.append(time.perf_counter() - began)
                    texts.append(text)
    if not times:
        raise RuntimeError(f"{server.url} sent no text")
    return Answer(times[0], times[-1], usage["completion_tokens"] if usage else len(times), "".join(texts))


def figures(took_s: float, answers: list[Answer]) -> dict[str, float]:
    """Of one turn."""
    gaps = [(answer.last_s - answer.first_s) / max(1, answer.tokens - 1) for answer in answers]
    return {
        "tokens_per_s": sum(answer.tokens for answer in answers) / took_s,
        "first_ms": 1000 * statistics.median(answer.first_s for answer in answers),
        "between_ms": 1000 * statistics.median(gaps),
    }


async def turn(http: httpx.AsyncClient, server: Server, clients: int, tokens: int, number: int) -> dict[str, float]:
    """All clients at once."""
    began = time.perf_counter()
    texts = (prompt(client, number) for client in range(clients))
    answers = await asyncio.gather(*(ask(http, server, [{"role": "user", "content": text}], tokens) for text in texts))
    return figures(time.perf_counter() - began, answers)


async def bare_turn(engine: TextModel, clients: int, tokens: int, number: int) -> dict[str, float]:
    """The same of the engine in this process."""

    async def one(client: int) -> Answer:
        began, times, count = time.perf_counter(), [], 0
        async for event in engine.generate(chat(prompt(client, number), max_tokens=tokens), {}):
            if isinstance(event, Tokens):
                times.append(time.perf_counter() - began)
                count += len(event.token_ids)
        return Answer(times[0], times[-1], count)

    began = time.perf_counter()
    answers = await asyncio.gather(*(one(client) for client in range(clients)))
    return figures(time.perf_counter() - began, answers)


def serve(folder: Path, *options: str, spins: bool = False) -> tuple[Background, Server]:
    """`transformers serve` on the folder of weights, not started yet. As shipped, its threads spin."""
    port = free_port()
    binary = str(Path(sys.executable).parent / "transformers")
    command = [binary, "serve", str(folder), "--dtype", "bfloat16", "--device", "cpu", "--host", "127.0.0.1"]
    env = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env |= {} if spins else {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    command += ["--continuous-batching", "--cb-num-blocks", str(PEER_BLOCKS), "--port", str(port), *options]
    server = Server(f"http://127.0.0.1:{port}", str(folder), {"generation_config": '{"eos_token_id": -1}'})
    return Background("transformers serve", command, env), server


def served(engine: str, slots: int) -> tuple[Background, Server]:
    """The inference server of an engine, not started yet."""
    background, port, name = systems.inference_server(engine, slots)
    return background, Server(f"http://127.0.0.1:{port}", name)


def peers(folder: Path, quantization: str, busy: int) -> Peers:
    """By name: the weights, and what makes it."""
    weights, options = WEIGHTS[quantization], PEER_QUANTIZATION[quantization]
    found = {f"{PEER}, threads yield": (weights, lambda: serve(folder, *options))}
    return found | (
        {}
        if busy
        else {
            PEER: (weights, lambda: serve(folder, *options, spins=True)),
            "llama.cpp, 8 slots": ("GGUF, Q4_1", lambda: served("llamacpp", 8)),
            "llama.cpp, 16 slots": ("GGUF, Q4_1", lambda: served("llamacpp", 16)),
            "vLLM": ("bf16", lambda: served("vllm", 16)),
        }
    )


async def loaded(http: httpx.AsyncClient, server: Server) -> None:
    """Wait until a server that listens answers too: llama.cpp's says 503 while it loads its model."""
    async with asyncio.timeout(120):
        while True:
            try:
                await turn(http, server, 2, 4, 10_000)
                return
            except httpx.HTTPStatusError as exc:
                if exc.response.status_code != 503:
                    raise
            await asyncio.sleep(0.2)


async def beside_peers(
    http: httpx.AsyncClient, ours: Server, makers: Peers, loads: tuple[int, ...], busy: int, tokens: int, rounds: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Everybody's figures by clients, and who is missing."""
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    started: dict[str, Background] = {}
    with contextlib.ExitStack() as stack:
        servers: dict[str, tuple[Background | None, Server]] = {"forebay": (None, ours)}
        for name, (_, make) in makers.items():
            try:
                background, server = make()
                started[name] = stack.enter_context(background)
                await asyncio.to_thread(background.wait_for_port, int(server.url.rpartition(":")[2]), START_S)
                await loaded(http, server)
                background.hold()
                servers[name] = (background, server)
            except (Unavailable, RuntimeError, TimeoutError, httpx.HTTPError) as exc:
                if name in started:
                    started[name].hold()
                missing[name] = str(exc)[-500:] or type(exc).__name__
                log(f"without {name}: {missing[name]}")
        stack.enter_context(busy_processes(busy))
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


async def measure(quick: bool, quantization: str, beside: str) -> dict[str, Any]:
    """Both comparisons; beside busy processes, the one with peers."""
    loads, tokens, rounds, pairs = ((1, 4), 8, 1, 1) if quick else (CLIENTS, 48, 5, 5)
    makers = peers(await systems.default_model(), quantization, BUSY[beside])
    async with (
        systems.real_model(quantization, max(CLIENTS)) as stack,
        httpx.AsyncClient(timeout=300, limits=LIMITS) as http,
    ):
        ours = Server(stack.apis[0].url, InferenceSettings(_env_file=None).served_model)
        await turn(http, ours, 2, 4, 10_000)
        bare = seen = None
        if not BUSY[beside]:
            worker = stack.workers[0].pid
            bare = await beside_bare(http, ours, worker, quantization, pairs, 8, 8 if quick else 64)
            log(f"whole ÷ bare: {bare['ratio']}")
        by_clients, missing = await beside_peers(http, ours, makers, loads, BUSY[beside], tokens, rounds)
        if not BUSY[beside]:
            seen = await beside_aiperf(http, ours, 8, tokens, 1 if quick else 4)
            log(f"by AIPerf: {seen}")
    return {
        "tokens": tokens,
        "rounds": rounds,
        "weights": {"forebay": WEIGHTS[quantization]} | {name: weights for name, (weights, _) in makers.items()},
        "busy": BUSY[beside],
        "clients": by_clients,
        "bare": bare,
        "aiperf": seen,
        "missing": missing,
    }


if __name__ == "__main__":
    choices = {"quantization": tuple(PEER_QUANTIZATION), "beside": tuple(BUSY)}
    sys.exit(part_main("tokens", BUDGET_S, measure, __doc__ or "", **choices))
