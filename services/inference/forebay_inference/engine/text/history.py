"""Calls and results in the messages of a conversation, as chat templates take them."""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic_core import from_json

from forebay_contracts.wire.errors import InvalidRequest


def with_calls_of_tools(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with one way to call: OpenAI's older `function_call` and its result become those of a tool.

    The results of parallel calls come in the order of the calls, which is all that many templates show of it.

    Raises:
        InvalidRequest: a call is not of a function.
    """
    found: list[dict[str, Any]] = []
    calls: list[Any] = []
    for place, given in enumerate(messages):
        message = dict(given)
        if message["role"] == "function":
            message |= {"role": "tool", "tool_call_id": message.get("tool_call_id", calls[-1] if calls else None)}
        old_call = message.pop("function_call", None)
        if old_call is not None and not message.get("tool_calls"):
            message["tool_calls"] = [{"id": f"call_{place}", "type": "function", "function": old_call}]
        if message.get("tool_calls"):
            message["tool_calls"] = [_with_arguments(call) for call in message["tool_calls"]]
            calls = [call.get("id") for call in message["tool_calls"]]
        if message["role"] == "tool" and message.get("tool_call_id") in calls:
            _insert(found, message, calls)
        else:
            found.append(message)
    return found


def _insert(messages: list[dict[str, Any]], result: dict[str, Any], calls: list[Any]) -> None:
    """Put `result` behind those of earlier calls."""
    place = len(messages)
    number = calls.index(result["tool_call_id"])
    while messages[place - 1]["role"] == "tool" and messages[place - 1].get("tool_call_id") in calls[number + 1 :]:
        place -= 1
    messages.insert(place, result)


def _with_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping):
        raise InvalidRequest("Only tool calls of type function are supported.", param="messages")
    return {**call, "function": {**function, "arguments": _arguments(function.get("arguments"))}}


def _arguments(given: Any) -> dict[str, Any]:
    """The arguments of a call as an object. Those of a call that was cut are completed, and what is no object has the
    name `arguments` in one."""
    value = given
    if isinstance(given, str):
        try:
            value = from_json(given, allow_partial="trailing-strings")
        except ValueError:
            value = given.strip()
    if isinstance(value, dict):
        return value
    return {"arguments": value} if value not in (None, "") else {}
