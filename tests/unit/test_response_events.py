"""The events of a response and its object: OpenAI's types and order, the same however often they are made."""

import copy
import json
from collections.abc import Iterable
from typing import Any

import orjson
import pytest
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState

from forebay_api.openai.responses.events import ResponseFold, sse
from forebay_api.openai.responses.output import CustomInput
from forebay_contracts.wire.frames import Completed, Delta, Failed, Frame, Started
from support.responses import (
    ENDED_AT,
    EVENTS,
    HEX,
    body,
    call,
    check_types,
    ended,
    fresh,
    logprob,
    record,
    rendered,
    text,
)

STARTED = Started(attempt=1, worker="w")
FUNCTION = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
NAMESPACE = {"type": "namespace", "name": "files", "description": "Files.", "tools": [FUNCTION | {"name": "read"}]}
PATCH = {"type": "custom", "name": "patch", "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "a"'}}
TOOLS = [FUNCTION, NAMESPACE, PATCH]
LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}

PLAIN: list[Frame] = [STARTED, text("Hel"), text("lo"), ended()]
THINKING: list[Frame] = [
    STARTED,
    Delta(attempt=1, reasoning="Let me "),
    Delta(attempt=1, reasoning="see.", text="I "),
    text("look."),
    *call(0, "weather", '{"city": ', '"Bonn"}'),
    *call(1, "files__read", '{"path": "a"}'),
    *call(2, "patch", '{"input": "*** Be', "gin\\n\\u00", "e4\\ud83d", '\\ude00 \\"x\\""}'),
    ended("tool_calls"),
]
CASES: dict[str, tuple[dict[str, Any], list[Frame]]] = {
    "plain": ({}, PLAIN),
    "tools": ({"tools": TOOLS}, THINKING),
    "logprobs": (
        LOGPROBS,
        [STARTED, text("a", logprobs=(logprob("a"),)), text("b", logprobs=(logprob("b"),)), ended()],
    ),
    "cut": ({"max_output_tokens": 2}, [STARTED, text("Hello"), ended("length")]),
    "nothing": ({}, [STARTED, ended()]),
    "the rest with the end": ({}, [STARTED, text("Hel"), ended("stop", text("lo"))]),
    "schema": (
        {
            "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}},
            "metadata": {"a": "b"},
            "reasoning": {"effort": "low", "summary": "auto"},
            "tool_choice": {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "function", "name": "weather"}],
            },
            "tools": TOOLS,
            "conversation": {"id": "conv_1"},
            "instructions": "Be brief.",
            "user": "u",
            "prompt_cache_retention": "24h",
            "background": True,
        },
        PLAIN,
    ),
    "previous": ({"previous_response_id": "resp_1", "tools": [FUNCTION], "tool_choice": "required"}, PLAIN),
}


def types(events: Iterable[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


@pytest.mark.parametrize("name", CASES)
def test_events_and_response_are_of_the_sdks_types(name: str) -> None:
    fields, frames = CASES[name]
    events, response = rendered(record(**fields), frames)
    check_types(events, response)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["response"] == response
    assert events[-1]["type"] == f"response.{response['status']}"
    assert response["id"] == f"resp_{HEX}"


@pytest.mark.parametrize("name", [name for name in CASES if name != "cut"])
def test_the_sdks_own_accumulation_of_the_events_is_the_response(name: str) -> None:
    fields, frames = CASES[name]
    events, response = rendered(record(**fields), frames)
    state: ResponseStreamState[None] = ResponseStreamState(input_tools=omit, text_format=omit)
    texts: dict[int, str] = {}
    final: Any = None
    for event in events:
        typed: Any = EVENTS[event["type"]].model_validate(event)
        if event is events[-1]:
            # Then the SDK fills it with the items that it has seen.
            typed.response.output = None
        for final in state.handle_event(typed):
            if final.type == "response.output_text.delta":
                texts[final.output_index] = final.snapshot
    told = json.loads(final.response.to_json(), object_hook=without_parsed)
    assert told["output"] == response["output"]
    for place, item in enumerate(response["output"]):
        if item["type"] == "message":
            assert texts.get(place) == item["content"][0]["text"]


def without_parsed(members: dict[str, Any]) -> dict[str, Any]:
    """What the SDK read, without what it made of it."""
    return {name: value for name, value in members.items() if not name.startswith("parsed")}


def test_a_text_answer_has_openais_order() -> None:
    events, response = rendered(record(), PLAIN)
    assert types(events) == [
        "created",
        "queued",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event["response"]["status"] for event in events[:3]] == ["queued", "queued", "in_progress"]
    assert response["completed_at"] == int(ENDED_AT)
    assert response["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 12,
    }
    assert response["output"] == [
        {
            "id": f"msg_{HEX}_0",
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "annotations": [], "logprobs": [], "text": "Hello"}],
        }
    ]


def test_reasoning_text_and_calls_are_items_of_their_own() -> None:
    events, response = rendered(record(tools=TOOLS), THINKING)
    assert [(item["type"], item["id"]) for item in response["output"]] == [
        ("reasoning", f"rs_{HEX}_0"),
        ("message", f"msg_{HEX}_1"),
        ("function_call", f"fc_{HEX}_2"),
        ("function_call", f"fc_{HEX}_3"),
        ("custom_tool_call", f"ctc_{HEX}_4"),
    ]
    thought, said, weather, read, patch = response["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "Let me see."}]
    assert thought["summary"] == []
    assert said["content"][0]["text"] == "I look."
    assert (weather["name"], weather["call_id"], weather["arguments"]) == ("weather", "call_0", '{"city": "Bonn"}')
    assert (read["name"], read["namespace"]) == ("read", "files")
    assert (patch["name"], patch["input"]) == ("patch", '*** Begin\nä😀 "x"')
    deltas = [event["delta"] for event in events if event["type"] == "response.custom_tool_call_input.delta"]
    assert "".join(deltas) == patch["input"]
    assert len(deltas) > 1
    assert types(events)[3:8] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
    ]
    assert types(event for event in events if event.get("output_index") == 2) == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
    ]


def test_an_answer_that_reaches_its_most_tokens_is_incomplete() -> None:
    events, response = rendered(record(), [STARTED, text("a"), ended("length")])
    assert types(events)[-1] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"
    assert response["completed_at"] is None
    assert response["usage"]["output_tokens"] == 5


@pytest.mark.parametrize(
    ("status", "code", "shown"),
    [
        (500, "inference_failed", "inference_failed"),
        (408, "request_timeout", "request_timeout"),
        (400, "context_length_exceeded", "context_length_exceeded"),
        (400, None, "invalid_prompt"),
        (429, None, "rate_limit_exceeded"),
        (500, None, "server_error"),
    ],
)
def test_a_failure_keeps_what_was_said(status: int, code: str | None, shown: str) -> None:
    failed = Failed(attempt=1, status=status, error_type="server_error", code=code, message="It broke.")
    events, response = rendered(record(), [STARTED, text("Hel"), failed])
    assert types(events)[-1] == "failed"
    assert response["status"] == "failed"
    assert response["error"] == {"code": shown, "message": "It broke."}
    assert (response["output"][0]["status"], response["output"][0]["content"][0]["text"]) == ("incomplete", "Hel")
    assert response["usage"] is None
    # The SDK knows OpenAI's own codes only.
    known = copy.deepcopy(events)
    known[-1]["response"]["error"]["code"] = "server_error"
    check_types(known, known[-1]["response"])


@pytest.mark.parametrize("frames", [[], [STARTED], [STARTED, text("a")]], ids=["waiting", "started", "answering"])
def test_a_cancelled_response_says_so(frames: list[Frame]) -> None:
    failed = Failed(
        attempt=1, status=499, error_type="invalid_request_error", code="request_cancelled", message="Cancelled."
    )
    events, response = rendered(record(), [*frames, failed])
    assert (response["status"], response["error"]) == ("cancelled", None)
    assert types(events)[-1] == "failed"
    check_types(events, response)


@pytest.mark.parametrize("end", [ended(), Failed(attempt=1, status=500, error_type="e", message="m")])
def test_nothing_follows_the_end(end: Completed | Failed) -> None:
    once = rendered(record(), [STARTED, text("a"), end])
    more = rendered(record(), [STARTED, text("a"), end, STARTED, text("b"), end, ended("length")])
    assert once == more


def test_one_attempt_is_told_however_many_begin() -> None:
    once = rendered(record(), PLAIN)
    again = rendered(record(), [*PLAIN[:2], Started(attempt=2, worker="v"), *PLAIN[2:]])
    assert once == again


@pytest.mark.parametrize("name", CASES)
def test_rendering_twice_gives_the_same_bytes(name: str) -> None:
    fields, frames = CASES[name]
    records = (record(**fields), record(**fields), fresh(body(**fields)))
    once, again, unstored = (b"".join(map(sse, rendered(one, frames)[0])) for one in records)
    assert once == again == unstored
    first = once.split(b"\n\n", 1)[0].split(b"\n")
    assert first[0] == b"event: response.created"
    assert orjson.loads(first[1].removeprefix(b"data: "))["sequence_number"] == 0


@pytest.mark.parametrize("name", CASES)
def test_the_response_is_the_same_however_its_deltas_are_cut(name: str) -> None:
    fields, frames = CASES[name]
    finely = [part for frame in frames for part in cut(frame)]
    assert rendered(record(**fields), finely)[1] == rendered(record(**fields), frames)[1]
    merged = [STARTED, *joined(frame for frame in frames if isinstance(frame, Delta)), frames[-1]]
    assert rendered(record(**fields), merged)[1] == rendered(record(**fields), frames)[1]


def cut(frame: Frame) -> list[Frame]:
    """A delta as one for each character."""
    if not isinstance(frame, Delta):
        return [frame]
    parts: list[Frame] = [Delta(attempt=1, reasoning=character) for character in frame.reasoning]
    parts += [Delta(attempt=1, logprobs=(one,)) for one in frame.logprobs]
    parts += [text(character) for character in frame.text]
    for piece in frame.tool_calls:
        if "id" in piece:
            parts.append(Delta(attempt=1, tool_calls=(piece,)))
        for character in piece["function"]["arguments"]:
            parts.append(
                Delta(attempt=1, tool_calls=({"index": piece["index"], "function": {"arguments": character}},))
            )
    return parts


def joined(deltas: Iterable[Delta]) -> list[Frame]:
    """All deltas as one."""
    all_of = list(deltas)
    if not all_of:
        return []
    return [
        Delta(
            attempt=1,
            reasoning="".join(delta.reasoning for delta in all_of),
            text="".join(delta.text for delta in all_of),
            logprobs=tuple(one for delta in all_of for one in delta.logprobs),
            tool_calls=tuple(piece for delta in all_of for piece in delta.tool_calls),
        )
    ]


def test_the_response_while_it_grows() -> None:
    fold = ResponseFold(record(tools=TOOLS))
    fold.opening()
    assert (fold.response()["status"], fold.response()["output"]) == ("queued", [])
    events = [event for frame in THINKING[1:-3] if isinstance(frame, Delta) for event in fold.delta(frame)]
    assert types(events)[0] == "in_progress"
    growing = fold.response()
    assert [item.get("status") for item in growing["output"]][1:] == ["completed"] * 3 + ["in_progress"]
    assert growing["output"][-1]["input"] == "*** Begin\n"
    check_types(events, growing)


def test_logprobs_are_told_with_the_text_and_only_to_who_asked() -> None:
    frames: list[Frame] = [STARTED, Delta(attempt=1, logprobs=(logprob("a"),)), text("ab", logprobs=(logprob("b"),))]
    last = Delta(attempt=1, logprobs=(logprob("c"),))
    events, response = rendered(record(**LOGPROBS), [*frames, last, ended()])
    told = [event["logprobs"] for event in events if event["type"] == "response.output_text.delta"]
    assert [[one["token"] for one in some] for some in told] == [["a", "b"], ["c"]]
    whole = response["output"][0]["content"][0]["logprobs"]
    assert whole == [one for some in told for one in some]
    assert whole[0] == {
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}],
    }
    _, quiet = rendered(record(), [*frames, last, ended()])
    assert quiet["output"][0]["content"][0]["logprobs"] == []


def test_logprobs_of_thoughts_and_calls_belong_to_no_message() -> None:
    frames: list[Frame] = [
        Delta(attempt=1, reasoning="hm", logprobs=(logprob("hm"),)),
        text("a", logprobs=(logprob("a"),)),
        Delta(attempt=1, logprobs=(logprob("<tool_call>"),)),
        *call(0, "weather", "{}"),
        ended("tool_calls"),
    ]
    _, response = rendered(record(tools=TOOLS, **LOGPROBS), frames)
    assert [one["token"] for one in response["output"][1]["content"][0]["logprobs"]] == ["a"]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"input": "a"}', "a"),
        ('{ "input" :"a\\nb\\\\"}', "a\nb\\"),
        ('{"input": "a\nb"}', "a\nb"),
        ('{"input": "\\u00e4\\ud83d\\ude00"}', "ä😀"),
        ('{"input": "\\ud83d!"}', "\ufffd!"),
        ('{"input": "\\d+\\u12\\/\\n"}', "\\d+\\u12/\n"),
        ('{"input": "\\\\u0041\\\\\\u0041"}', "\\u0041\\A"),
        ('{"input": "\\ud83d\\u0041\\ude00"}', "\ufffdA\ufffd"),
        ('{"input": "a", "more": "b"}', "a"),
        ('{"input": 5}', '{"input": 5}'),
        ('{"other": "a"}', '{"other": "a"}'),
        ('{"input": "cut\\', "cut"),
        ("", ""),
    ],
)
def test_the_text_of_a_custom_tool_is_read_however_it_comes(arguments: str, shown: str) -> None:
    for size in (1, 2, 3, 7, 100):
        reader = CustomInput()
        pieces = [reader.push(arguments[start : start + size]) for start in range(0, len(arguments), size)]
        assert "".join(pieces) + reader.flush() == shown


def test_a_record_is_small_and_readable() -> None:
    made = record(tools=TOOLS, metadata={"a": "b"})
    assert (made.key, made.input[0]["id"]) == ("alice", f"msg_{HEX}_in0")
    assert orjson.loads(made.encode())["schema_version"] == 1
    assert len(record().encode()) < 1500
