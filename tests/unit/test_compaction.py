"""`POST /v1/responses/compact`: what the model is asked, what becomes of the conversation, and how it goes on."""

import json
from typing import Any

import pytest
from openai.types.responses import CompactedResponse
from openai.types.responses.response_compact_params import ResponseCompactParams

from forebay_api.http.bodies import validated
from forebay_api.openai.responses.body import CompactBody
from forebay_api.openai.responses.compaction import ASK, MAX_SUMMARY_TOKENS, opened, sealed
from forebay_api.openai.responses.format import CompactFormat
from forebay_contracts.wire.errors import InferenceFailed
from forebay_contracts.wire.request import CompletionType, InferenceRequest
from support.responses import REQUEST_ID, body, ended, request, text

ITEMS: list[dict[str, Any]] = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "input_text", "text": "What is the weather?"}]},
    {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "Rain."}]},
    {"role": "assistant", "content": "It rains. ☂"},
]


def asked(**fields: Any) -> tuple[CompactBody, InferenceRequest]:
    compact = validated(CompactBody, json.dumps({"model": "m", "input": ITEMS} | fields).encode())
    origin = {"completion_type": CompletionType.CHAT, "model": "m", "created_at": 1.5, "deadline": 2.0, "reply_to": ""}
    return compact, compact.request(compact.items(REQUEST_ID), id=REQUEST_ID, **origin)


def compacted(summary: str) -> list[dict[str, Any]]:
    """The output of a compaction that the model answers with `summary`."""
    compact, queued = asked()
    whole = CompactFormat(queued, compact.items(REQUEST_ID)).whole([text(summary), text(" ")], ended())
    # OpenAI's own answers have messages of users, which its SDK's type of `output` has not.
    made: dict[str, Any] = json.loads(whole)
    CompactedResponse.model_validate(made | {"output": made["output"][-1:]})
    assert (made["object"], made["created_at"]) == ("response.compaction", 1)
    output: list[dict[str, Any]] = made["output"]
    return output


def test_the_model_is_asked_for_a_summary_of_all_of_it() -> None:
    _, queued = asked(instructions="Speak.", tools=[{"type": "function", "name": "f"}])
    roles = ["system", "system", "user", "assistant", "tool", "assistant", "user"]
    assert [message["role"] for message in queued.messages] == roles
    assert queued.messages[-1]["content"] == ASK
    assert (queued.sampling.max_tokens, queued.fit_max_tokens, queued.stream) == (MAX_SUMMARY_TOKENS, True, False)


def test_what_was_asked_stays_and_the_rest_is_a_summary() -> None:
    developer, user, compaction = compacted(" It rains ☂ in Oslo.")
    assert (developer["role"], user["role"], compaction["type"]) == ("developer", "user", "compaction")
    assert opened(compaction["encrypted_content"]) == "It rains ☂ in Oslo."
    assert len({item["id"] for item in (developer, user, compaction)}) == 3


def test_the_conversation_goes_on_from_it() -> None:
    following = body(input=[*compacted("It rains."), {"role": "user", "content": "And now?"}])
    assert [(message["role"], message["content"]) for message in request(following).messages] == [
        ("system", "Be brief."),
        ("user", "What is the weather?"),
        ("assistant", "Summary of the conversation so far:\nIt rains."),
        ("user", "And now?"),
    ]


def test_a_conversation_without_a_summary_is_no_success() -> None:
    with pytest.raises(InferenceFailed):
        compacted("")


def test_it_takes_what_the_sdk_documents() -> None:
    refused = {"image", "prompt_cache_options"}
    assert ResponseCompactParams.__annotations__.keys() - CompactBody.model_fields.keys() == refused


@pytest.mark.parametrize("content", ["", "gAAAABpM0Yj", "é", sealed("a")[:-3]])
def test_what_another_service_compacted_cannot_be_read(content: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        opened(content)
