"""`make bench-peers`: Forebay through its whole path beside `transformers serve --continuous-batching`.

    python tests/benchmarks/tokens.py [--quantization none nf4] [--clients 1 8] [--tokens 48] [--pairs 5] [--json FILE]

Both serve the same folder of weights over HTTP and are asked the same prompts in turns, greedy and streamed, so
that whatever else the machine does hits both. Ratios are of the same pair of turns. Which of the two goes first
changes from pair to pair, and no prompt is used in two turns, so that none is found in a cache.

Both are given threads that yield and do not spin, without which the peer is several times slower beside anything
else that runs; `--peer-as-shipped` leaves it as its users have it. `--peer-args` go to its command line.
"""

import argparse
import asyncio
import json
import os
import platform
import shlex
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from forebay_contracts.settings import InferenceSettings
from forebay_inference.model_store import ensure_model
from support.nats import NatsServer
from support.stack import Service, Stack, data_dir, running

START_TIMEOUT_S = 500
PEER_QUANTIZATION = {"none": [], "nf4": ["--quantization", "bnb-4bit"], "int8": ["--quantization", "bnb-8bit"]}
ANIMALS = ("cat", "dog", "fox", "hen", "cow", "pig", "bee", "ant")
SERVES = r"worker \S+ serves (.*)"


@dataclass(frozen=True, slots=True)
class Server:
    """An OpenAI server: where it is, and what it calls the model."""

    url: str
    model: str


@dataclass(frozen=True, slots=True)
class Turn:
    """What all clients of one turn had together."""

    tokens_per_s: float
    first_ms_p50: float
    tokens: int


def prompt(client: int, turn: int) -> str:
    """A question of its own for each client of each turn; its answer is longer than what is asked for."""
    return f"{turn}.{client}: write a long story about a {ANIMALS[client % len(ANIMALS)]}."


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


async def take_turn(http: httpx.AsyncClient, server: Server, clients: int, tokens: int, turn: int) -> Turn:
    """All clients at once, one question each."""
    started = time.perf_counter()
    answers = await asyncio.gather(*(ask(http, server, prompt(client, turn), tokens) for client in range(clients)))
    took_s = time.perf_counter() - started
    total = sum(count for _, _, count in answers)
    return Turn(total / took_s, 1000 * statistics.median(first for first, _, _ in answers), total)


@asynccontextmanager
async def real_worker(quantization: str, slots: int) -> AsyncIterator[tuple[Stack, Service]]:
    """A stack whose one worker has loaded the default model."""
    settings = {
        "inference_engine": "transformers",
        "model_quantization": quantization,
        "max_concurrent_requests": slots,
        "request_timeout": 300,
        "data_dir": data_dir(),
    }
    with tempfile.TemporaryDirectory() as folder:
        nats = NatsServer(Path(folder) / "nats")
        nats.start()
        try:
            async with running(nats, workers=0, **settings) as stack:
                worker = Service("forebay_inference", SERVES, stack.env())
                stack.workers.append(worker)
                await worker.launch()
                await worker.logged(SERVES, timeout_s=START_TIMEOUT_S)
                yield stack, worker
        finally:
            nats.stop()


@asynccontextmanager
async def forebay(quantization: str, slots: int) -> AsyncIterator[Server]:
    """Forebay: nats-server, api and worker, each a process."""
    async with real_worker(quantization, slots) as (stack, _):
        yield Server(stack.apis[0].url, InferenceSettings(_env_file=None).served_model)


@asynccontextmanager
async def peer(folder: Path, quantization: str, arguments: argparse.Namespace) -> AsyncIterator[Server]:
    """`transformers serve` on the same weights."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if not arguments.peer_as_shipped:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    options = ["--continuous-batching", "--dtype", "bfloat16", "--device", "cpu", "--host", "127.0.0.1"]
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).parent / "transformers"),
            "serve",
            str(folder),
            *options,
            *PEER_QUANTIZATION[quantization],
            "--port",
            str(port),
            *shlex.split(arguments.peer_args),
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            server = Server(f"http://127.0.0.1:{port}", str(folder))
            await healthy(process, server)
            yield server
        except RuntimeError:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace")[-4000:])
            raise
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def healthy(process: asyncio.subprocess.Process, server: Server) -> None:
    """Wait until the peer answers, which leaves no other event to wait for."""
    async with asyncio.timeout(START_TIMEOUT_S), httpx.AsyncClient() as http:
        while True:
            if process.returncode is not None:
                raise RuntimeError(f"transformers serve ended with {process.returncode}")
            try:
                if (await http.get(f"{server.url}/health")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.1)


async def measure(arguments: argparse.Namespace, quantization: str, folder: Path) -> dict[str, Any]:
    """Pairs of turns for each number of clients; the first pair of each warms up and does not count."""
    found: dict[str, Any] = {}
    async with (
        forebay(quantization, max(arguments.clients)) as ours,
        peer(folder, quantization, arguments) as theirs,
        httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None)) as http,
    ):
        turn = 0
        for clients in arguments.clients:
            pairs = []
            for number in range(arguments.pairs + 1):
                order = {"forebay": ours, "peer": theirs} if number % 2 else {"peer": theirs, "forebay": ours}
                pair = {
                    name: asdict(await take_turn(http, server, clients, arguments.tokens, turn))
                    for name, server in order.items()
                }
                turn += 1
                if number:
                    pairs.append(pair)
                    print(f"{quantization} {clients}: {pair}", file=sys.stderr)
            found[str(clients)] = pairs
    return found


def spread(values: list[float], digits: int) -> str:
    """Median, least and most."""
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


def table(found: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown, medians over the pairs with the least and the most."""
    lines = [
        "| weights | clients | Forebay, tokens/s | `transformers serve`, tokens/s | ratio | first token p50, ms, "
        "Forebay | `transformers serve` | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for quantization, by_clients in found.items():
        for clients, pairs in by_clients.items():
            cells = []
            for field, digits in (("tokens_per_s", 1), ("first_ms_p50", 0)):
                ours, theirs = ([pair[name][field] for pair in pairs] for name in ("forebay", "peer"))
                ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
                cells += [spread(ours, digits), spread(theirs, digits), f"**{spread(ratios, 2).replace(' ', '** ', 1)}"]
            lines.append(f"| `{quantization}` | {clients} | {' | '.join(cells)} |")
    return "\n".join(lines)


async def main() -> int:
    """Measure what the arguments name, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", nargs="+", default=["none", "nf4"], choices=PEER_QUANTIZATION)
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--peer-as-shipped", action="store_true", help="leave the peer's threads to spin")
    parser.add_argument("--peer-args", default="", help="more options for `transformers serve`")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    arguments = parser.parse_args()
    folder = ensure_model(InferenceSettings(_env_file=None).default_model, data_dir(), lambda line: None)
    found = {quantization: await measure(arguments, quantization, folder) for quantization in arguments.quantization}
    print(
        f"{platform.processor() or platform.machine()}, {psutil.cpu_count()} cores, {arguments.tokens} tokens, "
        f"{arguments.pairs} pairs of turns\n"
    )
    print(table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
