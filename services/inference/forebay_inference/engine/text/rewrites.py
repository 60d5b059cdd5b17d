"""What may be done to the messages of a conversation for a chat template that does not take them as they are."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from forebay_inference.engine.text.tool_formats import in_words

Message = dict[str, Any]
Rewrite = Callable[[list[Message]], list[Message]]


def developer_as_system(messages: list[Message]) -> list[Message]:
    """`developer` becomes `system`."""
    return [{**one, "role": "system"} if one["role"] == "developer" else one for one in messages]


def reasoning_as_thinking(messages: list[Message]) -> list[Message]:
    """`reasoning_content` becomes `thinking`."""
    return [_renamed(one, "reasoning_content", "thinking") for one in messages]


def text_before_calls(messages: list[Message]) -> list[Message]:
    """The text beside tool calls becomes a turn before them."""
    split: list[Message] = []
    for one in messages:
        if one.get("tool_calls") and one["content"]:
            split.append({"role": one["role"], "content": one["content"]})
            one = {**one, "content": ""}
        split.append(one)
    return split


def short_call_ids(messages: list[Message]) -> list[Message]:
    """The ids of calls become nine letters and digits."""

    def short(identity: Any) -> str:
        return hashlib.blake2b(str(identity).encode(errors="replace")).hexdigest()[:9]

    shortened = []
    for one in messages:
        if one.get("tool_calls"):
            one = {**one, "tool_calls": [{**call, "id": short(call.get("id"))} for call in one["tool_calls"]]}
        if "tool_call_id" in one:
            one = {**one, "tool_call_id": short(one["tool_call_id"])}
        shortened.append(one)
    return shortened


def arguments_as_text(messages: list[Message]) -> list[Message]:
    """The arguments of calls become JSON text."""

    def written(call: Message) -> Message:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [
        {**one, "tool_calls": [written(call) for call in one["tool_calls"]]} if one.get("tool_calls") else one
        for one in messages
    ]


def one_call_a_turn(messages: list[Message]) -> list[Message]:
    """Of parallel calls, each becomes a turn that its result follows."""
    split: list[Message] = []
    place = 0
    while place < len(messages):
        turn, place = messages[place], place + 1
        calls = turn.get("tool_calls") or ()
        if len(calls) < 2:
            split.append(turn)
            continue
        results = []
        while place < len(messages) and messages[place]["role"] == "tool":
            results.append(messages[place])
            place += 1
        for number, call in enumerate(calls):
            own = [result for result in results if result.get("tool_call_id") == call.get("id")]
            split.append({**turn, "tool_calls": [call]} if not number else _bare_call(call))
            split += own
            results = [result for result in results if result not in own]
        split += results
    return split


def system_first(messages: list[Message]) -> list[Message]:
    """The system messages at the beginning become one. Later ones become user turns."""
    count = next((place for place, one in enumerate(messages) if one["role"] != "system"), len(messages))
    leading = [{"role": "system", "content": _joined(messages[:count])}] if count else []
    return leading + _system_as_user(messages[count:])


def system_in_user(messages: list[Message]) -> list[Message]:
    """System messages become a part of the next user turn."""
    if any(one["role"] == "system" for one in messages):
        return merged_turns(_system_as_user(messages))
    return messages


def merged_turns(messages: list[Message]) -> list[Message]:
    """Consecutive turns of one role become one."""
    merged: list[Message] = []
    for one in messages:
        last = merged[-1] if merged else None
        if last is None or last["role"] != one["role"] or one["role"] not in ("user", "assistant"):
            merged.append(one)
            continue
        calls = [*(last.get("tool_calls") or ()), *(one.get("tool_calls") or ())]
        merged[-1] = {**last, **one, "content": _joined([last, one]), **({"tool_calls": calls} if calls else {})}
    return merged


def user_first(messages: list[Message]) -> list[Message]:
    """An empty user turn goes before a first turn of the assistant."""
    place = next((place for place, one in enumerate(messages) if one["role"] != "system"), len(messages))
    if place < len(messages) and messages[place]["role"] == "assistant":
        return [*messages[:place], {"role": "user", "content": ""}, *messages[place:]]
    return messages


def content_as_parts(messages: list[Message]) -> list[Message]:
    """Content becomes a list of one text part."""
    return [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]


def told_in_words(messages: list[Message]) -> list[Message]:
    """Calls become text of the assistant, and their results user turns."""
    return [in_words(one) for one in messages]


def rewritten(messages: list[Message], rewrites: Sequence[Rewrite]) -> list[Message]:
    """`messages` after all `rewrites`."""
    for rewrite in rewrites:
        messages = rewrite(messages)
    return messages


def _system_as_user(messages: list[Message]) -> list[Message]:
    return [{**one, "role": "user"} if one["role"] == "system" else one for one in messages]


def _joined(messages: Sequence[Message]) -> str:
    return "\n\n".join(one["content"] for one in messages if one["content"])


def _renamed(message: Message, name: str, new: str) -> Message:
    return {new if key == name else key: value for key, value in message.items()}


def _bare_call(call: Message) -> Message:
    return {"role": "assistant", "content": "", "tool_calls": [call]}
