"""The chat messages that the items of a conversation make."""

from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from forebay_api.openai.responses.tools import CUSTOM_INPUT, function_name
from forebay_contracts.wire.errors import InvalidRequest

_Item = Mapping[str, Any]


def chat_messages(items: Iterable[_Item], instructions: str | None) -> tuple[dict[str, Any], ...]:
    """The messages of stored `items`, oldest first.

    What the developer says before anything else is one system message: many chat templates take no more. Consecutive
    reasoning, text and calls of the model are one assistant message.

    Raises:
        InvalidRequest: there are none, an output has no call before it, or a call has arguments that are not JSON.
    """
    history = _History()
    if instructions:
        history.system(instructions)
    for item in items:
        history.add(item)
    if not history.messages:
        raise InvalidRequest("There is nothing to answer.", param="input")
    return tuple(history.messages)


class _History:
    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._thought = ""
        # The assistant message that the next item may still continue.
        self._assistant: dict[str, Any] | None = None
        self._called: set[str] = set()

    def add(self, item: _Item) -> None:
        match item["type"]:
            case "reasoning":
                self._assistant = None
                self._thought += _joined(item.get("content") or item["summary"], "\n")
            case "message" if item["role"] == "assistant":
                self._say(_joined(item["content"], ""))
            case "function_call":
                self._call(item, _json(item))
            case "custom_tool_call":
                self._call(item, orjson.dumps({CUSTOM_INPUT: item["input"]}).decode())
            case "function_call_output" | "custom_tool_call_output":
                self._give(item)
            case _:
                text = _joined(item["content"], "\n")
                if item["role"] == "user":
                    self._append({"role": "user", "content": text})
                else:
                    self.system(text)

    def system(self, text: str) -> None:
        if len(self.messages) == 1 and self.messages[0]["role"] == "system":
            self.messages[0]["content"] += f"\n\n{text}"
        else:
            self._append({"role": "system", "content": text})

    def _append(self, message: dict[str, Any]) -> None:
        self.messages.append(message)
        self._assistant, self._thought = None, ""

    def _open(self) -> dict[str, Any]:
        if self._assistant is None:
            thought = self._thought
            message: dict[str, Any] = {"role": "assistant", "content": ""}
            if thought:
                message["reasoning_content"] = thought
            self._append(message)
            self._assistant = message
        return self._assistant

    def _say(self, text: str) -> None:
        if self._assistant is not None and (self._assistant["content"] or "tool_calls" in self._assistant):
            self._assistant = None
        self._open()["content"] = text

    def _call(self, item: _Item, arguments: str) -> None:
        self._called.add(item["call_id"])
        function = {"name": function_name(item["name"], item.get("namespace")), "arguments": arguments}
        call = {"id": item["call_id"], "type": "function", "function": function}
        self._open().setdefault("tool_calls", []).append(call)

    def _give(self, item: _Item) -> None:
        call, output = item["call_id"], item["output"]
        if call not in self._called:
            raise InvalidRequest(f"No tool call found for the output with call_id {call!r}.", param="input")
        text = output if isinstance(output, str) else _joined(output, "\n")
        self._append({"role": "tool", "tool_call_id": call, "content": text})


def _joined(parts: Iterable[_Item], by: str) -> str:
    return by.join(part["refusal"] if part["type"] == "refusal" else part["text"] for part in parts)


def _json(call: _Item) -> str:
    arguments: str = call["arguments"] or "{}"
    try:
        orjson.loads(arguments)
    except orjson.JSONDecodeError as exc:
        raise InvalidRequest(f"The arguments of the call {call['call_id']!r} are not JSON.", param="input") from exc
    return arguments
