"""Reads tool calls out of an answer's text while it streams."""

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto
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


class _At(Enum):
    CONTENT = auto()
    BETWEEN_CALLS = auto()
    CALL = auto()


class ToolParser:
    """Separates an answer's text into content and streamed tool calls; a pure function of the text pushed.

    A call is an object that names one of `tools`. Everything else is content: other objects, and a marker that no call
    follows. With `calls_first`, calls come before all content or not at all. Deltas have OpenAI's form: index, id,
    type and name first, then pieces of the arguments.
    """

    def __init__(self, form: ToolFormat, tools: Collection[str], seed: str, *, calls_first: bool = False) -> None:
        self._format = form
        self._tools = tools
        self._seed = seed
        self._calls_first = calls_first
        self._at = _At.CONTENT
        self._pending = ""
        # What was read since the last content or call: content after all, should no call come of it.
        self._unclear = ""
        self._at_start = True
        self._call = _Call(form.arguments_key)
        self._between = " \t\r\n" + ("[]," if form.bracketed else ";" if form.bare else "")
        self.calls = 0

    @property
    def complete(self) -> bool:
        """Whether there are calls, and each is whole."""
        return self.calls > 0 and not (self._at is _At.CALL and self._call.announced)

    def push(self, text: str) -> list[str | dict[str, Any]]:
        """The content and the deltas that `text` adds, in their order."""
        parts: list[str | dict[str, Any]] = []
        self._pending += text
        while self._pending:
            before = (len(self._pending), self._at)
            match self._at:
                case _At.CONTENT:
                    self._read_content(parts)
                case _At.BETWEEN_CALLS:
                    self._read_between(parts)
                case _At.CALL:
                    self._read_call(parts)
            if (len(self._pending), self._at) == before:
                break
        return parts

    def flush(self) -> str:
        """Content that was held back, once no more text comes. Beside calls, what was held back belongs to them."""
        rest, self._pending, self._unclear = self._unclear + self._pending, "", ""
        return "" if self.calls else rest

    def _read_content(self, parts: list[str | dict[str, Any]]) -> None:
        start = self._format.start
        may_call = self._at_start or not self._calls_first
        found = self._pending.find(start) if may_call else -1
        if found >= 0:
            # The line break before a call belongs to the call.
            shown = self._pending[:found].rstrip("\n")
            self._show(shown, parts)
            self._unclear = self._pending[len(shown) : found + len(start)]
            self._pending = self._pending[found + len(start) :]
            self._at = _At.BETWEEN_CALLS
            return
        if self._format.bare and self._at_start and self._pending.lstrip().startswith("{"):
            self._at = _At.BETWEEN_CALLS
            return
        held = max((n for n in range(1, len(start)) if self._pending.endswith(start[:n])), default=0) if may_call else 0
        shown = self._pending[: len(self._pending) - held].rstrip("\n")
        self._pending = self._pending[len(shown) :]
        self._show(shown, parts)

    def _show(self, text: str, parts: list[str | dict[str, Any]]) -> None:
        if text:
            parts.append(text)
            self._at_start = self._at_start and not text.strip()

    def _read_between(self, parts: list[str | dict[str, Any]]) -> None:
        end = self._format.end
        rest = self._pending.lstrip(self._between)
        self._unclear += self._pending[: len(self._pending) - len(rest)]
        self._pending = rest
        if rest.startswith("{"):
            self._at, self._call = _At.CALL, _Call(self._format.arguments_key)
        elif end and self.calls and rest.startswith(end):
            self._at, self._unclear, self._pending = _At.CONTENT, "", rest[len(end) :]
        elif rest and not (end and end.startswith(rest)):
            self._not_a_call(parts)

    def _read_call(self, parts: list[str | dict[str, Any]]) -> None:
        call, place = self._call, 0
        for character in self._pending:
            call.push(character)
            place += 1
            if call.done or (call.name is not None and call.name not in self._tools):
                break
        self._unclear += self._pending[:place]
        self._pending = self._pending[place:]
        if call.name in self._tools:
            self._unclear = ""
            self._report(parts)
            if call.done:
                self._at = _At.BETWEEN_CALLS
        elif call.done or call.name is not None:
            self._not_a_call(parts)

    def _not_a_call(self, parts: list[str | dict[str, Any]]) -> None:
        # What stands behind a whole call and before the next, if one came, is no content either.
        between = self._at is _At.BETWEEN_CALLS and not self._unclear.strip(self._between)
        shown, self._unclear, self._at = "" if between else self._unclear, "", _At.CONTENT
        self._at_start = False
        self._show(shown, parts)

    def _report(self, parts: list[str | dict[str, Any]]) -> None:
        call = self._call
        if not call.announced:
            call.announced = True
            identity = hashlib.blake2b(f"{self._seed}:{self.calls}".encode(), digest_size=12).hexdigest()
            function = {"name": call.name, "arguments": ""}
            parts.append({"index": self.calls, "id": f"call_{identity}", "type": "function", "function": function})
            self.calls += 1
        part = call.unsent_arguments()
        if call.done and call.arguments_start is None and not call.sent:
            part, call.sent = "{}", 2
        if part:
            parts.append({"index": self.calls - 1, "function": {"arguments": part}})
