"""JSON schemas and tools on the real default model, which could not keep to either by itself."""

import asyncio
import json
from typing import Any

import pytest

from forebay_contracts.wire.errors import InvalidRequest
from forebay_inference.engine.text.model import TextModel
from support.engine import answer, chat

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(300)]

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "population": {"type": "integer", "minimum": 0, "maximum": 99999999},
        "capital": {"type": "boolean"},
    },
    "required": ["city", "population", "capital"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
# The grammar leaves no choice, so that no rounding makes one.
FORCED = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo"]}, "unit": {"enum": ["celsius"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def calls_of(deltas: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Names and arguments, put together as the OpenAI SDK does."""
    calls: dict[int, list[str]] = {}
    for delta in deltas:
        if "id" in delta:
            assert delta["type"] == "function"
            assert delta["index"] == len(calls)
            calls[delta["index"]] = [delta["function"]["name"], ""]
        calls[delta["index"]][1] += delta["function"]["arguments"]
    return [(name, arguments) for name, arguments in calls.values()]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
async def test_an_answer_keeps_to_its_schema(engine: TextModel, temperature: float) -> None:
    request = chat(
        "Describe Paris.", response_format=schema_format(CITY), temperature=temperature, seed=1, max_tokens=80
    )
    found = await answer(engine, request)
    value = json.loads(found.text)
    assert sorted(value) == ["capital", "city", "population"]
    assert (type(value["city"]), type(value["population"]), type(value["capital"])) == (str, int, bool)
    assert found.finish_reason == "stop"


async def test_each_request_has_a_grammar_of_its_own(engine: TextModel) -> None:
    colours = {"type": "string", "enum": ["red", "green"]}
    numbers = {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}, "minItems": 2, "maxItems": 2}
    one, two, free = await asyncio.gather(
        answer(engine, chat("A colour?", response_format=schema_format(colours))),
        answer(engine, chat("Two digits?", response_format=schema_format(numbers))),
        answer(engine, chat()),
    )
    assert json.loads(one.text) in ("red", "green")
    assert len(json.loads(two.text)) == 2
    assert "Paris" in free.text


async def test_a_grammar_goes_on_over_a_resume(engine: TextModel) -> None:
    request = chat("Describe Paris.", response_format=schema_format(CITY), max_tokens=80)
    whole = await answer(engine, request)
    for kept in (1, len(whole.tokens) // 2, len(whole.tokens) - 1):
        rest = await answer(engine, request, {0: whole.tokens[:kept]})
        json.loads("".join(whole.pieces[:kept]) + rest.text)


async def test_json_mode_makes_an_object(engine: TextModel) -> None:
    found = await answer(engine, chat("Give me JSON.", response_format={"type": "json_object"}, max_tokens=60))
    assert found.text.startswith("{")
    if found.finish_reason == "stop":
        assert isinstance(json.loads(found.text), dict)


@pytest.mark.parametrize(
    "response_format",
    [
        schema_format({"type": "integer", "minimum": 5, "maximum": 1}),
        schema_format({"type": "no such type"}),
        schema_format({"type": "string", "pattern": "("}),
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "xml"},
    ],
)
async def test_a_schema_that_cannot_be_met_is_refused(engine: TextModel, response_format: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await answer(engine, chat(response_format=response_format))
    assert refused.value.param == "response_format"


@pytest.mark.parametrize(
    ("choice", "parallel", "allowed"),
    [
        ("required", True, {"get_weather", "get_time"}),
        ("required", False, {"get_weather", "get_time"}),
        ({"type": "function", "function": {"name": "get_weather"}}, True, {"get_weather"}),
    ],
)
async def test_a_tool_that_must_be_called_is(engine: TextModel, choice: Any, parallel: bool, allowed: set[str]) -> None:
    request = chat(
        "What is the weather in Oslo?",
        tools=(WEATHER, TIME),
        tool_choice=choice,
        parallel_tool_calls=parallel,
        max_tokens=100,
    )
    found = await answer(engine, request)
    calls = calls_of(found.tool_calls)
    assert calls
    assert found.text.strip() == ""
    if found.finish_reason == "length":
        calls = calls[:-1]
    else:
        assert found.finish_reason == "tool_calls"
    for name, arguments in calls:
        assert name in allowed
        value = json.loads(arguments)
        assert set(value) == ({"city", "unit"} if name == "get_weather" else set())
    if not parallel or isinstance(choice, dict):
        assert len(calls) == 1


async def test_a_call_goes_on_over_a_resume(engine: TextModel) -> None:
    request = chat("Weather in Oslo?", tools=(FORCED,), tool_choice="required", parallel_tool_calls=False)
    request = request.model_copy(update={"sampling": request.sampling.model_copy(update={"max_tokens": 80})})
    whole = await answer(engine, request)
    (name, arguments) = calls_of(whole.tool_calls)[0]
    assert name == "get_weather"
    assert json.loads(arguments) == {"city": "Oslo", "unit": "celsius"}
    tails = []
    for kept in (len(whole.tokens) // 2, len(whole.tokens) * 2 // 3):
        rest = await answer(engine, request, {0: whole.tokens[:kept]})
        tails.append("".join(delta["function"]["arguments"] for delta in rest.tool_calls))
        assert arguments.endswith(tails[-1])
        assert rest.finish_reason == "tool_calls"
    assert len(arguments) > len(tails[0]) > len(tails[1]) > 0


async def test_tools_may_be_left_alone(engine: TextModel) -> None:
    for choice in ("none", "auto", None):
        found = await answer(engine, chat(tools=(WEATHER,), tool_choice=choice))
        assert found.finish_reason in ("stop", "length", "tool_calls")
        assert choice != "none" or not found.tool_calls


async def test_tool_messages_go_back_into_the_template(engine: TextModel) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    messages = (
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "It is noon."},
    )
    found = await answer(engine, chat(messages=messages, tools=(TIME,)))
    assert found.text or found.tool_calls


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": (TIME,), "tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice"),
        ({"tools": (TIME,), "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": ({"type": "custom"},)}, "tools"),
        (
            {
                "tools": ({"type": "function", "function": {"name": "f", "parameters": {"type": "nope"}}},),
                "tool_choice": "required",
            },
            "tools",
        ),
    ],
)
async def test_tools_that_make_no_sense_are_refused(engine: TextModel, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await answer(engine, chat(**fields))
    assert refused.value.param == param
