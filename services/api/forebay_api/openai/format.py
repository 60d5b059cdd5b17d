"""What the answers of OpenAI's endpoints have in common.

A whole answer is a fold over the same deltas as the stream.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Protocol

import orjson

from forebay_api.http import sse
from forebay_api.openai.generation import GenerationBody
from forebay_contracts.wire.errors import ApiError
from forebay_contracts.wire.frames import Completed, Delta, FinishedChoice, TokenLogprob, TopLogprob
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import Usage

DONE = b"data: [DONE]\n\n"
_NO_USAGE = Usage(prompt_tokens=0, completion_tokens=0)


class Format(Protocol):
    """How an endpoint writes a whole answer."""

    def whole(self, deltas: Iterable[Delta], completed: Completed) -> bytes:
        """The answer as one JSON object."""
        ...


def event(payload: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(payload) + b"\n\n"


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


class StreamWriter(Format, Protocol):
    """How an endpoint writes a stream."""

    def queued(self) -> bytes:
        """What a stream begins with if it begins before a worker has."""
        ...

    def keep_alive(self) -> bytes:
        """What comes while nothing else does."""
        ...

    def opening(self) -> bytes:
        """What comes once a worker has begun."""
        ...

    def chunk(self, delta: Delta) -> bytes:
        """The events of one delta."""
        ...

    def closing(self, completed: Completed) -> bytes:
        """The events that end a whole answer."""
        ...

    def failure(self, error: ApiError) -> bytes:
        """The event that ends a broken stream."""
        ...


class StreamFormat(ABC):
    """How chat and completions write an answer, streamed or whole."""

    _prefix: ClassVar[str]
    _whole_object: ClassVar[str]
    _chunk_object: ClassVar[str]
    _prompt_in_choice: ClassVar[bool]

    def __init__(self, request: InferenceRequest, body: GenerationBody | None) -> None:
        self._request = request
        options = body.stream_options if body is not None else None
        self._include_usage = options is not None and options.include_usage
        self._continuous_usage = body is not None and body.continuous_usage
        self._token_ids = body is not None and body.return_token_ids
        self._told_prompt_logprobs = body.prompt_logprobs if body is not None else None
        # Of a stream, as far as it has come: the prompts that were not told yet, and the tokens of all choices.
        self._prompts: dict[int, list[int]] = {}
        self._usage = _NO_USAGE

    def queued(self) -> bytes:
        """What a stream begins with if it begins before a worker has."""
        return b": queued\n\n"

    def keep_alive(self) -> bytes:
        """What comes while nothing else does."""
        return sse.COMMENT

    def opening(self) -> bytes:
        """Events before the first token."""
        return b""

    @abstractmethod
    def chunk(self, delta: Delta) -> bytes:
        """The event of a delta; empty if it shows nothing."""

    def _told(self, delta: Delta) -> dict[str, Any]:
        """What the client asked to be told of the tokens of `delta`, in its choice object. Counts them."""
        if self._continuous_usage:
            count, usage = len(delta.tokens), self._usage
            # The choices of one prompt share it.
            new = (count if delta.index % self._request.n == 0 else 0, 0) if delta.prompt else (0, count)
            self._usage = Usage(
                prompt_tokens=usage.prompt_tokens + new[0], completion_tokens=usage.completion_tokens + new[1]
            )
        if not self._token_ids:
            return {}
        if delta.prompt:
            self._prompts.setdefault(delta.index, []).extend(delta.tokens)
            return {}
        return self._told_prompt(delta.index) | {"token_ids": delta.tokens}

    def _told_prompt(self, index: int) -> dict[str, Any]:
        prompt = self._prompts.pop(index, None)
        return {} if prompt is None else {"prompt_token_ids": prompt}

    def closing(self, completed: Completed) -> bytes:
        """One finish reason for each choice, then usage if the client asked for it, then [DONE]."""
        events = [
            self._event([self._last_chunk(choice) | self._told_prompt(choice.index)]) for choice in completed.choices
        ]
        if self._include_usage:
            events.append(self._event([], usage_object(completed.usage)))
        return b"".join((*events, DONE))

    def failure(self, error: ApiError) -> bytes:
        """OpenAI's error object as an event. No [DONE] follows it."""
        return event(error.body())

    def whole(self, deltas: Iterable[Delta], completed: Completed) -> bytes:
        """The object of the whole answer."""
        by_index: dict[int, list[Delta]] = {choice.index: [] for choice in completed.choices}
        for delta in deltas:
            by_index[delta.index].append(delta)
        choices = [self._whole_choice(choice, by_index[choice.index]) for choice in completed.choices]
        answer = self._head | {
            "object": self._whole_object,
            "choices": choices,
            "usage": usage_object(completed.usage),
        }
        if self._token_ids or self._told_prompt_logprobs is not None:
            for choice in choices:
                (choice if self._prompt_in_choice else answer).update(self._whole_prompt(by_index[choice["index"]]))
                if self._token_ids:
                    choice["token_ids"] = _tokens(by_index[choice["index"]], prompt=False)
        return orjson.dumps(answer)

    def _whole_prompt(self, deltas: list[Delta]) -> dict[str, Any]:
        """The prompt of a choice, as vLLM tells it."""
        told: dict[str, Any] = {"prompt_token_ids": _tokens(deltas, prompt=True)} if self._token_ids else {}
        if (count := self._told_prompt_logprobs) is not None:
            entries = joined_logprobs(delta for delta in deltas if delta.prompt)
            told["prompt_logprobs"] = [_ranked(entry, count) for entry in entries]
        return told

    @abstractmethod
    def _last_chunk(self, choice: FinishedChoice) -> dict[str, Any]:
        """The choice object that tells the finish reason."""

    @abstractmethod
    def _whole_choice(self, choice: FinishedChoice, deltas: list[Delta]) -> dict[str, Any]:
        """The choice object of a whole answer."""

    @functools.cached_property
    def _head(self) -> dict[str, Any]:
        # Made at the first event: a request that waits needs no memory for it.
        return {
            "id": f"{self._prefix}-{self._request.id}",
            "object": self._chunk_object,
            "created": int(self._request.created_at),
            "model": self._request.named_model,
            "service_tier": self._request.service_tier,
        }

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        payload = self._head | {"choices": choices}
        if self._token_ids and choices and not self._prompt_in_choice and "prompt_token_ids" in choices[0]:
            payload["prompt_token_ids"] = choices[0].pop("prompt_token_ids")
        if self._include_usage:
            payload["usage"] = usage_object(self._usage) if usage is None and self._continuous_usage else usage
        return event(payload)


def _tokens(deltas: Iterable[Delta], *, prompt: bool) -> list[int]:
    return [token for delta in deltas if delta.prompt == prompt for token in delta.tokens]


def _ranked(entry: TokenLogprob, count: int) -> dict[str, Any] | None:
    """A token of a prompt and its `count` best alternatives, by their ids; None for the first."""
    if entry.logprob is None:
        return None
    ranked = {str(other.token): _rank(other, rank) for rank, other in enumerate(entry.top[:count], 1)}
    return ranked | {str(entry.token): _rank(entry, entry.rank)}


def _rank(one: TopLogprob, rank: int | None) -> dict[str, Any]:
    return {"logprob": one.logprob, "rank": rank, "decoded_token": one.text}


def joined_logprobs(deltas: Iterable[Delta]) -> tuple[TokenLogprob, ...]:
    """The log probabilities of all tokens of `deltas`."""
    return tuple(logprob for delta in deltas for logprob in delta.logprobs)
