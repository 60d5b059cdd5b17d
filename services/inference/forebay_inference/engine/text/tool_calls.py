"""Reads tool calls out of an answer's text while it streams."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from forebay_inference.engine.text.tool_formats import ToolFormat


@dataclass(slots=True)
class _Call:
    """One call as it is read, character by character: a JSON object at depth 1 with a name and arguments."""

    arguments_key: str
    text: str = ""
    depth: int = 0
    in_string: bool = False
    escaped: bool = False
    string_start: int = 0
    last_string: str = ""
    key: str = ""
    value_start: int | None = None
    name: str | None = None
    arguments_start: int | None = None
    arguments_end: int | None = None
    sent: int = 0
    announced: bool = False
    done: bool = False

    def push(self, character: str) -> None:
        """Read one character; `done` is set with the closing brace."""
        place = len(self.text)
        self.text += character
        if self.in_string:
            self._push_in_string(character, place)
            return
        if self.depth == 1 and self.key and self.value_start is None and not character.isspace():
            self.value_start = place
            if self.key == self.arguments_key:
                self.arguments_start = place
        match character:
            case '"':
                self.in_string, self.string_start = True, place
            case ":" if self.depth == 1 and not self.key:
                self.key = self.last_string
            case "{" | "[":
                self.depth += 1
            case "}" | "]":
                self.depth -= 1
                if self.depth == 0:
                    self._end_value(place)
                    self.done = True
                elif self.depth == 1:
                    self._end_value(place + 1)
            case "," if self.depth == 1:
                self._end_value(place)
                self.key, self.value_start = "", None

    def _push_in_string(self, character: str, place: int) -> None:
        if self.escaped:
            self.escaped = False
        elif character == "\\":
            self.escaped = True
        elif character == '"':
            self.in_string = False
            self.last_string = self._decoded(self.text[self.string_start : place + 1])
            if self.depth == 1 and self.key:
                if self.key == "name":
                    self.name = self.last_string
                self._end_value(place + 1)

    def _end_value(self, end: int) -> None:
        if self.key == self.arguments_key and self.arguments_end is None:
            self.arguments_end = end

    @staticmethod
    def _decoded(literal: str) -> str:
        try:
            return str(json.loads(literal, strict=False))
        except ValueError:
            return literal[1:-1]

    def unsent_arguments(self) -> str:
        """The arguments' text that was not taken yet; takes it."""
        if self.arguments_start is None:
            return ""
        end = len(self.text) if self.arguments_end is None else self.arguments_end
        part = self.text[self.arguments_start + self.sent : end]
        self.sent += len(part)
        return part


class ToolParser:
    """Separates an answer's text into content and streamed tool calls; a pure function of the text pushed.

    Deltas have OpenAI's form: index, id, type and name first, then pieces of the arguments.
    """

    def __init__(self, form: ToolFormat, seed: str) -> None:
        self._format = form
        self._seed = seed
        self._pending = ""
        self._in_calls = False
        self._at_start = True
        self._call: _Call | None = None
        self.calls = 0

    def push(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """The content and the deltas that `text` adds."""
        content: list[str] = []
        deltas: list[dict[str, Any]] = []
        self._pending += text
        while self._pending:
            before = (len(self._pending), self._in_calls)
            if self._in_calls:
                content.append(self._read_calls(deltas))
            else:
                content.append(self._read_content())
            if (len(self._pending), self._in_calls) == before:
                break
        if self._call is not None:
            self._report(self._call, deltas)
        return "".join(content), deltas

    def flush(self) -> str:
        """Content that was held back, once no more text comes."""
        rest, self._pending = ("" if self._in_calls else self._pending), ""
        if self._call is not None and self._call.name is None:
            self.calls -= 1
            rest = self._call.text
        return rest

    def _read_content(self) -> str:
        start = self._format.start
        found = self._pending.find(start)
        if found >= 0:
            shown, self._pending = self._pending[:found], self._pending[found + len(start) :]
            self._in_calls = True
            # The line break before a call belongs to the call.
            return shown.rstrip("\n")
        if self._format.bare and self._at_start:
            stripped = self._pending.lstrip()
            if stripped.startswith("{"):
                self._pending, self._in_calls = stripped, True
                return ""
        held = max((n for n in range(1, len(start)) if self._pending.endswith(start[:n])), default=0)
        body = self._pending[: len(self._pending) - held]
        kept = body.rstrip("\n")
        shown, self._pending = kept, self._pending[len(kept) :]
        self._at_start = self._at_start and not shown.strip()
        return shown

    def _read_calls(self, deltas: list[dict[str, Any]]) -> str:
        end = self._format.end
        content = ""
        for place, character in enumerate(self._pending):
            if self._call is not None:
                self._call.push(character)
                if self._call.done:
                    if self._call.name is None:
                        # An object, but not a call.
                        self.calls -= 1
                        content += self._call.text
                    self._report(self._call, deltas)
                    self._call = None
                continue
            if character == "{":
                self._call = _Call(self._format.arguments_key)
                self._call.push(character)
                self.calls += 1
                continue
            rest = self._pending[place:]
            if end and rest.startswith(end):
                self._pending, self._in_calls = rest[len(end) :], False
                return content
            if end and end.startswith(rest):
                self._pending = rest
                return content
        self._pending = ""
        return content

    def _report(self, call: _Call, deltas: list[dict[str, Any]]) -> None:
        index = self.calls - 1
        if call.name is None:
            return
        if not call.announced:
            call.announced = True
            identity = hashlib.blake2b(f"{self._seed}:{index}".encode(), digest_size=12).hexdigest()
            function = {"name": call.name, "arguments": ""}
            deltas.append({"index": index, "id": f"call_{identity}", "type": "function", "function": function})
        part = call.unsent_arguments()
        if call.done and call.arguments_start is None and not call.sent:
            part, call.sent = "{}", 2
        if part:
            deltas.append({"index": index, "function": {"arguments": part}})
