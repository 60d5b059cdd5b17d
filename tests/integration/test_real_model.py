"""The default model in NF4 through the whole system, asked by the OpenAI SDK. The first run fetches and converts it."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai.types.chat import ChatCompletion

from forebay_contracts.wire.state import RequestStatus
from support.answers import user
from support.nats import NatsServer
from support.near_ties import Step, same_or_near_tie
from support.stack import MODEL, Stack, data_dir, running
from support.view import idle

pytestmark = [pytest.mark.model, pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="module")]

CAPITAL = "What is the capital of France?"
SERVES = re.compile(r"worker \S+ serves (.*)")
LIMIT = 16
QUESTIONS = [
    CAPITAL,
    "What color is the sky on a clear day?",
    "How many days are in a week?",
    "Write one sentence about the sea.",
]


@pytest.fixture(scope="module")
def model_dir() -> Path:
    """Read when the module starts: a test's own environment has no DATA_DIR."""
    return data_dir()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(module_nats: NatsServer, model_dir: Path) -> AsyncIterator[Stack]:
    settings: dict[str, Any] = {
        "inference_engine": "transformers",
        "model_quantization": "nf4",
        "max_concurrent_requests": 3,
        "request_timeout": 300,
        "data_dir": model_dir,
    }
    async with running(module_nats, workers=0, **settings) as found:
        worker = await found.worker(within_s=500)  # what a first run takes
        served = await worker.logged(SERVES)
        assert served[1] == "HuggingFaceTB/SmolLM2-135M-Instruct (nf4, cpu) with 3 slots"
        yield found
        assert not [line for line in worker.log if "ERROR" in line or "Traceback" in line]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(stack: Stack) -> openai.AsyncOpenAI:
    return stack.openai(timeout=300)


async def ask(client: openai.AsyncOpenAI, question: str, **options: Any) -> ChatCompletion:
    answer = await client.chat.completions.create(
        model=MODEL, messages=user(question), **{"temperature": 0, "max_tokens": LIMIT, **options}
    )
    assert isinstance(answer, ChatCompletion)
    return answer


async def into_cache(client: openai.AsyncOpenAI, *questions: str) -> None:
    """Have these prompts computed in one way from here on: one from the cache rounds differently at near ties."""
    await asyncio.gather(*(ask(client, question, max_tokens=1) for question in questions))


def steps_of(logprobs: Any) -> list[Step]:
    """Of a choice, or of its part in a chunk."""
    return [Step(one.token, {top.token: top.logprob for top in one.top_logprobs}) for one in logprobs.content]


async def stream(client: openai.AsyncOpenAI, question: str, **options: Any) -> tuple[list[str], str | None, Any]:
    """Pieces of text, finish reason and usage."""
    chunks = await client.chat.completions.create(
        model=MODEL,
        messages=user(question),
        stream=True,
        stream_options={"include_usage": True},
        **{"temperature": 0, "max_tokens": LIMIT, **options},
    )
    pieces, reason, usage = [], None, None
    async for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces += [choice.delta.content] if choice.delta.content else []
            reason = choice.finish_reason or reason
    return pieces, reason, usage


async def test_factual_question(client: openai.AsyncOpenAI, stack: Stack) -> None:
    answer = await ask(client, CAPITAL)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert (answer.choices[0].finish_reason == "length") == (answer.usage.completion_tokens == LIMIT)
    # The template adds a system message and its marks to the question's seven tokens.
    assert 20 < answer.usage.prompt_tokens < 60
    assert 3 < answer.usage.completion_tokens <= LIMIT
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    state = await stack.reaches(answer.id.removeprefix("chatcmpl-"), RequestStatus.COMPLETED)
    assert state.usage is not None
    assert state.usage.completion_tokens == answer.usage.completion_tokens


async def test_stream_says_the_same(client: openai.AsyncOpenAI) -> None:
    questions = (CAPITAL, "Write three words with ü, é and 漢.")
    await into_cache(client, *questions)
    for question in questions:
        whole = await ask(client, question)
        pieces, reason, usage = await stream(client, question)
        assert "".join(pieces) == whole.choices[0].message.content
        assert len(pieces) > 3
        assert reason == whole.choices[0].finish_reason
        assert whole.usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (
            whole.usage.prompt_tokens,
            whole.usage.completion_tokens,
        )


async def test_many_at_once_say_what_one_alone_says(client: openai.AsyncOpenAI, stack: Stack) -> None:
    """But for near ties: without AVX-512 BF16, a product of one row rounds unlike one of several."""
    await into_cache(client, *QUESTIONS)
    options = {"logprobs": True, "top_logprobs": 5}

    async def whole(question: str) -> list[Step]:
        return steps_of((await ask(client, question, **options)).choices[0].logprobs)

    async def streamed(question: str) -> list[Step]:
        chunks = await client.chat.completions.create(
            model=MODEL, messages=user(question), stream=True, temperature=0, max_tokens=LIMIT, **options
        )
        parts = [choice.logprobs async for chunk in chunks for choice in chunk.choices if choice.logprobs]
        return [step for part in parts for step in steps_of(part)]

    alone = [await whole(question) for question in QUESTIONS]
    await idle(stack)
    together = [asyncio.create_task(whole(question)) for question in QUESTIONS]
    streams = [asyncio.create_task(streamed(question)) for question in QUESTIONS]
    most_waiting = most_processing = 0
    while not all(task.done() for task in (*together, *streams)):
        status = await stack.status()
        most_waiting = max(most_waiting, status["queue_size"])
        most_processing = max(most_processing, status["processing_count"])
        await asyncio.sleep(0.02)
    assert most_waiting >= 2
    assert most_processing == 3
    for asked in (together, streams):
        for task, expected in zip(asked, alone, strict=True):
            assert same_or_near_tie(await task, expected)
    assert len({"".join(step.token for step in steps) for steps in alone}) == len(QUESTIONS)


async def test_completion(client: openai.AsyncOpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 8}
    answer = await client.completions.create(**options)
    assert "Paris" in answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    chunks = await client.completions.create(**options, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in chunks]) == answer.choices[0].text


async def test_stop_string(client: openai.AsyncOpenAI) -> None:
    await into_cache(client, CAPITAL)
    whole = (await ask(client, CAPITAL)).choices[0].message.content or ""
    answer = await ask(client, CAPITAL, stop=["Paris"])
    assert answer.choices[0].message.content == whole.split("Paris")[0]
    assert answer.choices[0].finish_reason == "stop"
    pieces, reason, _ = await stream(client, CAPITAL, stop=["Paris"])
    assert ("".join(pieces), reason) == (whole.split("Paris")[0], "stop")


async def test_seed_decides(client: openai.AsyncOpenAI) -> None:
    await into_cache(client, "Tell me a story.")
    options: dict[str, Any] = {"temperature": 1, "max_tokens": 20}
    texts = [
        (await ask(client, "Tell me a story.", seed=seed, **options)).choices[0].message.content for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


async def test_too_long_a_prompt(client: openai.AsyncOpenAI, stack: Stack) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(client, "word " * 20_000)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"
    state = await stack.reaches(caught.value.response.headers["x-request-id"], RequestStatus.FAILED)
    assert state.attempt == 1


async def test_client_that_leaves_stops_the_model(client: openai.AsyncOpenAI, stack: Stack) -> None:
    before = await idle(stack)
    task = asyncio.create_task(ask(client, "Count to a thousand.", max_tokens=2000, extra_body={"ignore_eos": True}))
    request_id = (await stack.apis[0].logged(rf"(\S+) queued for \S+ at {before['total_queued'] + 1}$"))[1]
    await stack.reaches(request_id, RequestStatus.PROCESSING)
    task.cancel()
    after = await idle(stack)
    assert after["total_cancelled"] == before["total_cancelled"] + 1
    assert "Paris" in ((await ask(client, CAPITAL)).choices[0].message.content or "")


async def test_model_list(client: openai.AsyncOpenAI) -> None:
    model = await client.models.retrieve(MODEL)
    assert model.id == f"HuggingFaceTB/{MODEL}"
    extra = model.model_extra or {}
    assert (extra["status"], extra["quantization"]) == ("ready", "nf4")
    assert extra["context_length"] == 8192
