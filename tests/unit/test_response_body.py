"""The body of `POST /v1/responses`: what clients send, and the chat that it becomes."""

import json
from typing import Any

import pytest
from openai.types.responses import Response
from openai.types.responses.response_item_list import ResponseItemList

from forebay_api.http.bodies import validated
from forebay_api.openai.responses.body import InputTokensBody
from forebay_api.openai.responses.events import ResponseFold
from forebay_contracts.wire.errors import RequestNotFound
from forebay_contracts.wire.request import CompletionType, Sampling
from support.responses import CUSTOM, FUNCTION, HEX, HOSTED, NAMESPACE, REQUEST_ID, SCHEMA, body, record, request

CODEX: dict[str, Any] = {
    "stream": True,
    "store": False,
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"summary": "auto"},
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "01a22920-3913-7a60-8941-4f8593d7d819",
    "client_metadata": {"session_id": "01a22920", "x-codex-turn-metadata": "{}" * 1000},
    "tools": [FUNCTION, NAMESPACE, HOSTED[0]],
    "input": [
        {
            "type": "message",
            "id": "msg_1",
            "role": "developer",
            "content": [{"type": "input_text", "text": "You are Codex."}, {"type": "input_text", "text": "Be brief."}],
        },
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "No network."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "<environment/>"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "say hi"}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "hm"}],
            "encrypted_content": None,
        },
        {
            "type": "message",
            "status": "completed",
            "id": "msg_2",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Let me look.", "annotations": [], "logprobs": []}],
        },
        {"type": "function_call", "id": "fc_1", "name": "f", "arguments": '{"city": "Bonn"}', "call_id": "call_1"},
        {
            "type": "function_call",
            "status": "completed",
            "name": "f",
            "namespace": "agents",
            "arguments": "{}",
            "call_id": "call_2",
        },
        {"type": "function_call_output", "id": "fco_1", "call_id": "call_1", "output": "sunny"},
        {
            "type": "function_call_output",
            "call_id": "call_2",
            "output": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
        },
    ],
}
AGENTS: dict[str, Any] = {
    "include": ["message.output_text.logprobs"],
    "input": [
        {"content": "Weather in Bonn?", "role": "user"},
        {"id": "rs_1", "summary": [], "type": "reasoning", "content": [{"text": "hm", "type": "reasoning_text"}]},
        {
            "arguments": "{}",
            "call_id": "call_1",
            "name": "f",
            "type": "function_call",
            "id": "fc_1",
            "status": "completed",
        },
        {"call_id": "call_1", "output": "sunny", "type": "function_call_output"},
    ],
    "instructions": "Be brief.",
    "max_output_tokens": 500,
    "metadata": {"a": "b"},
    "parallel_tool_calls": True,
    "reasoning": {"effort": "low", "summary": "auto"},
    "text": {"verbosity": "low"},
    "tool_choice": "required",
    "tools": [FUNCTION],
    "top_logprobs": 2,
    "truncation": "auto",
}
AI_SDK: dict[str, Any] = {
    "input": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "item_reference", "id": "rs_1"},
        {"type": "item_reference", "id": "msg_1"},
        {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": '{"city":"Bonn"}'},
        {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
    ],
    "text": {"format": {"type": "json_schema", "strict": True, "name": "response", "schema": SCHEMA}},
    "tools": [FUNCTION],
    "tool_choice": "auto",
    "stream": True,
}
STORED: dict[str, dict[str, Any]] = {
    "rs_1": {"id": "rs_1", "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
    "msg_1": {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Let me look.", "annotations": [], "logprobs": []}],
    },
}


def chat_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_what_codex_sends() -> None:
    made = request(body(**CODEX))
    assert made.messages == (
        {"role": "system", "content": "You are Codex.\nBe brief."},
        {"role": "system", "content": "No network."},
        {"role": "user", "content": "<environment/>"},
        {"role": "user", "content": "say hi"},
        {
            "role": "assistant",
            "content": "Let me look.",
            "reasoning_content": "hm",
            "tool_calls": [chat_call("call_1", "f", '{"city": "Bonn"}'), chat_call("call_2", "agents__f", "{}")],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "call_2", "content": "a\nb"},
    )
    assert [tool["function"]["name"] for tool in made.tools] == ["f", "agents__f"]
    assert (made.tool_choice, made.parallel_tool_calls, made.stream) == ("auto", True, True)
    assert (made.sampling.logprobs, made.sampling.max_tokens) == (None, None)
    kept = record(**CODEX)
    assert (kept.store, kept.stream, kept.key) == (False, True, "alice")
    assert [tool["type"] for tool in kept.parameters["tools"]] == ["function", "namespace"]


def test_what_openai_agents_sends() -> None:
    made = request(body(**AGENTS))
    assert made.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Bonn?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [chat_call("call_1", "f", "{}")],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    )
    assert made.sampling.logprobs == 2
    assert made.sampling.max_tokens == 500
    assert made.tool_choice == "required"
    assert made.chat_template_kwargs == {"reasoning_effort": "low"}
    shown = record(**AGENTS).parameters
    assert (shown["text"]["verbosity"], shown["truncation"], shown["metadata"]) == ("low", "disabled", {"a": "b"})


def test_what_the_ai_sdk_sends() -> None:
    of = body(**AI_SDK)
    assert of.references == ("rs_1", "msg_1")
    items = of.items(REQUEST_ID, STORED)
    made = request(of, items)
    assert made.messages[2:] == (
        {
            "role": "assistant",
            "content": "Let me look.",
            "reasoning_content": "hm",
            "tool_calls": [chat_call("call_1", "f", '{"city":"Bonn"}')],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    )
    assert made.response_format == {
        "type": "json_schema",
        "json_schema": {"name": "response", "schema": SCHEMA, "strict": True},
    }
    with pytest.raises(RequestNotFound) as missing:
        of.items(REQUEST_ID, {"rs_1": STORED["rs_1"]})
    assert (missing.value.param, missing.value.code) == ("input[3].id", "item_not_found")


@pytest.mark.parametrize("fields", [CODEX, AGENTS, {}], ids=["codex", "agents", "text"])
def test_items_are_listed_as_the_sdk_reads_them(fields: dict[str, Any]) -> None:
    items = body(**fields).items(REQUEST_ID)
    page = {"object": "list", "data": items, "first_id": items[0]["id"], "last_id": items[-1]["id"], "has_more": False}
    ResponseItemList.model_validate_json(json.dumps(page))
    assert len({item["id"] for item in items}) == len(items)


def test_items_keep_the_ids_that_they_have_and_get_those_of_the_request() -> None:
    given = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "id": "msg_x", "phase": "commentary"},
    ]
    of = body(input=given)
    assert [item["id"] for item in of.items(REQUEST_ID)] == [f"msg_{HEX}_in0", "msg_x"]
    assert of.items(REQUEST_ID)[1]["phase"] == "commentary"
    assert of.items(REQUEST_ID) == of.items(REQUEST_ID)


def test_the_history_comes_first() -> None:
    before = body(input="My name is Alice.", instructions="Forgotten.")
    said = STORED["msg_1"]
    of = body(input="Who am I?", previous_response_id="resp_1", instructions="Be brief.")
    made = request(of, [*before.items("other"), said, *of.items(REQUEST_ID)])
    assert [(message["role"], message["content"]) for message in made.messages] == [
        ("system", "Be brief."),
        ("user", "My name is Alice."),
        ("assistant", "Let me look."),
        ("user", "Who am I?"),
    ]


def test_what_follows_a_cut_answer() -> None:
    given = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "assistant", "content": "c", "status": "incomplete"},
        {"type": "function_call", "call_id": "x", "name": "f", "arguments": '{"ci', "status": "incomplete"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "unused"}]},
        {"role": "developer", "content": "Go on."},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "d"}], "encrypted_content": "secret"},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    ]
    assert request(body(input=given)).messages == (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "system", "content": "Go on."},
        {"role": "assistant", "content": "No.", "reasoning_content": "d"},
    )


def test_custom_tools_are_functions_of_one_text() -> None:
    given = [
        {"role": "user", "content": "a"},
        {"type": "custom_tool_call", "call_id": "c", "name": "patch", "input": 'say "ä"\n'},
        {"type": "custom_tool_call_output", "call_id": "c", "output": "done"},
    ]
    made = request(body(input=given, tools=[CUSTOM], tool_choice={"type": "custom", "name": "patch"}))
    assert made.messages[1]["tool_calls"][0]["function"]["arguments"] == '{"input":"say \\"ä\\"\\n"}'
    assert made.messages[2] == {"role": "tool", "tool_call_id": "c", "content": "done"}
    function = made.tools[0]["function"]
    assert function["parameters"]["required"] == ["input"]
    assert function["description"] == 'Applies a patch.\n\nThe input must match this Lark grammar:\nstart: "a"'
    assert made.tool_choice == {"type": "function", "function": {"name": "patch"}}


def test_tools_of_a_hosted_service_are_left_out() -> None:
    fields = {"tools": [*HOSTED, FUNCTION]}
    assert [tool["function"]["name"] for tool in request(body(**fields)).tools] == ["f"]
    assert record(**fields).parameters["tools"] == [FUNCTION]
    only_hosted = request(body(tools=HOSTED, tool_choice="auto"))
    assert (only_hosted.tools, only_hosted.tool_choice) == ((), None)


@pytest.mark.parametrize(
    ("choice", "tools", "meant"),
    [
        ("none", ["f", "patch", "agents__f"], "none"),
        ("required", ["f", "patch", "agents__f"], "required"),
        (
            {"type": "function", "name": "f"},
            ["f", "patch", "agents__f"],
            {"type": "function", "function": {"name": "f"}},
        ),
        (
            {"type": "function", "name": "f", "namespace": "agents"},
            ["f", "patch", "agents__f"],
            {"type": "function", "function": {"name": "agents__f"}},
        ),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}, {"type": "mcp"}]},
            ["f"],
            "auto",
        ),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "custom", "name": "patch"}]},
            ["patch"],
            "required",
        ),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}]}, [], None),
    ],
)
def test_tool_choice(choice: Any, tools: list[str], meant: Any) -> None:
    made = request(body(tools=[FUNCTION, NAMESPACE, CUSTOM, HOSTED[0]], tool_choice=choice))
    assert {tool["function"]["name"] for tool in made.tools} == set(tools)
    assert made.tool_choice == meant


@pytest.mark.parametrize(
    ("fields", "meant"),
    [
        ({"temperature": 0.5}, Sampling(temperature=0.5, unset=("top_p", "top_k", "repetition_penalty"))),
        ({"top_p": 0.5}, Sampling(top_p=0.5, unset=("temperature", "top_k", "repetition_penalty"))),
        (
            {"presence_penalty": 1, "frequency_penalty": -1, "temperature": None},
            Sampling(
                presence_penalty=1,
                frequency_penalty=-1,
                unset=("temperature", "top_p", "top_k", "repetition_penalty"),
            ),
        ),
    ],
)
def test_sampling(fields: dict[str, Any], meant: Sampling) -> None:
    assert request(body(**fields)).sampling == meant


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ({"format": {"type": "text"}}, None),
        ({"format": None, "verbosity": None}, None),
        ({"format": {"type": "json_object"}}, {"type": "json_object"}),
    ],
)
def test_text_format(text: dict[str, Any], meant: Any) -> None:
    assert request(body(text=text)).response_format == meant


def test_reasoning_effort_reaches_the_template() -> None:
    assert request(body(reasoning={"effort": None})).chat_template_kwargs == {}
    assert request(body(reasoning={"effort": "none"})).chat_template_kwargs == {"reasoning_effort": "none"}


def test_a_body_that_counts_tokens_makes_the_same_prompt() -> None:
    prompt = {"model": "m", **{name: CODEX[name] for name in ("input", "tools", "tool_choice", "reasoning")}}
    counted = validated(InputTokensBody, json.dumps(prompt).encode())
    made = counted.request(
        counted.items(REQUEST_ID),
        id=REQUEST_ID,
        completion_type=CompletionType.CHAT,
        model="m",
        created_at=0.0,
        deadline=1.0,
        reply_to="",
    )
    asked = request(body(**CODEX))
    assert (made.messages, made.tools, made.tool_choice) == (asked.messages, asked.tools, asked.tool_choice)
    assert made.sampling.max_tokens == 0


def test_the_response_has_what_the_specifications_require() -> None:
    response = ResponseFold(record(**AGENTS)).response()
    required = {name for name, field in Response.model_fields.items() if field.is_required()}
    open_responses = {
        *(
            "completed_at",
            "status",
            "incomplete_details",
            "previous_response_id",
            "instructions",
            "error",
            "truncation",
        ),
        *(
            "text",
            "top_p",
            "presence_penalty",
            "frequency_penalty",
            "top_logprobs",
            "temperature",
            "reasoning",
            "usage",
        ),
        *("max_output_tokens", "max_tool_calls", "store", "background", "service_tier", "metadata"),
        *("safety_identifier", "prompt_cache_key"),
    }
    assert required | open_responses <= response.keys()
