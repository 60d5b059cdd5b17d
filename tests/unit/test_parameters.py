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
    "add_generation_prompt": (False, {}),
    "add_special_tokens": (False, {}),
    "allowed_token_ids": ([1], {}),
    "audio": ({"voice": "alloy", "format": "wav"}, {}),
    "bad_words": (["a"], {}),
    "best_of": (3, {}),
    "cache_salt": ("a", {}),
    "chat_template": ("a", {}),
    "chat_template_kwargs": ({"a": 1}, {}),
    "continue_final_message": (True, {}),
    "documents": ([{"title": "a"}], {}),
    "echo": (True, {}),
    "frequency_penalty": (0.5, {}),
    "function_call": ("auto", {}),
    "functions": ([{"name": "f"}], {}),
    "grammar": ('root ::= "a"', {}),
    "guided_choice": (["a", "b"], {}),
    "guided_grammar": ('start: "a"', {}),
    "guided_json": ({"type": "integer"}, {}),
    "guided_regex": ("a+", {}),
    "ignore_eos": (True, {}),
    "include_stop_str_in_output": (True, {}),
    "keep_alive": ("5m", {}),
    "length_penalty": (0.5, {}),
    "logprob_token_ids": ([1], {}),
    "logit_bias": ({"5": 1.5}, {}),
    "logprobs": (True, {}),
    "max_completion_tokens": (3, {}),
    "max_tokens": (3, {}),
    "messages": ([{"role": "user", "content": "b"}], {}),
    "metadata": ({"a": "b"}, {}),
    "min_p": (0.1, {}),
    "min_tokens": (1, {}),
    "mm_processor_kwargs": ({}, {}),
    "modalities": (["text"], {}),
    "model": ("other", {}),
    "moderation": ({"model": "m"}, {}),
    "n": (2, {}),
    "parallel_tool_calls": (False, {"tools": TOOLS}),
    "prediction": ({"type": "content", "content": "a"}, {}),
    "presence_penalty": (0.5, {}),
    "priority": (0, {}),
    "prompt": ("b", {}),
    "prompt_cache_key": ("a", {}),
    "prompt_cache_options": ({}, {}),
    "prompt_cache_retention": ("24h", {}),
    "prompt_embeds": ("AA==", {}),
    "prompt_logprobs": (2, {}),
    "reasoning_effort": ("high", {}),
    "repetition_detection": ({}, {}),
    "repetition_penalty": (1.5, {}),
    "request_id": ("a", {}),
    "response_format": ({"type": "json_object"}, {}),
    "return_token_ids": (True, {}),
    "return_tokens_as_token_ids": (True, {}),
    "safety_identifier": ("a", {}),
    "seed": (5, {}),
    "service_tier": ("flex", {}),
    "skip_special_tokens": (False, {}),
    "spaces_between_special_tokens": (False, {}),
    "stop": ("a", {}),
    "stop_token_ids": ([1], {}),
    "store": (True, {}),
    "stream": (True, {}),
    "stream_options": ({"include_usage": True}, {"stream": True}),
    "structured_outputs": ({"regex": "a"}, {}),
    "suffix": ("a", {}),
    "temperature": (0.5, {}),
    "thinking_token_budget": (5, {}),
    "tool_choice": ("required", {"tools": TOOLS}),
    "tools": (TOOLS, {}),
    "top_k": (5, {}),
    "top_logprobs": (2, {"logprobs": True}),
    "top_p": (0.5, {}),
    "truncate_prompt_tokens": (5, {}),
    "use_beam_search": (True, {}),
    "user": ("a", {}),
    "verbosity": ("low", {}),
    "vllm_xargs": ({}, {}),
    "web_search_options": ({}, {}),
}
OTHER_SAMPLES = {("completions", "logprobs"): 2, ("chat", "add_special_tokens"): True}


def table() -> dict[tuple[str, str], str]:
    """For endpoint and parameter, what the page says becomes of it."""
    section = PAGE.read_text().split("## Parameters", 1)[1].split("\n## ", 1)[0]
    told: dict[tuple[str, str], str] = {}
    for line in section.splitlines():
        if not line.startswith("| `"):
            continue
        names, chat, completions, vllm, *_ = (cell.strip() for cell in line.strip("|").split(" | "))
        assert vllm in ("yes", "ignored", "refused"), names
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
    kept = (body.store, body.metadata) if kind is CompletionType.CHAT else ()
    # Of the service tier, the client's key decides what becomes of it.
    return request, body.stream_options, body.return_token_ids, body.prompt_logprobs, body.service_tier, kept


@pytest.mark.parametrize("endpoint", BODIES)
def test_the_table_is_complete(endpoint: str) -> None:
    fates = {name: fate for (where, name), fate in table().items() if where == endpoint}
    taken = {name for name, fate in fates.items() if fate in ("honoured", "no effect", "default only")}
    assert taken == BODIES[endpoint].model_fields.keys()
    assert {name for name, fate in fates.items() if fate != "unknown"} >= DOCUMENTED[endpoint]
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
        case "refused" | "unknown" | "default only" as fate:
            if fate == "default only":
                default = BODIES[endpoint].model_fields[name].default
                assert meaning(endpoint, plain | {name: default}) == meaning(endpoint, plain)
            with pytest.raises(InvalidRequest) as refused:
                read(endpoint, given)
            assert (refused.value.status, refused.value.param) == (400, name)
            assert name in refused.value.message
        case other:
            raise AssertionError(f"{name} is said to be {other!r}")


SAME = [
    ({"top_k": -1}, {"top_k": 0}),
    ({"max_tokens": -1}, {"max_tokens": None}),
    ({"stop": ""}, {"stop": []}),
    ({"stop": ["", "a"]}, {"stop": "a"}),
    ({"grammar": 'root ::= "a"'}, {"structured_outputs": {"grammar": 'root ::= "a"'}}),
    ({"guided_json": '{"type": "integer"}'}, {"guided_json": {"type": "integer"}}),
    (
        {"response_format": {"type": "json_object", "schema": {"type": "integer"}}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": {"type": "integer"}},
            }
        },
    ),
    ({"response_format": {"type": "text"}, "guided_regex": "a"}, {"guided_regex": "a"}),
    ({"reasoning_effort": "high"}, {"chat_template_kwargs": {"reasoning_effort": "high"}}),
    (
        {"continue_final_message": True},
        {"chat_template_kwargs": {"add_generation_prompt": False, "continue_final_message": True}},
    ),
    ({"continue_final_message": True, "add_generation_prompt": False}, {"continue_final_message": True}),
]


def without_param(found: tuple[Any, ...]) -> tuple[Any, ...]:
    request, *rest = found
    if (form := request.response_format) is not None:
        request = request.model_copy(update={"response_format": {k: v for k, v in form.items() if k != "param"}})
    return request, *rest


@pytest.mark.parametrize(("one", "other"), SAME)
def test_two_ways_to_say_the_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert without_param(meaning("chat", LEAST["chat"] | one)) == without_param(meaning("chat", LEAST["chat"] | other))


def test_a_completion_without_a_limit() -> None:
    assert read("completions", LEAST["completions"] | {"max_tokens": -1}).most_tokens is None
    assert read("completions", LEAST["completions"] | {"max_tokens": None}).most_tokens == 16


def test_what_of_the_prompt_is_sent_back() -> None:
    def asked(**fields: Any) -> tuple[bool, int | None]:
        request = meaning("completions", LEAST["completions"] | fields)[0]
        return request.return_prompt, request.prompt_logprobs

    assert asked(echo=True) == asked(logprobs=1) == (False, None)
    assert asked(echo=True, logprobs=0, max_tokens=0) == (True, 0)
    assert asked(echo=True, logprobs=2, prompt_logprobs=5) == asked(prompt_logprobs=5, max_tokens=0) == (True, 5)
    assert asked(return_token_ids=True) == (True, None)
    usage = {"include_usage": True, "continuous_usage_stats": True}
    assert asked(stream=True, stream_options=usage) == (True, None)
    assert asked(stream=True, stream_options={"continuous_usage_stats": True}) == (False, None)


MISFITS = [
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"reasoning_effort": "some"}, "reasoning_effort"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
    ({"top_k": -2}, "top_k"),
    ({"max_tokens": -2}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs.structural_tag"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_choice": []}, "guided_choice"),
    ({"response_format": {"type": "json_object", "schema": {}, "bogus": 1}}, "response_format.bogus"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
]


@pytest.mark.parametrize(("fields", "param"), MISFITS)
def test_what_would_have_an_effect_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read("chat", LEAST["chat"] | fields)
    assert str(refused.value.param).startswith(param)


def test_a_body_and_what_waits_in_the_queue_have_the_same_defaults() -> None:
    body = ChatCompletionBody(model="m", messages=[{"role": "user", "content": "hi"}])
    queued = Sampling()
    for name in (type(body).model_fields.keys() & Sampling.model_fields.keys()) - {"logprobs"}:
        assert getattr(body, name) == getattr(queued, name), name


@pytest.mark.parametrize("metadata", [{"a": "b" * 513}, {str(number): "" for number in range(17)}])
def test_a_chat_has_the_same_bounds_of_metadata_if_it_is_stored(metadata: dict[str, str]) -> None:
    chat = {"model": "m", "messages": [{"role": "user", "content": "a"}], "metadata": metadata}
    assert validated(ChatCompletionBody, json.dumps(chat).encode()).metadata == metadata
    with pytest.raises(InvalidRequest) as refused:
        validated(ChatCompletionBody, json.dumps(chat | {"store": True}).encode())
    assert refused.value.param == "metadata"
