"""A server that speaks OpenAI's API alone, as a model."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from forebay_contracts.settings import InferenceSettings, load
from forebay_contracts.wire.errors import ConfigurationError, InferenceFailed, InvalidRequest, LoopDetected
from forebay_contracts.wire.request import InferenceRequest
from forebay_inference.engine.events import Accepted, Event, Finished, Tokens, Used
from forebay_inference.engine.openai import OpenAIModel
from forebay_inference.engine.protocol import EngineFault
from support.engine import chat, completion
from support.inference_server import InferenceServer, inference_server

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}


def said(delta: dict[str, Any], reason: str | None = None, index: int = 0) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": delta, "finish_reason": reason}]}


WHOLE = [
    said({"role": "assistant", "content": ""}),
    said({"content": "Hel"}),
    said({"content": "lo"}),
    said({}, "stop"),
    {"choices": [], "usage": USAGE},
]


@pytest.fixture
async def server() -> AsyncIterator[InferenceServer]:
    async with inference_server({"/v1/models": {"data": [{"id": "theirs"}]}, CHAT: lambda body: WHOLE}) as started:
        yield started


async def started(server: InferenceServer, **settings: Any) -> OpenAIModel:
    given = {"inference_engine": "openai", "engine_url": server.url + "/v1", **settings}
    model = OpenAIModel(InferenceSettings(_env_file=None, **given))
    try:
        await model.start(lambda line: None)
    except BaseException:
        await model.close()
        raise
    return model


@pytest.fixture
async def model(server: InferenceServer) -> AsyncIterator[OpenAIModel]:
    model = await started(server)
    yield model
    await model.close()


async def events(model: OpenAIModel, request: InferenceRequest) -> list[Event]:
    return [event async for event in model.generate(request, {})]


async def test_an_answer_is_told_as_the_server_tells_it(model: OpenAIModel) -> None:
    first, *tokens, end, used = await events(model, chat("hi"))
    assert first == Accepted(0)
    assert [one.text for one in tokens if isinstance(one, Tokens) and one.token_ids] == ["Hel", "lo"]
    assert end == Finished(0, "stop")
    assert isinstance(used, Used)
    assert (used.usage.prompt_tokens, used.usage.completion_tokens, used.usage.cached_tokens) == (7, 3, 4)


async def test_reasoning_and_calls_are_passed_on(server: InferenceServer, model: OpenAIModel) -> None:
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    server.answers[CHAT] = lambda body: [
        said({"reasoning_content": "hm"}),
        said({"tool_calls": [call]}),
        said({}, "tool_calls"),
    ]
    _, thought, called, end = await events(model, chat("hi"))
    assert isinstance(thought, Tokens)
    assert isinstance(called, Tokens)
    assert (thought.reasoning, called.tool_calls, end) == ("hm", (call,), Finished(0, "tool_calls"))


async def test_calls_without_an_index_get_one(server: InferenceServer, model: OpenAIModel) -> None:
    calls = [{"id": name, "function": {"name": name, "arguments": None}} for name in "ab"]
    server.answers[CHAT] = lambda body: [said({"tool_calls": calls}, "tool_calls")]
    _, called, _ = await events(model, chat("hi"))
    assert isinstance(called, Tokens)
    assert called.tool_calls == tuple(
        {"id": name, "index": place, "function": {"name": name}} for place, name in enumerate("ab")
    )


async def test_the_server_gets_what_the_client_gave_and_no_more(server: InferenceServer, model: OpenAIModel) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    form = {"type": "json_object"}
    asked = chat("hi", temperature=0.5, max_tokens=9, tools=(tool,), tool_choice="auto", response_format=form)
    asked = asked.model_copy(update={"sampling": asked.sampling.model_copy(update={"unset": ("temperature",)})})
    await events(model, asked)
    (_, body) = server.asked[-1]
    assert body == {
        "model": "theirs",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "n": 1,
        "max_tokens": 9,
        "tools": [tool],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "response_format": form,
    }


async def test_choices_of_several_prompts_keep_their_numbers(server: InferenceServer, model: OpenAIModel) -> None:
    server.answers[COMPLETIONS] = lambda body: [
        {"choices": [{"index": index, "text": f"{index}", "finish_reason": "stop"}]} for index in (1, 0)
    ]
    found = await events(model, completion("a", (1, 2)))
    assert server.asked[-1][1]["prompt"] == ["a", [1, 2]]
    assert [(one.index, one.text) for one in found if isinstance(one, Tokens)] == [(1, "1"), (0, "0")]
    assert [one for one in found if isinstance(one, Finished)] == [Finished(1, "stop"), Finished(0, "stop")]


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (web.Response(status=500), EngineFault, "500"),
        (web.Response(status=429), EngineFault, "429"),
        (web.Response(status=400, text="what?"), InvalidRequest, "status 400"),
        (
            web.json_response({"error": {"message": "too hot"}}, status=400),
            InvalidRequest,
            "hot",
        ),
        (WHOLE[:2], EngineFault, "without saying why"),
        ([*WHOLE[:2], ...], EngineFault, "broke off"),
        (
            [*WHOLE[:2], {"error": {"message": "secret", "type": "server_error"}}],
            EngineFault,
            "server_error",
        ),
        ([{"error": {"message": "no", "type": "invalid_request_error"}}], InvalidRequest, "no"),
        ([{"choices": [{"delta": {"content": "x"}}]}], EngineFault, "not OpenAI's"),
        ([said({"content": "x"}, index=1)], EngineFault, "not OpenAI's"),
        ([said({"content": 5})], EngineFault, "not OpenAI's"),
        ([said({"tool_calls": [{"function": {"arguments": {}}}]})], EngineFault, "not OpenAI's"),
        ([{"choices": [{"index": 0, "delta": {}, "finish_reason": 1}]}], EngineFault, "not OpenAI's"),
        ([{"choices": None, "usage": {"prompt_tokens": "many"}}], EngineFault, "not OpenAI's"),
        ([[5]], EngineFault, "not OpenAI's"),
    ],
)
async def test_errors_have_their_kind(
    server: InferenceServer, model: OpenAIModel, answer: Any, error: type[Exception], message: str
) -> None:
    server.answers[CHAT] = lambda body: answer
    with pytest.raises(error, match=message) as raised:
        await events(model, chat("hi"))
    assert "secret" not in str(raised.value)
    assert model.status().sequences == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": 1}, "logprobs"),
        ({"return_prompt": True}, "return_token_ids"),
        ({"response_format": {"type": "regex", "regex": "a", "param": "guided_regex"}}, "guided_regex"),
    ],
)
async def test_what_needs_tokens_is_refused_by_name(
    server: InferenceServer, model: OpenAIModel, fields: dict[str, Any], param: str
) -> None:
    asked = len(server.asked)
    with pytest.raises(InvalidRequest) as raised:
        await events(model, chat("hi", **fields))
    assert raised.value.param == param
    assert len(server.asked) == asked


async def test_a_request_that_comes_back_to_its_own_forebay_ends_at_once(
    server: InferenceServer, model: OpenAIModel
) -> None:
    server.answers[CHAT] = web.json_response({"error": {"message": "-"}}, status=508)
    # No fault of the engine, which further attempts would follow.
    request = chat("hi", forwarded=("theirs", "ours"))
    with pytest.raises(LoopDetected, match="ENGINE_URL of the worker leads back"):
        await events(model, request)
    assert server.headers["forebay-forwarded"] == f"theirs,ours,{request.id}"


async def test_an_answer_that_was_begun_is_not_resumed(model: OpenAIModel) -> None:
    with pytest.raises(InferenceFailed, match="cannot go on"):
        await anext(model.generate(chat("hi"), {0: [0]}))


async def test_leaving_an_answer_closes_its_connection(server: InferenceServer, model: OpenAIModel) -> None:
    server.answers[CHAT] = lambda body: (said({"content": "x"}) if n % 2 else 0.005 for n in range(10_000))
    answer = model.generate(chat("hi"), {})
    assert await anext(answer) == Accepted(0)
    assert model.status().sequences == 1
    await answer.aclose()
    await asyncio.wait_for(server.left.wait(), 30)
    assert model.status().sequences == 0


async def test_the_model_is_the_one_named_or_the_only_one(server: InferenceServer) -> None:
    server.answers["/v1/models"] = {"data": [{"id": "a"}, {"id": "b"}]}
    with pytest.raises(ConfigurationError, match="a, b"):
        await started(server)
    model = await started(server, default_model="b", engine_api_key="k")
    await events(model, chat("hi"))
    assert server.asked[-1][1]["model"] == "b"
    await model.close()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (web.Response(status=401), "ENGINE_API_KEY"),
        (web.Response(status=301, headers={"Location": "https://h"}), "it leads elsewhere"),
        (b"<html>", "the answer to /v1/models is no JSON"),
    ],
)
async def test_what_waiting_does_not_change_stops_the_start(server: InferenceServer, answer: Any, reason: str) -> None:
    server.answers["/v1/models"] = answer
    with pytest.raises(ConfigurationError, match=reason):
        await started(server)


def test_the_address_is_needed() -> None:
    with pytest.raises(ConfigurationError, match="ENGINE_URL"):
        load(InferenceSettings, inference_engine="openai")
