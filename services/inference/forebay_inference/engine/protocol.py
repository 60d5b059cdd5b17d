"""The engine seam: what a worker needs of whatever generates tokens."""

import traceback
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from forebay_contracts.wire.errors import UnsupportedByModel
from forebay_contracts.wire.frames import TokenLogprob
from forebay_contracts.wire.request import CompletionType, InferenceRequest


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is loaded: `context_length` in tokens, `quantization` as it was resolved (never `auto`)."""

    name: str
    context_length: int
    quantization: str
    device: str


@dataclass(frozen=True, slots=True)
class Accepted:
    """First, exactly once: the request is valid and fits; nothing has been computed yet."""

    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """Next tokens of choice `index`, with the text they settle (see `forebay_contracts.wire.frames.Delta`).

    `text` never holds a part of a character, of a stop string or of a special token. `tool_calls` are OpenAI
    streamed tool-call deltas.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Vector:
    """The embedding of input `index`, whole: `values` are float32, little-endian."""

    index: int
    values: bytes


@dataclass(frozen=True, slots=True)
class Finished:
    """Once a choice: `finish_reason` is OpenAI's (stop, length, tool_calls); `cached_tokens` of its prompt."""

    index: int
    finish_reason: str
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy an engine is: sequences in its batch, steps (forward passes) that it has made since it started, and
    the part (0 to 1) of its KV cache in use, None without one.

    Steps that stand still while there are sequences mean that the engine is stuck.
    """

    sequences: int
    steps: int
    cache_usage: float | None = None


EngineEvent = Accepted | Tokens | Vector | Finished

ResumeTokens = Mapping[int, Sequence[int]]
"""For a choice's index, the tokens that its client already has from an earlier attempt."""


class EngineFault(Exception):
    """The engine could not serve a request that was in order; another attempt may. The message quotes no request."""


def reason_of(error: BaseException) -> str:
    """What went wrong, for logs and states: of what is no EngineFault the kind and the place, since its message may
    quote a request."""
    if isinstance(error, EngineFault):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    return f"{type(error).__name__} at {places}"


class Engine(Protocol):
    """Generates tokens, or computes embeddings, for many requests at once.

    A request's own faults (too long, bad template) are raised by `generate` as
    `forebay_contracts.wire.errors.RequestError`, before `Accepted`; the engine's own as `EngineFault`, at any point.
    `completion_types` is what it serves, known before it has started.
    """

    completion_types: tuple[CompletionType, ...]

    async def start(self, progress: Callable[[str], None]) -> ModelInfo:
        """Load and warm up; calls `progress` (from any thread) with one readable line per step."""
        ...

    def generate(self, request: InferenceRequest, resume: ResumeTokens) -> AsyncGenerator[EngineEvent, None]:
        """Accepted, then Tokens (of an embedding one Vector instead) and Finished in any interleaving of choices,
        ending after the last Finished.

        With `resume`, the tokens given are taken as generated already: they are prefilled and not sent again,
        and what follows goes on as the earlier attempt would have. Closing the generator (`aclose`) takes the
        request out of the batch within one step.
        """
        ...

    def fault(self) -> str | None:
        """Why the engine can serve nothing any more, or None while it can."""
        ...

    def load(self) -> EngineLoad:
        """How busy it is now; cheap, and callable from any thread."""
        ...

    async def close(self) -> None:
        """Stop, failing what still runs; frees the memory."""
        ...


def require_served(engine: Engine, request: InferenceRequest) -> None:
    """Refuse a request of a type that `engine` does not serve; raises UnsupportedByModel."""
    if request.completion_type not in engine.completion_types:
        raise UnsupportedByModel(request.model, request.completion_type, engine.completion_types)
