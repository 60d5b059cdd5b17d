"""The chat messages that the items of a conversation make."""

from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from forebay_api.openai.responses.compaction import opened
from forebay_api.openai.responses.tools import CUSTOM_INPUT, function_name
from forebay_contracts.wire.errors import InvalidRequest

_Item = Mapping[str, Any]


def chat_messages(items: Iterable[_Item], instructions: str | None) -> tuple[dict[str, Any], ...]:
    """The messages of stored `items`, oldest first.

    What developers say is a system message. Consecutive reasoning, text and calls of the model are one assistant
    message.

    Raises:
        InvalidRequest: there are none, an output has no call before it, or a call has arguments that are not JSON.
    """
    history = _History()
    if instructions:
        history.append({"role": "system", "content": instructions})
    for item in items:
        history.add(item)
    if not history.messages:
        raise InvalidRequest("There is nothing to answer.", param="input")
    return tuple(history.messages)


class _History:
    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._thoughts: list[str] = []
        # The assistant message that the next item may still continue.
        self._assistant: dict[str, Any] | None = None
        self._called: set[str] = set()

    def add(self, item: _Item) -> None:
        match item["type"]:
            case "reasoning":
                self._assistant = None
                self._thoughts.append(_joined(item.get("content") or item["summary"], "\n"))
            case "compaction":
                summary = opened(item["encrypted_content"])
                self.append({"role": "assistant", "content": f"Summary of the conversation so far:\n{summary}"})
            case "message":
                self._say(item)
            case "function_call":
                if (arguments := _arguments(item)) is not None:
                    self._call(item, arguments)
            case "custom_tool_call":
                self._call(item, orjson.dumps({CUSTOM_INPUT: item["input"]}).decode())
            case _:
                self._give(item)

    def append(self, message: dict[str, Any]) -> None:
        self.messages.append(message)
        self._assistant, self._thoughts = None, []

    def _continued(self) -> dict[str, Any]:
        """The assistant message that is still open, or a new one."""
        if self._assistant is None:
            message: dict[str, Any] = {"role": "assistant", "content": ""}
            if thought := "\n".join(filter(None, self._thoughts)):
                message["reasoning_content"] = thought
            self.append(message)
            self._assistant = message
        return self._assistant

    def _say(self, item: _Item) -> None:
        role = item["role"]
        if role == "assistant":
            if self._assistant is not None and (self._assistant["content"] or "tool_calls" in self._assistant):
                self._assistant = None
            self._continued()["content"] = _joined(item["content"], "")
            return
        text = _joined(item["content"], "\n")
        self.append({"role": "user" if role == "user" else "system", "content": text})

    def _call(self, item: _Item, arguments: str) -> None:
        self._called.add(item["call_id"])
        function = {"name": function_name(item["name"], item.get("namespace")), "arguments": arguments}
        call = {"id": item["call_id"], "type": "function", "function": function}
        self._continued().setdefault("tool_calls", []).append(call)

    def _give(self, item: _Item) -> None:
        call, output = item["call_id"], item["output"]
        if call not in self._called:
            raise InvalidRequest(f"No tool call found for the output with call_id {call!r}.", param="input")
        text = output if isinstance(output, str) else _joined(output, "\n")
        self.append({"role": "tool", "tool_call_id": call, "content": text})


def _joined(parts: Iterable[_Item], by: str) -> str:
    return by.join(part["refusal"] if part["type"] == "refusal" else part["text"] for part in parts)


def _arguments(call: _Item) -> str | None:
    """The arguments of a function; None for a call that was cut before they were whole, which nobody can have made."""
    arguments: str = call["arguments"] or "{}"
    try:
        orjson.loads(arguments)
    except orjson.JSONDecodeError as exc:
        if call.get("status") == "incomplete":
            return None
        raise InvalidRequest(f"The arguments of the call {call['call_id']!r} are not JSON.", param="input") from exc
    return arguments
