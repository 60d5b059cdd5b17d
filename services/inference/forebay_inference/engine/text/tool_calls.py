"""Reads tool calls out of an answer's text while it streams."""

import contextlib
import hashlib
import json
import re
from collections.abc import Collection
from enum import Enum, auto
from typing import Any

from forebay_inference.engine.text.tool_formats import ToolFormat


class _Call:
    """One call as it is read, character by character: a JSON object with a name and arguments.

    Arguments stream where the name stands before them, as every family writes it; otherwise they come with the end.
    """

    def __init__(self, arguments_key: str) -> None:
        self._key = arguments_key
        self._head = re.compile(rf'\{{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"{arguments_key}"\s*:\s*')
        self._text = ""
        self._depth = 0
        self._in_string = self._escaped = False
        self._streams = False
        self.name: str | None = None
        self.arguments = ""
        self.done = False

    def push(self, character: str) -> None:
        """Read one character; `done` is set with the closing brace."""
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            if self._depth == 1 and self.name is None and (head := self._head.fullmatch(self._text)):
                self.name, self._streams = json.loads(head[1], strict=False), True
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        self._text += character
        if self._streams:
            self.arguments += character
            self._streams = self._depth > 1
        self.done = self._depth == 0
        if self.done and self.name is None:
            self._read_whole()

    def _read_whole(self) -> None:
        with contextlib.suppress(ValueError):
            call = json.loads(self._text, strict=False)
            self.name = name if isinstance(name := call.get("name"), str) else None
            self.arguments = json.dumps(call.get(self._key, {}))


def call_id(seed: str, place: int) -> str:
    """The id of call number `place` of an answer; `seed` is the answer's own."""
    return f"call_{hashlib.blake2b(f'{seed}:{place}'.encode(), digest_size=12).hexdigest()}"


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
        self._sent: int | None = None
        self._between = " \t\r\n" + ("[]," if form.bracketed else ";" if form.bare else "")
        self.calls = 0

    @property
    def complete(self) -> bool:
        """Whether there are calls, and each is whole."""
        return self.calls > 0 and not (self._at is _At.CALL and self._sent is not None)

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

    def flush(self) -> list[str | dict[str, Any]]:
        """Content that was held back, once no more text comes. Beside calls, what was held back belongs to them."""
        rest, self._pending, self._unclear = self._unclear + self._pending, "", ""
        return [] if self.calls or not rest else [rest]

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
            self._at, self._call, self._sent = _At.CALL, _Call(self._format.arguments_key), None
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
        if self._sent is None:
            identity = call_id(self._seed, self.calls)
            function = {"name": call.name, "arguments": ""}
            parts.append({"index": self.calls, "id": identity, "type": "function", "function": function})
            self.calls += 1
            self._sent = 0
        if part := call.arguments[self._sent :]:
            parts.append({"index": self.calls - 1, "function": {"arguments": part}})
            self._sent += len(part)
