"""What a GPU does: right answers, tokens a second, and memory beside the plan. `make test-gpu` runs it.

    python tests/gpu/run.py [--model MODEL] [--device cuda:0] [--quantization none nf4] [--clients 1 8 32]

For each quantization: greedy answers of the batch beside those of the library's `generate`; seeds, log probabilities
and a grammar alone and in the batch; the memory that the plan predicts beside what was taken; and tokens a second. Then
the speed of `transformers serve --continuous-batching` and of vLLM, where they are installed, on the same weights.
Each part is a table in Markdown. Exit code 1: an answer is wrong. `--device cpu` runs the same without a GPU.
"""

import argparse
import asyncio
import contextlib
import gc
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx
import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import Background, free_port
from benchmarks.tokens import Server, bare_turn, turn
from forebay_contracts.settings import InferenceSettings
from forebay_contracts.sizing.gpu_memory import (
    PAGE_TOKENS,
    SPARE_PAGES,
    kv_bytes_per_token,
    pass_bytes,
    weights_bytes,
)
from forebay_contracts.sizing.model_shape import of_folder
from forebay_contracts.wire.request import Sampling
from forebay_inference.engine.protocol import LoadedModel, Step, TokenRequest
from forebay_inference.engine.text.model import TextModel
from forebay_inference.engine.transformers import gpu, loading
from forebay_inference.engine.transformers.engine import TransformersEngine
from forebay_inference.models.store import ensure_model

TOLERANCE = 0.5
"""Nats by which a token may be less likely than the one that `generate` took: rounding in bf16 moves it by 0.2."""

QUESTIONS = (
    "What is the capital of France?",
    "Write a long story about a fox.",
    "List the numbers from one to thirty.",
    "Explain how a queue works. " + "A queue is a line of those who wait. " * 40,
)
MIB = 1 << 20


@dataclass
class Report:
    """How many answers were wrong, and when no further part begins (`time.monotonic`)."""

    ends_at: float
    wrong: int = 0

    def table(self, title: str, *rows: Sequence[object]) -> None:
        """Print a table; the first of `rows` is its head."""
        print(f"\n### {title}\n")
        for place, row in enumerate(rows):
            print("| " + " | ".join(map(str, row)) + " |")
            if not place:
                print("|" + " --- |" * len(row))
        sys.stdout.flush()

    def check(self, *, good: bool) -> str:
        """`ok` or `WRONG`, counted."""
        self.wrong += not good
        return "ok" if good else "WRONG"

    def too_late(self, what: str) -> bool:
        """Whether the time is over; says so."""
        if late := time.monotonic() > self.ends_at:
            print(f"\nleft out for lack of time: {what}")
        return late


def generated(folder: Path, quantization: str, device: str, prompts: list[list[int]], count: int) -> list[Any]:
    """For each prompt what the library's `generate` answers, and its log probabilities: ids, [tokens, vocabulary]."""
    config = loading._read_config(folder)
    _, settings = loading._resolve_quantization(quantization, config, torch.device(device))
    options = {} if settings is None else {"quantization_config": settings}
    dtype = loading._dtype(torch.device(device))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device}, **options).eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logprobs = torch.cat(output.logits).float().log_softmax(-1).cpu()
        found.append((output.sequences[0, len(prompt) :].tolist(), logprobs))
    del model
    give_back(device)
    return found


def give_back(device: str) -> None:
    """Return the memory of what is no longer used."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


async def answer(engine: TransformersEngine, request: TokenRequest) -> list[Step]:
    """All steps of one sequence."""
    return [step async for step in engine.generate(request)]


def tokens_of(steps: list[Step]) -> list[int]:
    """The tokens of `steps`."""
    return [token for step in steps for token in step.tokens]


async def correctness(
    engine: TransformersEngine, loaded: LoadedModel, prompts: list[list[int]], expected: list[Any], report: Report
) -> None:
    """All prompts at once in the batch, beside what `generate` answered; then what each request asks by itself."""
    asked = [
        TokenRequest(str(number), prompt, len(right[0]), Sampling(temperature=0), end_tokens=loaded.end_tokens)
        for number, (prompt, right) in enumerate(zip(prompts, expected, strict=True))
    ]
    found = [tokens_of(steps) for steps in await asyncio.gather(*(answer(engine, one) for one in asked))]
    rows: list[Sequence[object]] = [("prompt", "equal tokens", "then less likely by, nats", "")]
    for prompt, mine, (right, logprobs) in zip(prompts, found, expected, strict=True):
        equal = next((at for at, pair in enumerate(zip(mine, right, strict=False)) if pair[0] != pair[1]), None)
        gap = 0.0 if equal is None else float(logprobs[equal, right[equal]] - logprobs[equal, mine[equal]])
        shown = len(mine) if equal is None else equal
        rows.append(
            (f"{len(prompt)} tokens", f"{shown} of {len(right)}", f"{gap:.3f}", report.check(good=gap <= TOLERANCE))
        )
    report.table("greedy, beside `generate`", *rows)

    grammar = loaded.compile('start: "{" /[a-z]{3,12}/ "}"')
    each = {
        "seed, top-p, penalties": {"sampling": Sampling(top_p=0.9, frequency_penalty=0.3, repetition_penalty=1.1)},
        "log probabilities": {"sampling": Sampling(temperature=0, logprobs=3)},
        "grammar": {"sampling": Sampling(), "grammar": grammar},
    }
    requests = {
        name: TokenRequest(name, prompts[0], 24, seed="7", end_tokens=loaded.end_tokens, **fields)
        for name, fields in each.items()
    }
    alone = {name: await answer(engine, request) for name, request in requests.items()}
    together = await asyncio.gather(*(answer(engine, one) for one in [*requests.values(), *asked, *asked]))
    rows = [("request", "same alone and among others", "")]
    for name, steps in zip(requests, together, strict=False):
        same = sum(a == b for a, b in zip(tokens_of(alone[name]), tokens_of(steps), strict=False))
        good = {
            "grammar": loaded.tokenizer.decode(tokens_of(steps)).startswith("{"),
            "log probabilities": all(step.logprobs and len(step.logprobs[0].top) == 3 for step in steps if step.tokens),
        }.get(name, bool(tokens_of(steps)))
        # Among others, rounding may decide otherwise between two tokens; what was asked for must hold all the same.
        rows.append((name, f"{same} of {len(tokens_of(alone[name]))} tokens", report.check(good=good)))
    report.table("each request by its own parameters", *rows)


def memory(engine: TransformersEngine, folder: Path, settings: InferenceSettings, device: str, report: Report) -> None:
    """What the plan says beside what was taken."""
    assert engine._batch is not None
    manager = engine._batch._manager
    model, processor = manager.model, manager.batch_processor
    shape = of_folder(folder.name, folder)
    flash = device != "cpu" and gpu.has_flash(model)
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            tensors[state.absmax.data_ptr()] = state.absmax.nbytes
    cache = processor.cache.cache_tensor.nbytes
    planned_cache = (engine._batch.cache.tokens + SPARE_PAGES * engine._batch.cache.page_size) * kv_bytes_per_token(
        shape
    )
    rows: list[Sequence[object]] = [("memory, MiB", "planned", "measured")]
    if device != "cpu":  # there they lie in the layout of its kernels
        rows.append(("weights", weights_bytes(shape, settings.model_quantization) // MIB, sum(tensors.values()) // MIB))
    rows.append(("KV cache", planned_cache // MIB, cache // MIB))
    if device != "cpu":
        one_pass = pass_bytes(shape, settings.llm_batch_size, PAGE_TOKENS, flash=flash)
        spent = torch.cuda.max_memory_allocated() - sum(tensors.values()) - cache
        rows.append(("a pass, at most (the rest of the 20 % is free)", one_pass // MIB, spent // MIB))
    report.table(f"memory ({'flash attention' if flash else 'attention under a mask'})", *rows)


@contextlib.asynccontextmanager
async def started(settings: InferenceSettings) -> AsyncIterator[tuple[TransformersEngine, TextModel, LoadedModel]]:
    """An engine, its model with the text layer, and what was loaded."""
    engine = TransformersEngine(settings)
    text = TextModel(engine)
    kept: list[LoadedModel] = []
    start = engine.start

    async def start_and_keep(progress: Callable[[str], None]) -> LoadedModel:
        kept.append(await start(progress))
        return kept[0]

    engine.start = start_and_keep  # type: ignore[method-assign]
    await text.start(lambda line: print(f"  {line}", flush=True))
    try:
        yield engine, text, kept[0]
    finally:
        await text.close()


async def of_quantization(quantization: str, folder: Path, arguments: argparse.Namespace, report: Report) -> None:
    """All parts for one quantization."""
    print(f"\n## {quantization} on {arguments.device}", flush=True)
    clients = max(arguments.clients)
    settings = InferenceSettings(
        _env_file=None,
        default_model=arguments.model,
        data_dir=arguments.data_dir,
        model_quantization=quantization,
        model_device=arguments.device,
        max_concurrent_requests=clients,
        llm_batch_size=max(256, clients),
    )
    tokenizer = loading.AutoTokenizer.from_pretrained(folder)
    prompts = [
        list(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
            )
        )
        for question in QUESTIONS
    ]
    expected = await asyncio.to_thread(generated, folder, quantization, arguments.device, prompts, arguments.tokens)
    async with started(settings) as (engine, text, loaded):
        await correctness(engine, loaded, prompts, expected, report)
        rows: list[Sequence[object]] = [("clients", "tokens/s", "first token p50, ms", "between tokens p50, ms")]
        for count in arguments.clients:
            if report.too_late(f"{count} clients"):
                break
            await bare_turn(text, count, 8, 1000 + count)
            rows.append(_row(count, await bare_turn(text, count, arguments.tokens, count)))
        report.table(f"speed of the engine, {quantization}", *rows)
        memory(engine, folder, settings, arguments.device, report)
    del engine, text
    give_back(arguments.device)


def _row(clients: int, figures: dict[str, float]) -> tuple[object, ...]:
    names = [name for name in figures if name != "tokens_per_s"]
    return (clients, f"{figures['tokens_per_s']:.0f}", *(f"{figures[name]:.1f}" for name in names[:2]))


def peers(folder: Path, device: str, vllm: str | None) -> dict[str, Callable[[int], tuple[list[str], str]]]:
    """How to start each server that can be had: its command for a port, and what it calls the model."""
    binary = Path(sys.executable).parent / "transformers"
    found: dict[str, Callable[[int], tuple[list[str], str]]] = {}
    if binary.exists():
        serve = [str(binary), "serve", str(folder), "--dtype", "bfloat16", "--device", device.partition(":")[0]]
        found["transformers serve --continuous-batching"] = lambda port: (
            [*serve, "--continuous-batching", "--host", "127.0.0.1", "--port", str(port)],
            str(folder),
        )
    # The folder tests/vllm could be imported as a package without a file.
    installed = (spec := importlib.util.find_spec("vllm")) is not None and spec.origin is not None
    python = vllm or (sys.executable if installed else None)
    if python is not None:
        module = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", "bfloat16"]
        limits = ["--max-model-len", "4096", "--host", "127.0.0.1"]
        found["vLLM"] = lambda port: ([*module, *limits, "--port", str(port)], str(folder))
    return found


async def beside(folder: Path, arguments: argparse.Namespace, report: Report) -> None:
    """The speed of other servers on the same weights in bf16, over HTTP."""
    rows: list[Sequence[object]] = [("server", "clients", "tokens/s", "first token p50, ms", "between tokens p50, ms")]
    for name, command_of in peers(folder, arguments.device, arguments.vllm).items():
        if report.too_late(name):
            continue
        command, model = command_of(port := free_port())
        server = Server(f"http://127.0.0.1:{port}", model)
        try:
            async with asyncio.timeout(max(30.0, report.ends_at - time.monotonic())):
                with Background(name, command, {"HF_HUB_OFFLINE": "1"}) as background:
                    await asyncio.to_thread(background.wait_for_port, port)
                    async with httpx.AsyncClient(timeout=300) as http:
                        await turn(http, server, 2, 8, 5000)
                        for count in arguments.clients:
                            await turn(http, server, count, 8, 6000 + count)
                            rows.append((name, *_row(count, await turn(http, server, count, arguments.tokens, count))))
        except Exception as exc:  # a peer that does not run leaves the rest of the report
            reason = " ".join(str(exc).split())[:200]
            rows.append((name, "-", f"{type(exc).__name__}: {reason}", "", ""))
    if len(rows) > 1:
        report.table("others on the same weights, bf16, over HTTP", *rows)


def machine(device: str) -> str:
    """What it runs on."""
    if device == "cpu":
        return f"CPU, torch {torch.__version__}"
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.split("\n")[0]
    card = torch.cuda.get_device_properties(torch.device(device))
    return f"{card.name}, {card.total_memory / (1 << 30):.0f} GiB, driver {driver}, torch {torch.__version__}"


def main() -> int:
    """Run what the arguments name; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=InferenceSettings.model_fields["default_model"].default)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quantization", nargs="+", default=["none", "nf4"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--minutes", type=float, default=9.0, help="No part begins later.")
    parser.add_argument("--vllm", help="The Python of the environment that vLLM is in.")
    parser.add_argument("--no-peers", action="store_true")
    cache = Path(os.environ.get("DATA_DIR") or Path.home() / ".cache" / "forebay")
    parser.add_argument("--data-dir", type=Path, default=cache)
    arguments = parser.parse_args()
    if arguments.device != "cpu" and not torch.cuda.is_available():
        print("no CUDA device: --device cpu runs the same script on the CPU", file=sys.stderr)
        return 2
    report = Report(ends_at=time.monotonic() + 60 * arguments.minutes)
    print(f"# {arguments.model} on {machine(arguments.device)}", flush=True)
    folder = ensure_model(arguments.model, arguments.data_dir, lambda line: print(f"  {line}", flush=True))
    for quantization in arguments.quantization:
        if not report.too_late(quantization):
            asyncio.run(of_quantization(quantization, folder, arguments, report))
    if not arguments.no_peers:
        asyncio.run(beside(folder, arguments, report))
    print(f"\n{report.wrong} wrong" if report.wrong else "\nall answers are right")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
