"""The table of parameters in docs/responses.md, compared with the schema and with what the OpenAI SDK documents."""

import re
from pathlib import Path
from typing import Any

import pytest
from openai.types.responses import response_create_params
from openai.types.responses.input_token_count_params import InputTokenCountParams

from forebay_api.openai.responses.body import InputTokensBody, ResponseBody
from forebay_contracts.wire.errors import InvalidRequest
from support.responses import body, fresh, request

PAGE = Path(__file__).parents[2] / "docs" / "responses.md"
DOCUMENTED = {
    *response_create_params.ResponseCreateParamsBase.__annotations__,
    *response_create_params.ResponseCreateParamsStreaming.__annotations__,
}
TOOLS = {"tools": [{"type": "function", "name": "f"}]}
LOGPROBS = ["message.output_text.logprobs"]
# A value that is not the default of each, and what it cannot be without.
SAMPLES: dict[str, tuple[Any, dict[str, Any]]] = {
    "access_programs": ({"cyber": "standard"}, {}),
    "background": (True, {}),
    "background_options": ({"completion_window": "2h"}, {}),
    "client_metadata": ({"a": "b"}, {}),
    "context_management": ([{"type": "compaction"}], {}),
    "conversation": ("conv_1", {}),
    "frequency_penalty": (0.5, {}),
    "image": ({"context_compression": "auto"}, {}),
    "include": (LOGPROBS, {}),
    "input": ([{"role": "user", "content": "b"}], {}),
    "instructions": ("Be brief.", {}),
    "max_output_tokens": (3, {}),
    "max_tool_calls": (3, {}),
    "metadata": ({"a": "b"}, {}),
    "model": ("other", {}),
    "moderation": ({"model": "m"}, {}),
    "parallel_tool_calls": (False, TOOLS),
    "presence_penalty": (0.5, {}),
    "previous_response_id": ("resp_1", {}),
    "prompt": ({"id": "p"}, {}),
    "prompt_cache_key": ("a", {}),
    "prompt_cache_options": ({"mode": "implicit"}, {}),
    "prompt_cache_retention": ("24h", {}),
    "reasoning": ({"effort": "low"}, {}),
    "safety_identifier": ("a", {}),
    "service_tier": ("priority", {}),
    "store": (False, {}),
    "stream": (True, {}),
    "stream_options": ({"include_obfuscation": True}, {"stream": True}),
    "temperature": (0.5, {}),
    "text": ({"format": {"type": "json_object"}}, {}),
    "tool_choice": ("required", TOOLS),
    "tools": (TOOLS["tools"], {}),
    "top_logprobs": (2, {"include": LOGPROBS}),
    "top_p": (0.5, {}),
    "truncation": ("auto", {}),
    "user": ("a", {}),
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


def meaning(fields: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What a body does, and what its response shows of it."""
    of = body(**fields)
    record = fresh(of)
    # Of the service tier, the client's key decides what becomes of it.
    return (of.model, of.service_tier, request(of), record.model_copy(update={"parameters": {}})), record.parameters


def test_the_table_is_complete() -> None:
    assert table().keys() == ResponseBody.model_fields.keys() | DOCUMENTED
    assert table().keys() == SAMPLES.keys()


@pytest.mark.parametrize(("name", "fate"), table().items())
def test_a_parameter_fares_as_the_table_says(name: str, fate: str) -> None:
    sample, others = SAMPLES[name]
    if fate == "refused":
        with pytest.raises(InvalidRequest) as refused:
            body(**{name: sample})
        assert (refused.value.status, refused.value.param, refused.value.code) == (400, name, "unknown_parameter")
        return
    (did, showed), (does, shows) = meaning(others), meaning(others | {name: sample})
    fates = {(True, True): "honoured", (True, False): "honoured", (False, True): "shown", (False, False): "no effect"}
    assert fates[did != does, showed != shows] == fate


def test_a_body_that_counts_tokens_takes_what_makes_the_prompt() -> None:
    assert InputTokenCountParams.__annotations__.keys() - InputTokensBody.model_fields.keys() == {"personality"}
