"""Tokens a second and time to first token of the real engine, beside the library's own continuous batching.

    python tests/benchmarks/bench_engine.py [--quantization none nf4] [--clients 1 8] [--tokens 48] [--rounds 3]

The two take turns in one process, so that whatever else the machine does hits both. The library runs as
`transformers serve --continuous-batching` would have it, less its HTTP: same model, same prompts, greedy.
"""

import argparse
import asyncio
import os
import statistics
import time
import uuid
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


async def measure(arguments: argparse.Namespace, quantization: str) -> None:
    """Print one line a number of clients."""
    settings = InferenceSettings(
        model_quantization=quantization, max_concurrent_requests=max(arguments.clients), data_dir=arguments.data_dir
    )
    engine = TextModel(TransformersEngine(settings))
    await engine.start(lambda line: None)
    folder = ensure_model(settings.default_model, settings.data_dir, lambda line: None)
    manager, tokenizer = await asyncio.to_thread(start_library, folder, quantization)
    for clients in arguments.clients:
        rows = []
        for turn in range(arguments.rounds + 1):
            mine = await ours(engine, clients, arguments.tokens, turn)
            theirs = await asyncio.to_thread(library, manager, tokenizer, clients, arguments.tokens, turn)
            rows.append((*mine, *theirs))
        speed, wait, their_speed, their_wait = (statistics.median(column) for column in zip(*rows[1:], strict=True))
        print(
            f"{quantization:5} {clients:2} clients: {speed:6.1f} tokens/s, first {wait:5.0f} ms; "
            f"library {their_speed:6.1f} tokens/s, first {their_wait:5.0f} ms; "
            f"ratio {speed / their_speed:.2f} tokens/s, {wait / their_wait:.2f} first"
        )
    await asyncio.to_thread(manager.stop)
    await engine.close()


def main() -> None:
    """Measure what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", nargs="+", default=["none", "nf4"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--data-dir", type=Path, default=Path(os.environ.get("DATA_DIR") or Path.home() / ".cache" / "forebay")
    )
    arguments = parser.parse_args()
    for quantization in arguments.quantization:
        asyncio.run(measure(arguments, quantization))


if __name__ == "__main__":
    main()
