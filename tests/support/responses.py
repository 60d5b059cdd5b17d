"""Responses for unit tests: a body as it comes, tools that clients send, its record, and frames that answer it."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel

from forebay_api.http.bodies import validated
from forebay_api.openai.responses.body import ResponseBody
from forebay_api.openai.responses.events import ResponseFold
from forebay_api.openai.responses.record import ResponseRecord
from forebay_contracts.wire.frames import Completed, Delta, Failed, FinishedChoice, Frame, Started, TokenLogprob
from forebay_contracts.wire.request import CompletionType, InferenceRequest
from forebay_contracts.wire.state import Usage

REQUEST_ID = "0b7ed6ce-3c9f-4a36-9d33-6c2f4c1f2a10"
HEX = REQUEST_ID.replace("-", "")
ENDED_AT = 1_800_000_010.5
USAGE = Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=3, reasoning_tokens=2)
EVENTS: dict[str, type[BaseModel]] = {
    get_args(kind.model_fields["type"].annotation)[0]: kind for kind in get_args(get_args(ResponseStreamEvent)[0])
}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"type": "function", "name": "f", "description": "Does f.", "strict": False, "parameters": SCHEMA}
NAMESPACE = {"type": "namespace", "name": "agents", "description": "Agents.", "tools": [FUNCTION]}
CUSTOM = {
    "type": "custom",
    "name": "patch",
    "description": "Applies a patch.",
    "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "a"'},
}
HOSTED = [
    {"type": "web_search", "external_web_access": False},
    {"type": "web_search_preview_2025_03_11"},
    {"type": "file_search", "vector_store_ids": ["v"]},
    {"type": "code_interpreter", "container": {"type": "auto"}},
    {"type": "computer_use_preview", "display_width": 1, "display_height": 1, "environment": "linux"},
    {"type": "mcp", "server_label": "s", "server_url": "https://example.com"},
    {"type": "image_generation"},
    {"type": "local_shell"},
    {"type": "shell"},
    {"type": "apply_patch"},
    {"type": "tool_search"},
]


def body(**fields: Any) -> ResponseBody:
    """A body as it comes over HTTP."""
    return validated(ResponseBody, json.dumps({"model": "m", "input": "hello"} | fields).encode())


def request(of: ResponseBody, items: Sequence[dict[str, Any]] | None = None) -> InferenceRequest:
    """The chat of a body, by default without what was before it."""
    return of.request(
        of.items(REQUEST_ID) if items is None else items,
        id=REQUEST_ID,
        completion_type=CompletionType.CHAT,
        model="m",
        created_at=1_800_000_000.25,
        deadline=1_800_000_300.25,
        reply_to="",
        key="alice",
    )


def fresh(of: ResponseBody) -> ResponseRecord:
    """The record of a body, before it is stored."""
    return of.record(of.items(REQUEST_ID), request(of))


def record(**fields: Any) -> ResponseRecord:
    """The record of a body, as it is read from the store."""
    return ResponseRecord.model_validate_json(fresh(body(**fields)).encode())


def text(value: str, **fields: Any) -> Delta:
    return Delta(attempt=1, text=value, **fields)


def call(index: int, name: str, *arguments: str) -> list[Delta]:
    """The deltas of one call: its name, then its arguments in pieces."""
    head = {"index": index, "id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": ""}}
    pieces = [head, *({"index": index, "function": {"arguments": piece}} for piece in arguments)]
    return [Delta(attempt=1, tool_calls=(piece,)) for piece in pieces]


def logprob(token: str) -> TokenLogprob:
    top = {"token": 1, "text": token, "logprob": -0.5}
    return TokenLogprob.model_validate(top | {"top": [top]})


def ended(reason: str = "stop", *deltas: Delta) -> Completed:
    return Completed(
        attempt=1,
        choices=(FinishedChoice(index=0, finish_reason=reason, tokens=5),),
        usage=USAGE,
        deltas=deltas,
        at=ENDED_AT,
    )


def rendered(of: ResponseRecord, frames: Iterable[Frame]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All events of an answer, and the response at its end."""
    fold = ResponseFold(of)
    events = fold.opening()
    for frame in frames:
        match frame:
            case Started():
                events += fold.started()
            case Delta():
                events += fold.delta(frame)
            case Completed():
                for delta in frame.deltas:
                    events += fold.delta(delta)
                events += fold.completed(frame)
            case Failed():
                events += fold.failed(frame.status, frame.code, frame.message)
    return events, fold.response()


def check_types(events: list[dict[str, Any]], response: dict[str, Any]) -> None:
    """Hold events and response to the OpenAI SDK's own types; raises pydantic's ValidationError."""
    for event in events:
        EVENTS[event["type"]].model_validate_json(json.dumps(event))
    Response.model_validate_json(json.dumps(response))
