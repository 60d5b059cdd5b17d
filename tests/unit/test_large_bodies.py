"""Large bodies: however many faults one has, few are collected, and the first is told."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from forebay_api.http.bodies import validated
from forebay_api.openai.body import SLICE
from forebay_api.routes import ENDPOINTS
from forebay_contracts.wire.errors import InvalidRequest

BODIES = {endpoint.completion_type.value: endpoint.body for endpoint in reversed(ENDPOINTS)}
MANY = 50_000
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
TOOL = {"type": "function", "function": {"name": "f"}}


def members(value: Any, prefix: str = "k") -> dict[str, Any]:
    return {f"{prefix}{number}": value for number in range(MANY)}


def content(value: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": value}]}


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        *(("completion", {"prompt": [item] * MANY}, "prompt[0]") for item in ({}, [], 0.5, None, True)),
        ("completion", {"prompt": [7] * MANY + ["a"]}, f"prompt[{MANY}]"),
        ("completion", {"prompt": [["a"] * MANY]}, "prompt[0][0]"),
        *(("embedding", {"input": [item] * MANY}, "input[0]") for item in ({}, [], 0.5, "")),
        *(("chat", {"messages": [item] * MANY}, "messages[0]") for item in (1, "a", [])),
        ("chat", {"messages": [{}] * MANY}, "messages[0].role"),
        ("chat", content([{}] * MANY), "messages[0].content[0].type"),
        ("chat", content([1] * MANY), "messages[0].content[0]"),
        (
            "chat",
            {"messages": [{"role": "assistant", "tool_calls": [{}] * MANY}]},
            "messages[0].tool_calls[0].id",
        ),
        ("chat", CHAT | {"tools": [{}] * MANY}, "tools[0].type"),
        ("chat", CHAT | {"logit_bias": members(1)}, "logit_bias.k0"),
        ("chat", CHAT | {"logit_bias": members("x", "") | {"5": 1}}, "logit_bias.0"),
        ("chat", CHAT | {"metadata": members(1)}, "metadata.k0"),
        ("chat", CHAT | {"stop": [1] * MANY}, "stop[0]"),
        ("chat", CHAT | {"modalities": [1] * MANY}, "modalities[0]"),
        ("chat", CHAT | members(1), "k0"),
        ("chat", CHAT | {"stream": True, "stream_options": members(1)}, "stream_options.k0"),
        ("chat", CHAT | {"tools": [TOOL], "tool_choice": members(1)}, "tool_choice.type"),
        ("chat", CHAT | {"response_format": {"type": "text"} | members(1)}, "response_format.k0"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_few_faults_are_collected_and_the_first_is_told(kind: str, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        validated(BODIES[kind], json.dumps({"model": "m"} | fields).encode())
    assert refused.value.param == param
    assert isinstance(refused.value.__cause__, ValidationError)
    assert refused.value.__cause__.error_count() <= 2 * SLICE


def test_large_objects_keep_all_their_members() -> None:
    given = CHAT | {"logit_bias": members(1, ""), "metadata": members("a")}
    body: Any = validated(BODIES["chat"], json.dumps(given).encode())
    assert body.logit_bias == dict.fromkeys(range(MANY), 1)
    assert body.metadata == members("a")
