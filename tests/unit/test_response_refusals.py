"""The body of `POST /v1/responses`: what is refused by name, and how soon."""

import json
import time
from typing import Any

import pytest
from pydantic import ValidationError

from forebay_api.openai.body import SLICE
from forebay_contracts.wire.errors import InvalidRequest
from support.responses import FUNCTION, HOSTED, NAMESPACE, body, request

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": [5]}, "input[0]"),
    ({"input": [{"type": "web_search_call", "id": "a"}]}, "input[0].type"),
    ({"input": [{"type": 5}]}, "input[0].type"),
    ({"input": [{"type": "compaction", "encrypted_content": "gAAAABpM0Yj"}]}, "input[0].encrypted_content"),
    ({"tools": [{"type": "namespace", "name": "n", "tools": [NAMESPACE]}]}, "tools[0].tools[0].type"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role"),
    ({"input": [{"content": "a"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
    ({"input": [{"role": "assistant", "content": [{"type": "refusal"}]}]}, "input[0].content[0].refusal"),
    ({"input": [{"type": "function_call", "call_id": "a", "arguments": "{}"}]}, "input[0].name"),
    ({"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": {}}]}, "input[0].arguments"),
    ({"input": [{"type": "function_call_output", "output": "a"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input[0].output"),
    (
        {"input": [{"type": "function_call_output", "call_id": "a", "output": [{"type": "input_image"}]}]},
        "input[0].output[0].type",
    ),
    ({"input": [{"type": "custom_tool_call", "call_id": "a", "name": "f"}]}, "input[0].input"),
    ({"input": [{"type": "item_reference"}]}, "input[0].id"),
    ({"input": [{"type": "reasoning", "summary": "a"}]}, "input[0].summary"),
    ({"instructions": 5}, "instructions"),
    ({"previous_response_id": "resp_1", "conversation": "conv_1"}, "conversation"),
    ({"conversation": 5}, "conversation"),
    ({"conversation": {"name": "a"}}, "conversation.id"),
    ({"tools": [{"type": "banana"}]}, "tools[0].type"),
    ({"tools": [{"name": "f"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    ({"tools": [{"type": "function", "name": "f", "parameters": "a"}]}, "tools[0].parameters"),
    ({"tools": [{"type": "function", "name": "f", "parameters": {"maximum": 2**64}}]}, "tools[0].parameters"),
    ({"tools": [{"type": "custom", "name": "f", "format": {"type": "grammar"}}]}, "tools[0].format.syntax"),
    ({"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function"}]}]}, "tools[0].tools[0].name"),
    ({"tools": [FUNCTION, FUNCTION]}, "tools"),
    ({"tool_choice": "banana"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "required", "tools": HOSTED}, "tool_choice"),
    ({"tool_choice": {"type": "web_search"}, "tools": HOSTED}, "tool_choice.type"),
    ({"tool_choice": {"type": "mcp", "server_label": "a"}, "tools": HOSTED}, "tool_choice.type"),
    ({"tool_choice": {"type": "function"}, "tools": [FUNCTION]}, "tool_choice.name"),
    ({"tool_choice": {"type": "function", "name": "g"}, "tools": [FUNCTION]}, "tool_choice"),
    ({"tool_choice": {"type": "custom", "name": "f"}, "tools": [FUNCTION]}, "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice.tools"),
    (
        {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]}},
        "tool_choice",
    ),
    (
        {"tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"type": "mcp"}]}, "tools": HOSTED},
        "tool_choice",
    ),
    ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
    ({"text": {"verbosity": "loud"}}, "text.verbosity"),
    ({"text": {"color": "red"}}, "text.color"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_tool_calls": 0}, "max_tool_calls"),
    ({"truncation": "middle"}, "truncation"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"include": ["everything"]}, "include[0]"),
    ({"temperature": 3}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"metadata": {str(number): "a" for number in range(17)}}, "metadata"),
    ({"metadata": {"a": "b" * 513}}, "metadata"),
    ({"store": "no"}, "store"),
    ({"background": True, "store": False}, "background"),
    ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": True}}, "stream_options.include_usage"),
    ({"service_tier": "first"}, "service_tier"),
    ({"prompt_cache_retention": "week"}, "prompt_cache_retention"),
    ({"client_metadata": "a"}, "client_metadata"),
    ({"n": 2}, "n"),
    ({"messages": []}, "messages"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: json.dumps(value)[:50])
def test_a_wrong_shape_is_refused_by_its_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        body(**fields)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert refused.value.message


@pytest.mark.parametrize(
    "given",
    [
        [{"type": "function_call_output", "call_id": "a", "output": "b"}],
        [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{"}],
        [{"type": "reasoning", "summary": []}],
    ],
)
def test_items_that_do_not_fit_together_are_refused(given: list[dict[str, Any]]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        request(body(input=given))
    assert refused.value.param == "input"


MANY = 50_000
MESSAGE = {"role": "user", "content": "a"}


def members(value: Any) -> dict[str, Any]:
    return {f"k{number}": value for number in range(MANY)}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        *(({"input": [item] * MANY}, "input[0]") for item in (1, "a", [], None)),
        ({"input": [{}] * MANY}, "input[0].role"),
        ({"input": [MESSAGE] * MANY + [{"type": "x"}]}, f"input[{MANY}].type"),
        ({"input": [{"type": "message", "role": "user", "content": [{}] * MANY}]}, "input[0].content[0].type"),
        ({"input": [{"type": "reasoning", "summary": [1] * MANY}]}, "input[0].summary[0]"),
        ({"tools": [{}] * MANY}, "tools[0].type"),
        ({"tools": [FUNCTION | {"name": f"f{n}"} for n in range(5000)] + [{"type": "x"}]}, "tools[5000].type"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": [{}] * MANY}]}, "tools[0].tools[0].type"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [1] * MANY}}, "tool_choice.tools[0]"),
        ({"include": [1] * MANY}, "include[0]"),
        ({"metadata": members(1)}, "metadata.k0"),
        ({"metadata": members("a")}, "metadata"),
        (members(1), "k0"),
        ({"text": members(1)}, "text.k0"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_a_hostile_body_is_refused_at_once(fields: dict[str, Any], param: str) -> None:
    began = time.process_time()
    with pytest.raises(InvalidRequest) as refused:
        body(**fields)
    assert refused.value.param == param
    assert isinstance(refused.value.__cause__, ValidationError)
    assert refused.value.__cause__.error_count() <= 2 * SLICE
    assert time.process_time() - began < 2


def test_a_large_body_is_made_in_bounded_time() -> None:
    began = time.process_time()
    parts = [{"type": "input_text", "text": "a"}] * 10_000
    calls = [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}] * 5_000
    made = request(body(input=[{"role": "user", "content": parts}, *calls, MESSAGE]))
    assert len(made.messages) == 3
    assert time.process_time() - began < 2
