"""llama.cpp itself, with a tiny model of random weights, whose answers are mostly no UTF-8."""

import asyncio
import random
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from forebay_contracts.wire.errors import ConfigurationError
from forebay_contracts.wire.request import Sampling
from forebay_inference.engine.protocol import TokenRequest
from forebay_inference.engine.served import process as server_process
from forebay_inference.engine.served.engine import ServedEngine
from forebay_inference.engine.served.http import Http, ServerFailed
from forebay_inference.engine.served.process import ServerProcess
from forebay_inference.engine.text.model import TextModel
from forebay_inference.engine.transformers.convert import convert
from support.engine import answer, chat
from support.gguf import write_tiny_gguf, write_tiny_lora
from support.served import llama_cpp_engine

pytestmark = pytest.mark.asyncio(loop_scope="module")

END = 257
CONTEXT = 16_384
PROMPTS = [[7, 8, 9], list(range(30, 90)), [200, 201], [65]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ServedEngine]:
    folder = tmp_path_factory.mktemp("gguf")
    adapters = {name: str(write_tiny_lora(folder / f"{name}.gguf", seed)) for seed, name in enumerate(("red", "blue"))}
    engine = llama_cpp_engine(write_tiny_gguf(folder / "tiny.gguf", context=CONTEXT), slots=2, model_adapters=adapters)
    model = TextModel(engine)
    await model.start(lambda line: None)
    engine.text = model  # type: ignore[attr-defined]
    yield engine
    await model.close()


def text(engine: ServedEngine) -> TextModel:
    found: TextModel = engine.text  # type: ignore[attr-defined]
    return found


async def tokens(engine: ServedEngine, prompt: list[int], count: int = 24, **fields: Any) -> list[int]:
    given = {"sampling": Sampling(temperature=0), "seed": "1", **fields}
    steps = engine.generate(TokenRequest("r", prompt, count, **given))
    return [token async for step in steps for token in step.tokens]


async def asked(engine: ServedEngine, path: str, body: dict[str, Any] | None = None) -> Any:
    assert engine._server._http is not None
    return await engine._server._http.json(path, body)


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
async def test_the_tokens_are_those_that_llama_cpp_gives_itself(engine: ServedEngine, prompt: list[int]) -> None:
    # Not streamed, the server leaves out no token.
    body = {"prompt": prompt, "n_predict": 24, "temperature": 0, "return_tokens": True, "ignore_eos": True}
    assert await tokens(engine, prompt) == (await asked(engine, "/completion", body))["tokens"]


async def test_transformers_gives_the_same_tokens_with_the_same_weights(engine: ServedEngine, tmp_path: Path) -> None:
    convert(Path(engine._settings.default_model), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for prompt in PROMPTS:
        given = torch.tensor([prompt])
        with torch.inference_mode():
            whole = model.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=END,
                pad_token_id=0,
            )
        assert await tokens(engine, prompt, end_tokens=frozenset({END})) == whole[0, len(prompt) :].tolist()


async def test_what_one_adapter_has_computed_serves_no_other(engine: ServedEngine) -> None:
    loaded = await asked(engine, "/lora-adapters")
    assert len(loaded) == 2
    own = {}
    for place, name in enumerate(("red", "blue", "")):
        scales = [{"id": one["id"], "scale": float(one["id"] == place)} for one in loaded]
        body = {"prompt": PROMPTS[1], "n_predict": 12, "temperature": 0, "return_tokens": True, "ignore_eos": True}
        answer = await asked(engine, "/completion", body | {"cache_prompt": False, "lora": scales})
        own[name] = answer["tokens"]
    draw = random.Random(1)
    for _ in range(30):
        # Other prompts push this one out of its slot, into the cache of earlier prompts if there is one.
        name, prompt = draw.choice(list(own)), draw.choice([PROMPTS[1], list(range(100, 180)), [5] * 70])
        found = await tokens(engine, prompt, 12, adapter=name)
        assert prompt != PROMPTS[1] or found == own[name]


async def test_adapters_of_requests_in_one_batch_do_not_mix(engine: ServedEngine) -> None:
    asked = [(name, prompt) for name in ("red", "blue", "") for prompt in PROMPTS]
    alone = [await tokens(engine, prompt, 12, adapter=name) for name, prompt in asked]
    assert await asyncio.gather(*[tokens(engine, prompt, 12, adapter=name) for name, prompt in asked]) == alone


async def test_a_file_that_is_no_adapter_is_named(tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    engine = llama_cpp_engine(model, model_adapters={"red": str(model)})
    with pytest.raises(ConfigurationError, match=f"failed to load lora adapter '{model}'"):
        await engine.start(lambda line: None)
    await engine.close()


async def test_a_repetition_penalty_goes_on_after_a_resume(engine: ServedEngine) -> None:
    sampling = Sampling(temperature=0, repetition_penalty=1.4)
    whole = await tokens(engine, PROMPTS[0], sampling=sampling)
    assert whole != await tokens(engine, PROMPTS[0])
    for kept in (1, 11):
        rest = await tokens(engine, PROMPTS[0], 24 - kept, sampling=sampling, generated=whole[:kept])
        assert whole[:kept] + rest == whole


async def test_a_bias_and_top_k_choose(engine: ServedEngine) -> None:
    assert await tokens(engine, PROMPTS[0], 3, sampling=Sampling(temperature=0, logit_bias={65: 100})) == [65] * 3
    assert await tokens(engine, PROMPTS[0], sampling=Sampling(temperature=5, top_k=1)) == await tokens(
        engine, PROMPTS[0]
    )
    for nothing_but_the_best in ({"top_p": 0.0}, {"min_p": 1.0}):
        sampling = Sampling(temperature=1, **nothing_but_the_best)
        assert await tokens(engine, PROMPTS[0], sampling=sampling) == await tokens(engine, PROMPTS[0])


async def test_an_answer_follows_its_schema(engine: ServedEngine) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["é", "漢字 🙂"]}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    found = await answer(text(engine), chat("hi", response_format=wanted, temperature=1.0))
    assert found.text in ('{"a": "é"}', '{"a": "漢字 🙂"}')
    assert found.finish_reason == "stop"


@pytest.mark.parametrize("adapter", ["", "red"])
async def test_the_probability_of_a_part_of_a_character_is_told_too(engine: ServedEngine, adapter: str) -> None:
    sampling = Sampling(temperature=0, logprobs=2)
    asking = engine.generate(TokenRequest("r", PROMPTS[1], 24, sampling, adapter=adapter))
    steps = [step async for step in asking]
    assert any(len(step.tokens) > 1 for step in steps)
    for step in steps:
        assert [entry.token for entry in step.logprobs] == list(step.tokens)
        for entry in step.logprobs:
            assert entry.top[0] == (entry.token, pytest.approx(entry.logprob))


async def test_a_generator_that_is_closed_frees_its_slot(engine: ServedEngine) -> None:
    before = await made(engine)
    running = engine.generate(TokenRequest("r", PROMPTS[0], CONTEXT - 10, Sampling(temperature=0)))
    await anext(running)
    await running.aclose()
    async with asyncio.timeout(30):
        while any(slot["is_processing"] for slot in await asked(engine, "/slots")):  # noqa: ASYNC110
            await asyncio.sleep(0.002)
    # It notices when it writes the next token or two: on a busy machine thousands later, at less than 1 ms each.
    assert await made(engine) < before + CONTEXT - 1000


async def made(engine: ServedEngine) -> int:
    assert engine._server._http is not None
    return (await engine._dialect.load(engine._server._http)).steps


async def test_a_key_of_its_own_guards_the_server(engine: ServedEngine) -> None:
    assert engine._server._http is not None
    stranger = Http(engine._server._http.url)
    with pytest.raises(ServerFailed, match="401"):
        await stranger.json("/completion", {"prompt": [1], "n_predict": 1})
    await stranger.close()


async def test_a_server_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_process, "_END_S", 0.1)
    process = ServerProcess("deaf")
    await process.start(["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done"], {})
    async with asyncio.timeout(30):
        while not process.last_lines:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await process.close()
    assert process._process is not None
    assert process._process.returncode == -signal.SIGKILL
    assert process.fault is None


async def test_a_server_dies_with_its_worker() -> None:
    program = (
        "import asyncio, os, signal\n"
        "from forebay_inference.engine.served.process import ServerProcess\n"
        "async def main():\n"
        "    process = ServerProcess('s')\n"
        "    await process.start(['sh', '-c', 'echo $$; exec sleep 60'], {})\n"
        "    while not process.last_lines: await asyncio.sleep(0.01)\n"
        "    print(process.last_lines[0], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    worker = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    told, _ = await worker.communicate()
    assert worker.returncode == -signal.SIGKILL
    async with asyncio.timeout(30):
        while psutil.pid_exists(int(told)):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
