"""The real vLLM beside a worker, in the whole stack. `make test-vllm` installs it and runs this."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from forebay_contracts.settings import InferenceSettings
from forebay_inference.engine.served.metrics import samples
from forebay_inference.engine.text.model import TextModel
from forebay_inference.engine.transformers.engine import TransformersEngine
from support import vllm
from support.engine import answer, chat
from support.lora import write_lora
from support.nats import NatsServer
from support.near_ties import Step, same_or_near_tie
from support.stack import MODEL, Stack, running

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]

QUESTIONS = ("What is the capital of France?", "Write three sentences about the sea.", "Count from one to ten.")
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "logprobs": True, "top_logprobs": 5}
SLOTS = 8
ADAPTERS = ("red", "blue")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(
    start_nats: Callable[[Path], AbstractContextManager[NatsServer]], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stack]:
    """An api, and a worker that has started a vLLM with bf16 weights."""
    folder = tmp_path_factory.mktemp("lora")
    adapters = ",".join(f"{name}={write_lora(folder / name, seed)}" for seed, name in enumerate(ADAPTERS))
    with start_nats(tmp_path_factory.mktemp("nats")) as nats:
        settings = vllm.settings("--dtype=bfloat16", model_adapters=adapters, max_concurrent_requests=SLOTS)
        async with running(nats, workers=0, request_timeout=600, **settings) as started:
            await started.worker(within_s=vllm.START_S)
            await started.knows_workers()
            yield started


def server_of(stack: Stack) -> psutil.Process:
    """The vLLM of the worker."""
    below = psutil.Process(stack.workers[0].pid).children(recursive=True)
    return next(one for one in below if "--served-model-name" in one.cmdline())


def url_of(server: psutil.Process) -> str:
    words = server.cmdline()
    return f"http://127.0.0.1:{words[words.index('--port') + 1]}"


def steps(choice: Any) -> list[Step]:
    content = choice["logprobs"]["content"]
    return [Step(one["token"], {top["token"]: top["logprob"] for top in one["top_logprobs"]}) for one in content]


async def own(stack: Stack, question: str, **fields: Any) -> tuple[list[Step], int]:
    """What vLLM answers itself, and how many tokens its prompt has."""
    body = {"messages": [{"role": "user", "content": question}], **GREEDY, **fields}
    server = server_of(stack)
    key = {"Authorization": f"Bearer {server.environ()['VLLM_API_KEY']}"}
    direct = (await stack.http.post(f"{url_of(server)}/v1/chat/completions", json=body, headers=key)).json()
    (choice,) = direct["choices"]
    # It tells of the end token too.
    found = steps(choice)[:-1] if choice["finish_reason"] == "stop" else steps(choice)
    return found, direct["usage"]["prompt_tokens"]


@pytest.mark.parametrize("question", QUESTIONS)
async def test_a_greedy_answer_is_vllm_s_own(stack: Stack, question: str) -> None:
    through = (await stack.chat(question, **GREEDY)).json()
    found, prompt_tokens = await own(stack, question)
    assert same_or_near_tie(steps(through["choices"][0]), found)
    assert through["usage"]["prompt_tokens"] == prompt_tokens
    assert len(through["choices"][0]["logprobs"]["content"]) > 3


async def test_an_adapter_s_answer_is_vllm_s_own(stack: Stack) -> None:
    names = [MODEL, *(f"{MODEL}:{name}" for name in ADAPTERS)]
    together = await asyncio.gather(*(stack.chat(QUESTIONS[0], model=name, **GREEDY) for name in names))
    alone = [(await own(stack, QUESTIONS[0], **fields))[0] for fields in ({}, *({"model": name} for name in ADAPTERS))]
    for answer_of, name, found in zip(together, names, alone, strict=True):
        through = answer_of.json()
        assert through["model"] == f"HuggingFaceTB/{name}"
        assert same_or_near_tie(steps(through["choices"][0]), found)
    assert len({tuple(step.token for step in found) for found in alone}) == len(names)
    assert (await stack.chat(QUESTIONS[0], model=f"{MODEL}:green")).status_code == 404


async def test_a_greedy_answer_is_the_transformers_engine_s(stack: Stack) -> None:
    settings = InferenceSettings(
        _env_file=None, data_dir=vllm.DATA_DIR, model_quantization="none", model_device="cpu", llm_batch_size=64
    )
    model = TextModel(TransformersEngine(settings))
    await model.start(lambda line: None)
    for question in QUESTIONS:
        through = steps((await stack.chat(question, **GREEDY)).json()["choices"][0])
        own = await answer(model, chat(question, max_tokens=40, logprobs=5))
        assert same_or_near_tie(
            through, [Step(one.text, {top.text: top.logprob for top in one.top}) for one in own.logprobs]
        )
    await model.close()


async def test_an_answer_keeps_to_its_schema(stack: Stack) -> None:
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "people": {"type": "integer", "minimum": 0, "maximum": 99_999_999},
        },
        "required": ["city", "people"],
    }
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    found = await asyncio.gather(
        *(stack.chat(one, response_format=form, temperature=0, max_tokens=200) for one in QUESTIONS)
    )
    for one in found:
        value = json.loads(one.json()["choices"][0]["message"]["content"])
        assert set(value) == {"city", "people"}


async def test_leaving_an_answer_frees_its_place_in_the_batch(stack: Stack) -> None:
    url = url_of(server_of(stack))
    names = ("vllm:num_requests_running", "vllm:generation_tokens_total")

    async def now() -> tuple[float, float]:
        found = samples((await stack.http.get(f"{url}/metrics")).content, names)
        return found[names[0]][0], found[names[1]][0]

    _, before = await now()
    body = {"model": MODEL, "messages": [{"role": "user", "content": QUESTIONS[1]}], "stream": True}
    request = stack.http.stream("POST", f"{stack.apis[0].url}/v1/chat/completions", json=body | {"ignore_eos": True})
    async with request as response:
        lines = response.aiter_lines()
        received = 0
        while received < 10:
            received += '"content"' in await anext(lines)
        await response.aclose()
    async with asyncio.timeout(10):
        while (await now())[0]:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    _, made = await now()
    # Some were on their way, of an answer of 8,000.
    assert made - before < 60


async def test_a_killed_vllm_ends_its_worker_and_another_engine_takes_over(stack: Stack) -> None:
    whole = (await stack.chat(QUESTIONS[1], **GREEDY | {"max_tokens": 120, "ignore_eos": True})).json()["choices"][0]
    sdk = stack.openai(timeout=600)
    messages: Any = [{"role": "user", "content": QUESTIONS[1]}]
    asked: dict[str, Any] = {"model": MODEL, "messages": messages, "stream": True, "max_tokens": 120}
    greedy = await sdk.chat.completions.create(
        **asked, temperature=0, logprobs=True, top_logprobs=5, extra_body={"ignore_eos": True}
    )
    seeded = await sdk.chat.completions.create(**asked, temperature=1, seed=3, extra_body={"ignore_eos": True})

    found: list[Step] = []
    await _tokens(seeded, 5)
    await _tokens(greedy, 10, found)
    server_of(stack).send_signal(signal.SIGKILL)
    async with asyncio.timeout(60):
        assert await stack.workers[0].ended() == 1
    assert any("SIGKILL" in line for line in stack.workers[0].log)

    await stack.worker(
        inference_engine="transformers",
        engine_command="",
        engine_python="",
        model_adapters="",
        model_quantization="none",
        within_s=120,
    )
    # The engine of Transformers goes on with what vLLM would not, by draws of its own.
    await _tokens(greedy, 120, found)
    assert [chunk.choices[0].finish_reason async for chunk in seeded][-1] == "length"
    assert len(found) == 120
    assert same_or_near_tie(found, steps(whole))


async def _tokens(stream: Any, count: int, into: list[Step] | None = None) -> None:
    """Read until so many pieces of text or, of an answer with logprobs, tokens have come, or the end."""
    found = [] if into is None else into
    while len(found) < count:
        try:
            chunk = await anext(stream)
        except StopAsyncIteration:
            return
        choice = chunk.choices[0]
        if into is None:
            found.append(Step("", {}))
        elif choice.logprobs is not None:
            found += steps(choice.model_dump())
