"""What a model tells the attempt that runs on it: an answer as events, in text or vectors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forebay_contracts.wire.frames import TokenLogprob
from forebay_contracts.wire.state import Usage


@dataclass(frozen=True, slots=True)
class Accepted:
    """First, exactly once: the request is valid and fits; nothing has been computed yet.

    `returned` tokens of prompts will come in events, over all choices.
    """

    prompt_tokens: int
    returned: int = 0


@dataclass(slots=True)
class Tokens:
    """Next tokens of choice `index`, with the text that they settle (see `forebay_contracts.wire.frames.Delta`).

    `text` never holds a part of a character, of a stop string or of a special token. `reasoning` stands before it.
    `tool_calls` are OpenAI's streamed tool-call deltas. With `prompt`, the tokens are the next of the choice's prompt.

    Not frozen, since one is made for each token: that would take 0.6 µs instead of 0.15.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[dict[str, Any], ...] = ()
    reasoning: str = ""
    prompt: bool = False


@dataclass(frozen=True, slots=True)
class Vector:
    """The embedding of input `index`, whole: `values` are float32, little-endian."""

    index: int
    values: bytes


@dataclass(frozen=True, slots=True)
class Finished:
    """Once a choice: `finish_reason` is OpenAI's (stop, length, tool_calls); `cached_tokens` of its prompt,
    `reasoning_tokens` of its answer. `stop_string` is the one that ended it, if one did."""

    index: int
    finish_reason: str
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    stop_string: str | None = None


@dataclass(frozen=True, slots=True)
class Used:
    """At most once, where the server of the model counts tokens: what the whole answer took."""

    usage: Usage


Event = Accepted | Tokens | Vector | Finished | Used

ResumeTokens = Mapping[int, Sequence[int]]
"""For a choice's index, the tokens that its client already has from an earlier attempt."""
