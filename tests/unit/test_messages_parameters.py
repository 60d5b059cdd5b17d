"""The table of parameters in docs/messages.md, compared with the schema and with what the Anthropic SDK documents."""

import json
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import (
    BetaContentBlockParam,
    BetaOutputConfigParam,
    BetaThinkingConfigParam,
    BetaToolChoiceParam,
)
from anthropic.types.beta import message_count_tokens_params as beta_count_tokens_params
from anthropic.types.beta import message_create_params as beta_create_params

from forebay_api.anthropic.messages.body import ConversationBody, CountTokensBody, MessagesBody
from forebay_api.http.bodies import validated
from forebay_contracts.wire.errors import InvalidRequest
from forebay_contracts.wire.request import CompletionType, InferenceRequest

PAGE = Path(__file__).parents[2] / "docs" / "messages.md"
HEADERS = {"betas"}
DOCUMENTED = {
    *message_create_params.MessageCreateParamsStreaming.__annotations__,
    *beta_create_params.MessageCreateParamsBase.__annotations__,
} - HEADERS
TOOLS = {"tools": [{"name": "f", "input_schema": {"type": "object"}}]}
# A value that is not the default of each, and what it cannot be without.
SAMPLES: dict[str, tuple[Any, dict[str, Any]]] = {
    "billing_policy": ({"type": "billing_policy", "bill_to": "self"}, {}),
    "cache_control": ({"type": "ephemeral"}, {}),
    "compaction": ({"type": "enabled"}, {}),
    "container": ("c", {}),
    "context_management": ({"edits": []}, {}),
    "diagnostics": ({"previous_message_id": None}, {}),
    "fallback_credit_token": ("t", {}),
    "fallbacks": ([{"model": "m"}], {}),
    "inference_geo": ("eu", {}),
    "max_tokens": (3, {}),
    "mcp_servers": ([{"type": "url", "name": "s", "url": "https://example.com"}], {}),
    "messages": ([{"role": "user", "content": "b"}], {}),
    "metadata": ({"user_id": "u"}, {}),
    "model": ("other", {}),
    "output_config": ({"effort": "low"}, {}),
    "service_tier": ("standard_only", {}),
    "speed": ("fast", {}),
    "stop_sequences": (["end"], {}),
    "stream": (True, {}),
    "system": ("Be brief.", {}),
    "temperature": (0.5, {}),
    "thinking": ({"type": "adaptive"}, {}),
    "thread": ({"type": "create"}, {}),
    "tool_choice": ({"type": "any"}, TOOLS),
    "tools": (TOOLS["tools"], {}),
    "top_k": (5, {}),
    "top_p": (0.5, {}),
    "user": ("u", {}),
    "user_profile_id": ("u", {}),
    "workspace_id": ("w", {}),
}


def table() -> dict[str, str]:
    """For each parameter, what the page says becomes of it."""
    section = PAGE.read_text().split("## Parameters", 1)[1].split("\n## ", 1)[0]
    told: dict[str, str] = {}
    for line in section.splitlines():
        if line.startswith("| `"):
            names, fate, *_ = (cell.strip() for cell in line.strip("|").split(" | "))
            told |= dict.fromkeys(re.findall(r"`(\w+)`", names), fate)
    return told


def asked(kind: type[ConversationBody] = MessagesBody, **fields: Any) -> InferenceRequest:
    """The chat of a body as it comes over HTTP."""
    least = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
    if kind is MessagesBody:
        least["max_tokens"] = 8
    body = validated(kind, json.dumps(least | fields).encode())
    origin = {"id": "i", "completion_type": CompletionType.CHAT, "created_at": 1.0, "deadline": 2.0, "reply_to": "r"}
    return body.request(**origin, model=body.model)


def test_the_table_is_complete() -> None:
    assert table().keys() == MessagesBody.model_fields.keys() | DOCUMENTED
    assert table().keys() == SAMPLES.keys()


@pytest.mark.parametrize(("name", "fate"), table().items())
def test_a_parameter_fares_as_the_table_says(name: str, fate: str) -> None:
    sample, others = SAMPLES[name]
    if fate == "refused":
        with pytest.raises(InvalidRequest) as refused:
            asked(**{name: sample})
        assert (refused.value.status, refused.value.param) == (400, name)
        return
    does = asked(**others | {name: sample}) != asked(**others) or name == "service_tier"  # as the client's key says
    assert {True: "honoured", False: "no effect"}[does] == fate


def test_a_body_that_counts_tokens_takes_what_makes_the_prompt() -> None:
    documented = {
        *message_count_tokens_params.MessageCountTokensParams.__annotations__,
        *beta_count_tokens_params.MessageCountTokensParams.__annotations__,
    }
    refused = {name for name, fate in table().items() if fate == "refused"}
    assert documented - HEADERS - CountTokensBody.model_fields.keys() == documented & refused


def literals(param: Any, member: str) -> list[str]:
    """The values that a member of a parameter may have."""
    kinds = get_args(param) or (param,)
    hints = [get_type_hints(kind).get(member) for kind in kinds if isinstance(kind, type)]
    return re.findall(r"'(\w+)'", " ".join(map(repr, hints)))


@pytest.mark.parametrize("kind", [MessagesBody, CountTokensBody])
def test_every_value_that_the_sdk_documents_is_taken(kind: type[ConversationBody]) -> None:
    for value in literals(BetaThinkingConfigParam, "type"):
        shown = asked(kind, thinking={"type": value, "budget_tokens": 1024}).chat_template_kwargs["enable_thinking"]
        assert shown is (value != "disabled")
    for value in literals(BetaThinkingConfigParam, "display"):
        asked(kind, thinking={"type": "adaptive", "display": value})
    for value in literals(BetaOutputConfigParam, "effort"):
        assert asked(kind, output_config={"effort": value}).chat_template_kwargs["reasoning_effort"] == value
    choices = literals(BetaToolChoiceParam, "type")
    assert sorted(choices) == ["any", "auto", "none", "tool"]
    for value in choices:
        asked(kind, **TOOLS, tool_choice={"type": value} | ({"name": "f"} if value == "tool" else {}))


@pytest.mark.parametrize("role", ["user", "assistant", "result"])
def test_blocks_that_are_not_served_are_refused_by_name(role: str) -> None:
    section = PAGE.read_text().split("## Content", 1)[1].split("\n## ", 1)[0]
    served = {"redacted_thinking", *re.findall(r"^\| `(\w+)`", section, re.MULTILINE)}
    refused = set(literals(BetaContentBlockParam, "type")) - served
    assert {"image", "search_result", "server_tool_use"} < refused
    for kind in refused:
        content: Any = [{"type": kind}]
        if role == "result":
            content = [{"type": "tool_result", "tool_use_id": "t", "content": content}]
        with pytest.raises(InvalidRequest, match=repr(kind)):
            asked(messages=[{"role": role.replace("result", "user"), "content": content}])


@pytest.mark.parametrize(
    ("last", "goes_on"),
    [
        ({"role": "user", "content": "a"}, False),
        ({"role": "assistant", "content": "The answer is"}, True),
        ({"role": "assistant", "content": [{"type": "text", "text": "The answer is"}]}, True),
        ({"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}, False),
    ],
)
def test_an_answer_goes_on_from_the_last_message_of_the_assistant(last: dict[str, Any], goes_on: bool) -> None:
    fields = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}, last]}
    body = validated(MessagesBody, json.dumps(fields).encode())
    made = body.request(
        id="a", completion_type=CompletionType.CHAT, model="m", created_at=0.0, deadline=1.0, reply_to=""
    )
    assert made.chat_template_kwargs.get("continue_final_message", False) is goes_on


def said(role: str, *content: dict[str, Any]) -> dict[str, Any]:
    return {"role": role, "content": list(content)}


@pytest.mark.parametrize(
    "messages",
    [
        [said("user", {"type": "tool_result", "tool_use_id": "t"})],
        [
            said("user", {"type": "tool_result", "tool_use_id": "t"}),
            said("assistant", {"type": "tool_use", "id": "t", "name": "f", "input": {}}),
        ],
    ],
)
def test_a_result_needs_its_call(messages: list[dict[str, Any]]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        asked(messages=messages)
    assert refused.value.param == "messages[0].content[0].tool_use_id"


def test_two_tools_have_two_names() -> None:
    with pytest.raises(InvalidRequest) as refused:
        asked(tools=[{"name": "f", "input_schema": {}}] * 2)
    assert refused.value.param == "tools"


def test_the_input_of_a_call_may_have_numbers_of_any_size() -> None:
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 10**30}}
    (message,) = asked(messages=[said("assistant", call)]).messages
    assert message["tool_calls"][0]["function"]["arguments"] == f'{{"a":{10**30}}}'


def test_what_is_refused_names_its_member_and_what_is_served_there() -> None:
    with pytest.raises(InvalidRequest) as refused:
        asked(messages=[{"role": "user", "content": [{"type": "image"}]}])
    assert refused.value.param == "messages[0].content[0].type"
    served = "'image' is none of 'text', 'document', 'tool_result'"
    assert str(refused.value) == f"Invalid 'messages[0].content[0].type': {served}."
    with pytest.raises(InvalidRequest, match=r"^Missing required parameter: 'messages\[0\].role'\.$"):
        asked(messages=[{"content": "a"}])
