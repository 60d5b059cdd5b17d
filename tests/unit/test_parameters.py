"""The table of parameters in docs/engine.md, compared with the schemas and with what the OpenAI SDK documents."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from forebay_api.http.bodies import validated
from forebay_api.openai.chat.body import ChatCompletionBody
from forebay_api.openai.completions.body import CompletionBody
from forebay_contracts.wire.errors import InvalidRequest
from forebay_contracts.wire.request import CompletionType, Sampling

PAGE = Path(__file__).parents[2] / "docs" / "engine.md"
Body = ChatCompletionBody | CompletionBody
BODIES: dict[str, type[Body]] = {"chat": ChatCompletionBody, "completions": CompletionBody}
LEAST: dict[str, dict[str, Any]] = {
    "chat": {"model": "m", "messages": [{"role": "user", "content": "a"}]},
    "completions": {"model": "m", "prompt": "a"},
}
DOCUMENTED = {
    "chat": {
        *chat_create_params.CompletionCreateParamsBase.__annotations__,
        *chat_create_params.CompletionCreateParamsStreaming.__annotations__,
    },
    "completions": {
        *completion_create_params.CompletionCreateParamsBase.__annotations__,
        *completion_create_params.CompletionCreateParamsStreaming.__annotations__,
    },
}
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
# A value that is not the default of each, and what it cannot be without.
SAMPLES: dict[str, tuple[Any, dict[str, Any]]] = {
    "audio": ({"voice": "alloy", "format": "wav"}, {}),
    "best_of": (3, {}),
    "chat_template_kwargs": ({"a": 1}, {}),
    "echo": (True, {}),
    "frequency_penalty": (0.5, {}),
    "function_call": ("auto", {}),
    "functions": ([{"name": "f"}], {}),
    "ignore_eos": (True, {}),
    "logit_bias": ({"5": 1.5}, {}),
    "logprobs": (True, {}),
    "max_completion_tokens": (3, {}),
    "max_tokens": (3, {}),
    "messages": ([{"role": "user", "content": "b"}], {}),
    "metadata": ({"a": "b"}, {}),
    "min_p": (0.1, {}),
    "modalities": (["text"], {}),
    "model": ("other", {}),
    "moderation": ({"model": "m"}, {}),
    "n": (2, {}),
    "parallel_tool_calls": (False, {"tools": TOOLS}),
    "prediction": ({"type": "content", "content": "a"}, {}),
    "presence_penalty": (0.5, {}),
    "prompt": ("b", {}),
    "prompt_cache_key": ("a", {}),
    "prompt_cache_options": ({}, {}),
    "prompt_cache_retention": ("24h", {}),
    "reasoning_effort": ("none", {}),
    "repetition_penalty": (1.5, {}),
    "response_format": ({"type": "json_object"}, {}),
    "safety_identifier": ("a", {}),
    "seed": (5, {}),
    "service_tier": ("auto", {}),
    "stop": ("a", {}),
    "store": (True, {}),
    "stream": (True, {}),
    "stream_options": ({"include_usage": True}, {"stream": True}),
    "suffix": ("a", {}),
    "temperature": (0.5, {}),
    "tool_choice": ("required", {"tools": TOOLS}),
    "tools": (TOOLS, {}),
    "top_k": (5, {}),
    "top_logprobs": (2, {"logprobs": True}),
    "top_p": (0.5, {}),
    "user": ("a", {}),
    "verbosity": ("low", {}),
    "web_search_options": ({}, {}),
}
OTHER_SAMPLES = {("completions", "logprobs"): 2}


def table() -> dict[tuple[str, str], str]:
    """For endpoint and parameter, what the page says becomes of it."""
    section = PAGE.read_text().split("## Parameters", 1)[1].split("\n## ", 1)[0]
    told: dict[tuple[str, str], str] = {}
    for line in section.splitlines():
        if not line.startswith("| `"):
            continue
        names, chat, completions, *_ = (cell.strip() for cell in line.strip("|").split(" | "))
        for name in re.findall(r"`(\w+)`", names):
            for endpoint, fate in (("chat", chat), ("completions", completions)):
                assert (endpoint, name) not in told, f"{name} stands there twice"
                told[endpoint, name] = fate
    return told


def read(endpoint: str, fields: dict[str, Any]) -> Body:
    return validated(BODIES[endpoint], json.dumps(fields).encode())


def meaning(endpoint: str, fields: dict[str, Any]) -> tuple[Any, ...]:
    """All that a body comes to."""
    body = read(endpoint, fields)
    kind = CompletionType(endpoint.removesuffix("s"))
    request = body.request(
        id="i", completion_type=kind, model=body.model, created_at=0, deadline=0, reply_to="", key=None
    )
    return request, body.stream_options is not None and body.stream_options.include_usage


@pytest.mark.parametrize("endpoint", BODIES)
def test_the_table_is_complete(endpoint: str) -> None:
    known = {name for (where, name), fate in table().items() if where == endpoint and fate != "unknown"}
    assert known == BODIES[endpoint].model_fields.keys() | DOCUMENTED[endpoint]
    assert {name for _, name in table()} == SAMPLES.keys()


@pytest.mark.parametrize(("endpoint", "name"), table())
def test_a_parameter_fares_as_the_table_says(endpoint: str, name: str) -> None:
    sample, others = SAMPLES[name]
    plain = LEAST[endpoint] | ({} if table()[endpoint, name] in ("unknown", "refused") else others)
    given = plain | {name: OTHER_SAMPLES.get((endpoint, name), sample)}
    match table()[endpoint, name]:
        case "honoured":
            assert meaning(endpoint, given) != meaning(endpoint, plain)
        case "no effect":
            assert meaning(endpoint, given) == meaning(endpoint, plain)
        case "refused" | "unknown":
            with pytest.raises(InvalidRequest) as refused:
                read(endpoint, given)
            assert (refused.value.status, refused.value.param) == (400, name)
            assert name in refused.value.message
        case other:
            raise AssertionError(f"{name} is said to be {other!r}")


@pytest.mark.parametrize(("name", "value"), [("modalities", ["text", "audio"]), ("reasoning_effort", "much")])
def test_what_would_have_an_effect_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read("chat", LEAST["chat"] | {name: value})
    assert str(refused.value.param).startswith(name)


def test_a_body_and_what_waits_in_the_queue_have_the_same_defaults() -> None:
    body = ChatCompletionBody(model="m", messages=[{"role": "user", "content": "hi"}])
    queued = Sampling()
    for name in (type(body).model_fields.keys() & Sampling.model_fields.keys()) - {"logprobs"}:
        assert getattr(body, name) == getattr(queued, name), name
