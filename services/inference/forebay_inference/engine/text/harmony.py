"""Harmony, the format of gpt-oss: an answer is a chain of messages, each on a channel.

Source: https://cookbook.openai.com/articles/openai-harmony. What goes where:

- `analysis` is reasoning.
- `to=functions.NAME`, on any channel, is a tool call if the request offers that function.
- `final`, and `commentary` to nobody, are content.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from forebay_inference.engine.protocol import Tokenizer
from forebay_inference.engine.text.reasoning import Part, Reasoning, held, with_start_as
from forebay_inference.engine.text.tool_calls import call_id

MARKERS: Final = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")
EFFORTS: Final = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}
"""The efforts that the model does not know, and the nearest that it knows."""
_ENDS: Final = ("<|call|>", "<|return|>")
_NEXT: Final = re.compile(r"<\|(?:start|channel|end|call|return)\|>")
_CHANNEL: Final = re.compile(r"<\|channel\|>\s*(\w+)")
_FUNCTION: Final = re.compile(r"to=functions\.([\w-]+)")


@dataclass(frozen=True, slots=True)
class Harmony:
    """The markers of a model that answers in this format, as `tokens` of its vocabulary."""

    tokens: Mapping[str, int]

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return frozenset(self.tokens[marker] for marker in _ENDS)

    def grammar(self, answer: str | None, calls: Mapping[str, str]) -> str:
        """The grammar of an answer, which may begin with reasoning.

        Its final message follows the grammar `answer`, or it calls a function whose arguments follow one of `calls`.
        """
        rules, ends = [], []
        if answer is not None:
            rules += [self._message("final", '"final"'), with_start_as("final-text", answer)]
            ends.append("final")
        for place, (name, arguments) in enumerate(calls.items()):
            header = f'{json.dumps(f"commentary to=functions.{name} ")} {self._one("<|constrain|>")} "json"'
            rules += [self._message(f"call-{place}", header), with_start_as(f"call-{place}-text", arguments)]
            ends.append(f"call-{place}")
        channel, message, end, start = map(self._one, ("<|channel|>", "<|message|>", "<|end|>", "<|start|>"))
        analysis = rf'analysis: {channel} "analysis" {message} /(.|\n)*/ {end} {start} "assistant"'
        return "\n".join((f"start: analysis? ({' | '.join(ends)})", analysis, *rules))

    def _message(self, name: str, header: str) -> str:
        return f"{name}: {self._one('<|channel|>')} {header} {self._one('<|message|>')} {name}-text"

    def _one(self, marker: str) -> str:
        return f"<[{self.tokens[marker]}]>"


def harmony_of(tokenizer: Tokenizer) -> Harmony | None:
    """The markers of the model; None where its template or its vocabulary does not know them."""
    template, tokens = tokenizer.chat_template or "", tokenizer.special_tokens
    if "<|channel|>" not in template or any(marker not in tokens for marker in MARKERS):
        return None
    return Harmony({marker: tokens[marker] for marker in MARKERS})


class _At(Enum):
    HEADER = auto()
    REASONING = auto()
    CONTENT = auto()
    CALL = auto()


class HarmonyParser:
    """Separates an answer into reasoning, content and calls of `tools`; see `AnswerParser`."""

    rest = None
    over = False

    def __init__(self, tools: Collection[str], seed: str) -> None:
        self._tools = tools
        self._seed = seed
        self._at = _At.HEADER
        self._pending = ""
        self._reasoned = False
        self._arguments: list[str] = []

    @property
    def thinks(self) -> bool:
        """Whether the next text is reasoning."""
        return self._at is _At.REASONING

    @property
    def complete(self) -> bool:
        """See `AnswerParser.complete`."""
        return bool(self._arguments) and all(map(_is_object, self._arguments))

    def push(self, text: str) -> list[Part]:
        """See `AnswerParser.push`."""
        parts: list[Part] = []
        self._pending += text
        while self._pending and (self._read_header(parts) if self._at is _At.HEADER else self._read_message(parts)):
            pass
        return parts

    def flush(self) -> list[Part]:
        """See `AnswerParser.flush`. A header that was cut belongs to no part."""
        parts: list[Part] = []
        rest, self._pending = self._pending, ""
        if self._at is not _At.HEADER or "<|" not in rest:
            self._show(rest, parts)
        return parts

    def _read_header(self, parts: list[Part]) -> bool:
        header, message, rest = self._pending.partition("<|message|>")
        if not message:
            return False
        self._pending = rest
        channel, function = _CHANNEL.search(header), _FUNCTION.search(header)
        if function is not None and function[1] in self._tools:
            self._at = _At.CALL
            place = len(self._arguments)
            self._arguments.append("")
            called = {"name": function[1], "arguments": ""}
            parts.append({"index": place, "id": call_id(self._seed, place), "type": "function", "function": called})
        elif channel is not None and channel[1] == "analysis":
            self._at = _At.REASONING
            if self._reasoned:
                parts.append(Reasoning("\n"))
        else:
            self._at = _At.CONTENT
        return True

    def _read_message(self, parts: list[Part]) -> bool:
        if (found := _NEXT.search(self._pending)) is not None:
            self._show(self._pending[: found.start()], parts)
            # The channel's marker is a part of the next header.
            self._pending = self._pending[found.start() if found[0] == "<|channel|>" else found.end() :]
            self._at = _At.HEADER
            return True
        settled = len(self._pending) - held(self._pending, *MARKERS)
        self._show(self._pending[:settled], parts)
        self._pending = self._pending[settled:]
        return False

    def _show(self, text: str, parts: list[Part]) -> None:
        if not text:
            return
        if self._at is _At.REASONING:
            self._reasoned = True
            parts.append(Reasoning(text))
        elif self._at is _At.CALL:
            self._arguments[-1] += text
            parts.append({"index": len(self._arguments) - 1, "function": {"arguments": text}})
        else:
            parts.append(text)


def _is_object(arguments: str) -> bool:
    try:
        return isinstance(json.loads(arguments), dict)
    except ValueError:
        return False
