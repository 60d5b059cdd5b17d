"""What a client gets of its prompt: echoed, scored, as token ids, and in the usage of a stream."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from forebay_contracts.wire.frames import Delta
from forebay_contracts.wire.request import CompletionType, InferenceRequest
from forebay_inference.attempt.endings import End, Ended
from forebay_inference.engine.simulated import SimulatedTokenizer
from forebay_inference.engine.text.returned import MAX_TOKENS
from support.api import post
from support.twins import MODEL, Twins, request, twins

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = "one two three [[tokens=2]]"
IDS = SimulatedTokenizer().encode(PROMPT)
# Words so short that their ids are JSON's integers; five tokens answer them.
SHORT = "a b c"
SHORT_IDS = SimulatedTokenizer().encode(SHORT)


@pytest.fixture
async def system() -> AsyncIterator[Twins]:
    async with twins() as made:
        made.worker()
        yield made


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": PROMPT, **fields}


def short(path: str, **fields: Any) -> dict[str, Any]:
    asked = {"prompt": SHORT} if path == COMPLETIONS else {"messages": [{"role": "user", "content": SHORT}]}
    return {"model": MODEL, **asked, **fields}


async def whole(system: Twins, path: str, fields: dict[str, Any]) -> dict[str, Any]:
    answer = await post(system, path, fields)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def chunks(system: Twins, path: str, fields: dict[str, Any]) -> list[dict[str, Any]]:
    *events, done, _ = (await post(system, path, {**fields, "stream": True})).text.split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize(("limit", "text", "tokens"), [(0, "", 0), (1, "t0", 1), (9, "t0 t1", 2)])
async def test_an_echo_has_the_logprobs_of_its_prompt(system: Twins, limit: int, text: str, tokens: int) -> None:
    found = await whole(system, COMPLETIONS, completion(echo=True, logprobs=1, max_tokens=limit))
    (choice,) = found["choices"]
    told = choice["logprobs"]
    assert choice["text"] == PROMPT + text == "".join(told["tokens"])
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    assert all(logprob < 0 for logprob in told["token_logprobs"][1:])
    assert all(len(top) in (1, 2) for top in told["top_logprobs"][1:])
    assert [choice["text"][at:][: len(one)] for at, one in zip(told["text_offset"], told["tokens"], strict=True)] == (
        told["tokens"]
    )
    assert found["usage"]["prompt_tokens"] == len(IDS)
    assert found["usage"]["completion_tokens"] == tokens
    assert "prompt_logprobs" not in choice


async def test_a_stream_of_it_is_the_same(system: Twins) -> None:
    fields = completion(echo=True, logprobs=2, n=2, prompt=[PROMPT, PROMPT[4:]], seed=1)
    found = await whole(system, COMPLETIONS, fields)
    events = await chunks(system, COMPLETIONS, fields)
    for choice in found["choices"]:
        parts = [part for event in events for part in event["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for part in parts if part["logprobs"] for value in part["logprobs"][name]] == values


async def test_an_echo_alone_has_none(system: Twins) -> None:
    (choice,) = (await whole(system, COMPLETIONS, completion(echo=True, logprobs=None)))["choices"]
    assert (choice["text"], choice["logprobs"]) == (f"{PROMPT}t0 t1", None)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_prompt_logprobs_and_token_ids_stand_where_vllm_has_them(system: Twins, path: str) -> None:
    fields = short(path, prompt_logprobs=1, return_token_ids=True, logprobs=None)
    found = await whole(system, path, fields)
    (choice,) = found["choices"]
    holder = choice if path == COMPLETIONS else found
    assert choice["token_ids"] == [0, 1, 2, 3, 4]
    assert choice["logprobs"] is None
    assert holder["prompt_token_ids"] == SHORT_IDS
    first, *rest = holder["prompt_logprobs"]
    assert first is None
    for token, entry in zip(SHORT_IDS[1:], rest, strict=True):
        assert entry[str(token)]["rank"] == 1
        assert entry[str(token)]["decoded_token"] == SimulatedTokenizer().decode([token])
    assert found["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_stream_tells_token_ids_and_usage_as_it_goes(system: Twins, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await chunks(system, path, short(path, return_token_ids=True, stream_options=options))
    parts = [part for event in events for part in event["choices"]]
    assert [token for part in parts for token in part.get("token_ids", ())] == [0, 1, 2, 3, 4]
    holders = parts if path == COMPLETIONS else events
    assert [holder["prompt_token_ids"] for holder in holders if "prompt_token_ids" in holder] == [SHORT_IDS]
    totals = [event["usage"]["total_tokens"] for event in events]
    assert totals == sorted(totals)
    assert events[-1]["choices"] == []
    assert events[-2]["usage"]["prompt_tokens"] == events[-1]["usage"]["prompt_tokens"] == len(SHORT_IDS)
    assert events[-2]["usage"]["completion_tokens"] == events[-1]["usage"]["completion_tokens"] == 5


async def test_the_best_of_several_is_echoed_too(system: Twins) -> None:
    fields = completion(prompt=f"{PROMPT[:-2]} random]]", echo=True, logprobs=0, best_of=3, n=2, seed=4)
    found = await whole(system, COMPLETIONS, fields)
    assert all(choice["text"].startswith(fields["prompt"]) for choice in found["choices"])
    assert [len(choice["logprobs"]["tokens"]) for choice in found["choices"]] == [len(IDS) + 1 + 2] * 2
    assert found["usage"]["completion_tokens"] == 4


def long(tokens: int) -> InferenceRequest:
    plain = request()
    scored = {"echo": True, "return_prompt": True, "prompt_logprobs": 1, "prompts": (f"{'a ' * tokens}[[tokens=3]]",)}
    sampling = plain.sampling.model_copy(update={"logprobs": 1})
    return plain.model_copy(
        update={"completion_type": CompletionType.COMPLETION, "messages": (), "sampling": sampling, **scored}
    )


@pytest.mark.parametrize("stream", [False, True])
async def test_a_takeover_within_the_prompt_goes_on_from_there(stream: bool) -> None:
    async with twins() as system:
        wanted = long(5 * MAX_TOKENS).model_copy(update={"stream": stream})
        first = system.worker("w1")
        async with system.dispatcher.submit(wanted) as answer:
            found = await anext(answer.deltas())
            first.running[wanted.id].stop(Ended(End.HANDED_OVER))
            found += [delta async for some in answer.deltas() for delta in some]
        assert "".join(delta.text for delta in found) == f"{wanted.prompts[0]}t0 t1 t2"
        logprobs = [one for delta in found for one in delta.logprobs]
        assert len(logprobs) == 5 * MAX_TOKENS + 1 + 3
        assert [one.logprob is None for one in logprobs[:2]] == [True, False]
        again = next(frame for frame in system.channels[1].frames if isinstance(frame, Delta))
        assert 0 < again.offset < 5 * MAX_TOKENS
        assert max(len(delta.logprobs) for delta in found) <= MAX_TOKENS
        assert answer.completed is not None
        assert answer.completed.usage.completion_tokens == 3
