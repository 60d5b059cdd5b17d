"""Tokens a second and time to first token of the real engine, beside the library's own continuous batching.

    python tests/benchmarks/bench_engine.py [--quantization none nf4] [--clients 1 8 16] [--busy 0 2] [--tokens 48]

They take turns, each in a process of its own, alone and beside busy processes. The library runs as `transformers serve
--continuous-batching` would have it, less its HTTP: same model, same prompts, greedy. It runs twice: with threads that
yield, and, where nothing else is busy, with threads as shipped, which spin: beside two busy processes they gave 2
tokens a second. A ratio is of the two turns of one round.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from forebay_contracts.settings import InferenceSettings
from forebay_contracts.wire.request import CompletionType, InferenceRequest, Sampling
from forebay_inference.engine.events import Tokens
from forebay_inference.engine.text.model import TextModel
from forebay_inference.engine.transformers.engine import TransformersEngine
from forebay_inference.models.store import ensure_model

ANIMALS = ("cat", "dog", "fox", "hen", "cow", "pig", "bee", "ant")


def prompt(client: int, turn: int) -> str:
    """A question of its own for each client of each turn, so that none is found in a cache; its answer is long."""
    return f"{turn}.{client}: write a long story about a {ANIMALS[client % len(ANIMALS)]}."


def chat(text: str, **sampling: Any) -> InferenceRequest:
    """A request as a worker gives it to its engine, greedy."""
    return InferenceRequest(
        id=str(uuid.uuid4()),
        completion_type=CompletionType.CHAT,
        model="m",
        created_at=0,
        deadline=0,
        reply_to="",
        messages=({"role": "user", "content": text},),
        sampling=Sampling(temperature=0, **sampling),
    )


async def ours(engine: TextModel, clients: int, tokens: int, turn: int) -> tuple[float, float]:
    """Tokens a second over all clients, and the median time to the first token in ms."""
    first: list[float] = []

    async def one(client: int) -> int:
        request = chat(prompt(client, turn), max_tokens=tokens, ignore_eos=True)
        started, count = time.perf_counter(), 0
        async for event in engine.generate(request, {}):
            if isinstance(event, Tokens):
                if not count:
                    first.append(time.perf_counter() - started)
                count += len(event.token_ids)
        return count

    started = time.perf_counter()
    total = sum(await asyncio.gather(*(one(client) for client in range(clients))))
    return total / (time.perf_counter() - started), 1000 * statistics.median(first)


def library(manager: Any, tokenizer: Any, clients: int, tokens: int, turn: int) -> tuple[float, float]:
    """The same of the library alone."""
    started = time.perf_counter()
    first: dict[str, float] = {}
    for client in range(clients):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt(client, turn)}], add_generation_prompt=True, return_dict=False
        )
        manager.add_request(ids, max_new_tokens=tokens, streaming=True, eos_token_id=-1)
    done = total = 0
    while done < clients:
        output = manager.get_result(timeout=10)
        if output is None:
            raise RuntimeError("the library gave no result within 10 s")
        first.setdefault(output.request_id, time.perf_counter() - started)
        if output.is_finished():
            done, total = done + 1, total + len(output.generated_tokens)
    return total / (time.perf_counter() - started), 1000 * statistics.median(first.values())


def start_library(folder: Path, quantization: str) -> tuple[Any, Any]:
    """The library's manager as its server makes it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, ContinuousBatchingConfig

    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": "cpu"}}
    if quantization != "none":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quantization, bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    model.generation_config.do_sample = False
    manager = model.init_continuous_batching(
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256)
    )
    manager.start()
    return manager, AutoTokenizer.from_pretrained(folder)


def serve_ours(pipe: Connection, quantization: str, slots: int, data_dir: Path) -> None:
    """A process with the engine: it answers the arguments of `ours` with its result, until None."""

    async def serve() -> None:
        settings = InferenceSettings(
            _env_file=None, model_quantization=quantization, max_concurrent_requests=slots, data_dir=data_dir
        )
        engine = TextModel(TransformersEngine(settings))
        await engine.start(lambda line: None)
        pipe.send("ready")
        while (asked := await asyncio.to_thread(pipe.recv)) is not None:
            pipe.send(await ours(engine, *asked))
        await engine.close()

    asyncio.run(serve())


def serve_library(pipe: Connection, quantization: str, slots: int, data_dir: Path) -> None:
    """The same with the library alone."""
    settings = InferenceSettings(_env_file=None)
    manager, tokenizer = start_library(ensure_model(settings.default_model, data_dir, lambda line: None), quantization)
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        pipe.send(library(manager, tokenizer, *asked))
    manager.stop()


SIDES: dict[str, tuple[Any, dict[str, str]]] = {
    "forebay": (serve_ours, {}),
    "library": (serve_library, {"GOMP_SPINCOUNT": "300000"}),  # what libgomp does with neither variable
    "library, threads yield": (serve_library, {"OMP_WAIT_POLICY": "PASSIVE"}),
}


@contextlib.contextmanager
def sides(quantization: str, slots: int, data_dir: Path) -> Iterator[dict[str, Connection]]:
    """A process for each of SIDES, ready."""
    spawn, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    before = dict(os.environ)
    for name, (serve, env) in SIDES.items():
        pipes[name], theirs = spawn.Pipe()
        # How threads wait is read when torch is loaded. This process has set it for itself.
        for variable in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
            os.environ.pop(variable, None)
        os.environ |= env
        processes.append(spawn.Process(target=serve, args=(theirs, quantization, slots, data_dir)))
        processes[-1].start()
        os.environ |= before
    try:
        for pipe in pipes.values():
            pipe.recv()
        yield pipes
    finally:
        for pipe, process in zip(pipes.values(), processes, strict=True):
            pipe.send(None)
            process.join(30)
            process.kill()


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """`count` processes that want a CPU each."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(arguments: argparse.Namespace, quantization: str) -> None:
    """Print one line for each side, number of clients and number of busy processes."""
    number = 0
    with sides(quantization, max(arguments.clients), arguments.data_dir) as pipes:
        for busy in arguments.busy:
            for clients in arguments.clients:
                rows: dict[str, list[tuple[float, float]]] = {
                    name: [] for name in pipes if not busy or name != "library"
                }
                with busy_processes(busy):
                    for _ in range(arguments.rounds + 1):
                        number += 1
                        for name, turns in rows.items():
                            pipes[name].send((clients, arguments.tokens, number))
                            turns.append(pipes[name].recv())
                for name, turns in rows.items():
                    speeds, waits = zip(*turns[1:], strict=True)
                    ratio = [mine[0] / theirs[0] for mine, theirs in zip(rows["forebay"][1:], turns[1:], strict=True)]
                    print(
                        f"{quantization:5} {busy} busy {clients:2} clients {name:22} "
                        f"{statistics.median(speeds):6.1f} ({min(speeds):.1f} to {max(speeds):.1f}) tokens/s, "
                        f"first {statistics.median(waits):5.0f} ms; Forebay's tokens/s ÷ "
                        f"{statistics.median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f})",
                        flush=True,
                    )


def main() -> None:
    """Measure what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", nargs="+", default=["none", "nf4"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--data-dir", type=Path, default=Path(os.environ.get("DATA_DIR") or Path.home() / ".cache" / "forebay")
    )
    arguments = parser.parse_args()
    for quantization in arguments.quantization:
        measure(arguments, quantization)


if __name__ == "__main__":
    main()
