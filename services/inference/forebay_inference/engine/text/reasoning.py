"""Reasoning: what a thinking model writes before its answer, told apart from the answer."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final, Protocol

from forebay_contracts.wire.errors import InvalidRequest
from forebay_inference.engine.protocol import Tokenizer


class Reasoning(str):
    """A part of an answer's text that is reasoning."""

    __slots__ = ()


Part = str | dict[str, Any]
"""A part of an answer: content, Reasoning, or a tool-call delta."""


class AnswerParser(Protocol):
    """Separates an answer's text into its parts; a pure function of the text pushed."""

    @property
    def complete(self) -> bool:
        """Whether there are tool calls, and each is whole."""

    def push(self, text: str) -> list[Part]:
        """The parts that `text` adds, in their order."""

    def flush(self) -> list[Part]:
        """What was held back, once no more text comes."""


TAGS: Final[Mapping[str, str]] = {
    "<think>": "</think>",
    "[THINK]": "[/THINK]",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|inner_prefix|>": "<|inner_suffix|>",
    "<|channel>thought": "<channel|>",
}
"""The tags around reasoning that model families write."""

START: Final = re.compile(r"^(\??)start\b", re.MULTILINE)
"""The first rule of a grammar in Lark."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """How a model writes reasoning: between `start` and `end`. `tokens`: the ids of tags, and of the special tokens in
    them, that are tokens of the vocabulary."""

    start: str
    end: str
    tokens: Mapping[str, int]

    def opened(self, prompt: str, continued: str = "") -> bool:
        """Whether an answer begins within reasoning: `prompt` ends with the start tag, or `continued`, the text of the
        assistant with which it ends, has one that is not closed."""
        return prompt.rstrip().endswith(self.start) or continued.rfind(self.start) > continued.rfind(self.end)

    def before(self, grammar: str, *, opened: bool) -> str:
        """The grammar of an answer that follows `grammar` once the reasoning has ended.

        A grammar without a rule `start` (GBNF) leaves no room for reasoning.

        Raises:
            InvalidRequest: there is no rule `start`, and the answer begins within reasoning.
        """
        if not opened and START.search(grammar) is None:
            return grammar
        rest = with_start_as("answered", grammar)
        end = self._terminal(self.end)
        any_text = r"/(.|\n)*/"
        thought = f"thought: {any_text} {end}" if end.startswith("<") else f"thought[suffix={end}]: {any_text}"
        thinking = "thinking" if opened else f"({self._terminal(self.start)} thinking)?"
        return "\n".join((f"start: {thinking} answered", r"thinking: thought /\n{0,2}/", thought, rest))

    def _terminal(self, tag: str) -> str:
        """The tag in a grammar. A token of its own matches no literal."""
        special = next((text for text in self.tokens if tag.startswith(text)), "")
        rest = tag.removeprefix(special)
        return " ".join([*([f"<[{self.tokens[special]}]>"] if special else []), *([json.dumps(rest)] if rest else [])])


def with_start_as(name: str, grammar: str) -> str:
    """`grammar` with its rule `start` under the name `name`; raises InvalidRequest if it has none."""
    renamed, found = START.subn(rf"\1{name}", grammar, count=1)
    if not found:
        raise InvalidRequest(
            "The grammar has no rule `start` and cannot follow this model's reasoning. Write it in Lark.",
            param="response_format",
        )
    return renamed


def thinking_of(tokenizer: Tokenizer) -> Thinking | None:
    """How the model writes reasoning; None where neither its template nor its vocabulary knows a tag."""
    template = tokenizer.chat_template or ""
    known = [tags for tags in TAGS.items() if tags[1] in template]
    known += [tags for tags in TAGS.items() if all(_token(tokenizer, tag) is not None for tag in tags)]
    if not known:
        return None
    start, end = known[0]
    tokens = {tag: token for tag in (start, end) if (token := _token(tokenizer, tag)) is not None}
    inner = {text: token for text, token in tokenizer.special_tokens.items() if text and (start + end).find(text) >= 0}
    return Thinking(start, end, inner | tokens)


def _token(tokenizer: Tokenizer, text: str) -> int | None:
    """The token that is `text`, if the vocabulary has one."""
    ids = tokenizer.encode(text, special_tokens=False)
    return ids[0] if len(ids) == 1 and tokenizer.decode(ids, show=ids) == text else None


class _At(Enum):
    START = auto()
    THINKING = auto()
    CONTENT = auto()


class ThinkingParser:
    """Separates reasoning from what follows, which it passes on to `rest`, or takes for content where that is None.

    Reasoning stands at the beginning of an answer. Tags elsewhere are content. Line breaks beside the tags belong to
    neither.
    """

    def __init__(self, thinking: Thinking, rest: AnswerParser | None, *, opened: bool) -> None:
        self.rest = rest
        self._thinking = thinking
        self._at = _At.THINKING if opened else _At.START
        self._pending = ""
        self._after = self._shown = False

    @property
    def thinks(self) -> bool:
        """Whether the next text is reasoning."""
        return self._at is _At.THINKING

    @property
    def over(self) -> bool:
        """Whether all that follows is for `rest`."""
        return self._at is _At.CONTENT and not self._after

    @property
    def complete(self) -> bool:
        """See `AnswerParser.complete`."""
        return self.rest is not None and self.rest.complete

    def push(self, text: str) -> list[Part]:
        """See `AnswerParser.push`."""
        self._pending += text
        parts: list[Part] = []
        if self._at is _At.START:
            self._read_start()
        if self._at is _At.THINKING:
            self._read_thought(parts)
        if self._at is _At.CONTENT:
            text, self._pending = self._pending, ""
            if self._after:
                text = text.lstrip("\n")
                self._after = not text
            if text:
                parts += [text] if self.rest is None else self.rest.push(text)
        return parts

    def flush(self) -> list[Part]:
        """See `AnswerParser.flush`."""
        if self._at is _At.THINKING:
            parts: list[Part] = []
            self._show(self._pending.rstrip("\n"), parts)
            return parts
        text = self._pending
        if self.rest is None:
            return [text] if text else []
        return self.rest.push(text) + self.rest.flush()

    def _read_start(self) -> None:
        start, begun = self._thinking.start, self._pending.lstrip()
        if begun.startswith(start):
            self._at, self._pending = _At.THINKING, begun[len(start) :]
        elif not start.startswith(begun):
            self._at = _At.CONTENT

    def _read_thought(self, parts: list[Part]) -> None:
        thought, end, rest = self._pending.partition(self._thinking.end)
        if end:
            self._show(thought.rstrip("\n"), parts)
            self._at, self._pending, self._after = _At.CONTENT, rest, True
            return
        settled = thought[: len(thought) - held(thought, self._thinking.end)].rstrip("\n")
        self._pending = thought[len(settled) :]
        self._show(settled, parts)

    def _show(self, thought: str, parts: list[Part]) -> None:
        if not self._shown:
            thought = thought.lstrip("\n")
        if thought:
            self._shown = True
            parts.append(Reasoning(thought))


def held(text: str, *markers: str) -> int:
    """The length of the longest end of `text` that begins one of `markers`."""
    return max((n for marker in markers for n in range(1, len(marker)) if text.endswith(marker[:n])), default=0)
