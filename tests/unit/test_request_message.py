"""A request as JSON: what a worker reads is what the api has written, whatever is in it."""

import json
import math
from typing import Any

import pytest

from forebay_contracts.wire.request import CompletionType, InferenceRequest, Sampling

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"maximum": 10**30, "default": [None, 1e22, 0.1]}}}


def request(**fields: Any) -> InferenceRequest:
    origin = {"id": "a", "completion_type": CompletionType.CHAT, "model": "m", "created_at": 1.5, "deadline": 2.0}
    return InferenceRequest(**origin, reply_to="inference.replies.api.a", **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": ({"role": "user", "content": 'é “🙂” \\ "quoted" \n\t\x00\x7f'},)},
        {"sampling": Sampling(logit_bias={5: 1.5, 2**40: -100}, seed=-(2**63), stop=("a", "b"), unset=("top_k",))},
        {"prompts": ("text", (1, 2, 3)), "best_of": 2, "echo": True},
        {"prompts": ((2**63, 2**64, 10**30),)},
        {"tools": (TOOL,), "tool_choice": {"type": "function"}},
    ],
)
def test_a_worker_reads_what_the_api_wrote(fields: dict[str, Any]) -> None:
    wanted = request(**fields)
    assert InferenceRequest.model_validate_json(wanted.encode()) == wanted
    assert json.loads(wanted.encode()).keys() - fields == {"schema_version", *request().model_fields_set}


@pytest.mark.parametrize("beside", [0, 10**30])
def test_numbers_that_json_lacks_are_null(beside: int) -> None:
    sent = request(chat_template_kwargs={"value": math.nan, "beside": beside}).encode()
    assert json.loads(sent)["chat_template_kwargs"] == {"value": None, "beside": beside}
