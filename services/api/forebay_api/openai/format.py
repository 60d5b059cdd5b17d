"""What the answers of OpenAI's endpoints have in common.

A whole answer is a fold over the same deltas as the stream.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Protocol

import orjson

from forebay_api.openai.body import GenerationBody
from forebay_contracts.wire.errors import ApiError
from forebay_contracts.wire.frames import Completed, Delta, FinishedChoice, TokenLogprob
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import Usage

DONE = b"data: [DONE]\n\n"


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

    def __init__(self, request: InferenceRequest, body: GenerationBody | None) -> None:
        self._request = request
        options = body.stream_options if body is not None else None
        self._include_usage = options is not None and options.include_usage

    def queued(self) -> bytes:
        """What a stream begins with if it begins before a worker has."""
        return b": queued\n\n"

    def opening(self) -> bytes:
        """Events before the first token."""
        return b""

    @abstractmethod
    def chunk(self, delta: Delta) -> bytes:
        """The event of a delta; empty if it shows nothing."""

    def closing(self, completed: Completed) -> bytes:
        """One finish reason for each choice, then usage if the client asked for it, then [DONE]."""
        events = [self._event([self._last_chunk(choice)]) for choice in completed.choices]
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
        usage = usage_object(completed.usage)
        return orjson.dumps(self._head | {"object": self._whole_object, "choices": choices, "usage": usage})

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
            "model": self._request.model,
        }

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        payload = self._head | {"choices": choices}
        if self._include_usage:
            payload["usage"] = usage
        return event(payload)


def joined_logprobs(deltas: Iterable[Delta]) -> tuple[TokenLogprob, ...]:
    """The log probabilities of all tokens of `deltas`."""
    return tuple(logprob for delta in deltas for logprob in delta.logprobs)
