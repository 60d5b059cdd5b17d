"""The engine seam, in tokens: what the text layer needs of whatever runs a model.

An engine is asked with token ids and answers with token ids. Templates, stop strings, tool calls, echo and choices
belong to `engine.text`, which is the same for every engine.
"""

import traceback
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from forebay_contracts.wire.errors import InvalidRequest
from forebay_contracts.wire.request import Sampling


class EngineFault(Exception):
    """The engine could not serve a request that was in order; another attempt may. The message quotes no request."""


class GrammarError(Exception):
    """A grammar cannot be enforced, by this engine or at all. The message says why, in a line."""


def reason_of(error: BaseException) -> str:
    """What went wrong, for logs and states. For an error that is no EngineFault: its kind and place, since its message
    may quote a request."""
    if isinstance(error, EngineFault):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    return f"{type(error).__name__} at {places}"


Fault = EngineFault | InvalidRequest
"""What an engine raises: the request's own fault is an InvalidRequest."""


def as_fault(error: Exception) -> Fault:
    """`error` as an engine raises it."""
    return error if isinstance(error, Fault) else EngineFault(reason_of(error))


class Tokenizer(Protocol):
    """Text to token ids and back. Thread-safe.

    `vocabulary_size`: every id that a client may name is below it. `begin_token` stands for an empty prompt, None
    where the model has no such token. `chat_template` is the template's source, None without one. `special_tokens`
    are the ids of the tokens that an answer does not show, by their text.
    """

    vocabulary_size: int
    begin_token: int | None
    chat_template: str | None
    special_tokens: Mapping[str, int]

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """The ids of `text`; with `special_tokens`, also those that the model expects around a text."""

    def decode(self, tokens: Sequence[int], *, show: Collection[int] = ()) -> str:
        """The text of `tokens`, U+FFFD where bytes make no character; of the special tokens, only those of `show`."""

    def bytes_of(self, token: int) -> bytes:
        """The bytes of one token, which need not be whole characters."""

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The prompt's text for `messages`; raises what the template raises."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do. The text layer refuses by name what it cannot.

    `resumes`: how the engine goes on after tokens that were generated elsewhere. `exact`: as it would have done
    itself, but for rounding at near ties. `greedy`: so at temperature 0, and with other draws elsewhere. `no`: it
    cannot. `grammars` are those of llguidance, in its Lark dialect or GBNF: each answer follows its grammar
    (`enforced`), none needs to (`ignored`, for tests alone), or a request with one is refused (`no`). With
    `prompt_logprobs`, it is a Scorer. Without `resumes_grammars`, it cannot go on with an answer that has a grammar.
    `refused` are the fields of Sampling that it takes at their defaults alone. `restarts` are those whose effect begins
    anew behind the tokens of an earlier attempt: it cannot go on with an answer that has one. With `adapters`, it can
    load LoRA adapters.
    """

    resumes: Literal["exact", "greedy", "no"]
    grammars: Literal["enforced", "ignored", "no"]
    logprobs: bool
    prompt_logprobs: bool = False
    resumes_grammars: bool = True
    refused: tuple[str, ...] = ()
    restarts: tuple[str, ...] = ()
    adapters: bool = False


class TokenRequest(NamedTuple):
    """One sequence to be continued.

    Of `sampling`, the text layer obeys `max_tokens`, `seed`, `stop`, `ignore_eos` and `unset`, and the engine the rest.
    The engine draws random numbers from `seed`. The tokens follow `grammar`, made by `LoadedModel.compile`, where there
    is one. `generated` are the tokens after `prompt` that an earlier attempt generated: they count for penalties,
    grammar and draws, and not for `max_new_tokens`. A token of `end_tokens` ends the sequence, but is not among the
    first `min_tokens` of `sampling`. `adapter` is one of `LoadedModel.adapters`, or empty. `id` is for logs.
    """

    id: str
    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    seed: str = ""
    grammar: Any = None
    generated: Sequence[int] = ()
    end_tokens: frozenset[int] = frozenset()
    adapter: str = ""


class TokenLogprob(NamedTuple):
    """The log probability of a chosen token, and the best alternatives as (token, log probability), best first.

    They are the model's own, before penalties, temperature and grammar. The first token of a prompt has none. Only
    tokens of a prompt have a `rank`, from 1.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


class Step(NamedTuple):
    """The next tokens of a sequence, with a `logprobs` entry each where those were asked for.

    The last step has `finish`. Its tokens then end with an end token or are the last of `max_new_tokens`; where the
    engine ended for another reason, there are none. `cached_tokens` of the prompt were not computed.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Literal["stop", "length"] | None = None
    cached_tokens: int = 0


class EngineStatus(NamedTuple):
    """How an engine is: why it can serve nothing any more (None while it can), sequences in its batch, steps (forward
    passes) since it started, and the part (0 to 1) of its KV cache in use, None without one.

    Steps that stand still while there are sequences mean that the engine is stuck.
    """

    fault: str | None
    sequences: int
    steps: int
    cache_usage: float | None = None


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready. `quantization` as it was resolved (never `auto`); `context_length` in tokens.

    `recommended` is what the model recommends of `forebay_contracts.wire.request.RECOMMENDABLE`. `compile` makes
    of a grammar's text what one TokenRequest or more, of one request, take; it may take seconds, on any thread, and
    raises GrammarError. A prompt shorter than `quick_length` may be tokenized on the event loop. An embedding model's
    vectors have `dimensions` numbers (None: a request may choose), and `prefix` goes before each text. `adapters` are
    the names of its LoRA adapters.
    """

    tokenizer: Tokenizer
    context_length: int
    quantization: str
    device: str
    end_tokens: frozenset[int] = frozenset()
    recommended: Mapping[str, float] = field(default_factory=dict)
    compile: Callable[[str], Any] = lambda grammar: grammar
    quick_length: int = 0
    dimensions: int | None = None
    prefix: str = ""
    adapters: frozenset[str] = frozenset()


class Runtime(Protocol):
    """Has a model in memory. Its own failures are raised as EngineFault, at any point."""

    async def start(self, progress: Callable[[str], None]) -> LoadedModel:
        """Load and warm up; calls `progress` (from any thread) with one readable line a step.

        Raises:
            ConfigurationError: the model or the device cannot be had.
        """

    def status(self) -> EngineStatus:
        """How it is now; cheap, and callable from any thread."""

    async def close(self) -> None:
        """Stop, failing what still runs; frees the memory."""


@runtime_checkable
class Engine(Runtime, Protocol):
    """Generates tokens for many sequences at once."""

    capabilities: Capabilities

    def generate(self, request: TokenRequest) -> AsyncGenerator[Step, None]:
        """The steps of a sequence, until one has `finish`. Closing the generator (`aclose`) takes the sequence out of
        the batch within one step.

        Raises:
            InvalidRequest: the grammar cannot be enforced any further, at any point.
        """


class Scorer(Protocol):
    """Tells how likely the tokens of a prompt are. An engine with the capability `prompt_logprobs` is one."""

    def score(
        self, id: str, prompt: Sequence[int], top: int, adapter: str = ""
    ) -> AsyncGenerator[tuple[TokenLogprob, ...], None]:
        """For each token of `prompt` but the first, in order and in parts: its log probability after those before it,
        with the `top` best alternatives. Closing the generator stops within one step. `id` is for logs. For `adapter`
        see `TokenRequest`."""


@runtime_checkable
class Embedder(Runtime, Protocol):
    """Computes vectors for many inputs at once."""

    def embed(
        self, inputs: Mapping[int, Sequence[int]], dimensions: int | None
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        """The vector of each of `inputs`, by its index, as float32, little-endian, in any order. Closing the generator
        takes out what was not computed yet."""


@runtime_checkable
class Reranker(Runtime, Protocol):
    """Scores how relevant documents are. It is asked in text: how query and document become tokens is the model's."""

    def rerank(self, query: str, documents: Mapping[int, str]) -> AsyncGenerator[tuple[Mapping[int, float], int], None]:
        """The relevance of each of `documents` to `query`, by its index, in parts and any order; with each part, the
        tokens that it took. Closing the generator takes out what was not computed yet.

        Raises:
            InvalidRequest: the model cannot take one of them, at any point.
        """
