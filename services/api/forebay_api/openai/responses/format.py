"""The answer of `POST /v1/responses`, as events and as an object."""

from collections.abc import Iterable

import orjson

from forebay_api.openai.responses.events import ResponseFold, sse
from forebay_api.openai.responses.output import Event
from forebay_api.openai.responses.record import ResponseRecord
from forebay_contracts.wire.errors import ApiError
from forebay_contracts.wire.frames import Completed, Delta


class InputTokensFormat:
    """The number of tokens of an input."""

    def whole(self, deltas: Iterable[Delta], completed: Completed) -> bytes:
        """The answer as one JSON object."""
        tokens = completed.usage.prompt_tokens
        return orjson.dumps({"object": "response.input_tokens", "input_tokens": tokens})


class ResponseFormat:
    """Writes a response. Events up to number `after` are left out."""

    def __init__(self, record: ResponseRecord, after: int = -1) -> None:
        self._fold = ResponseFold(record)
        self._after = after

    def queued(self) -> bytes:
        """The response is created, and waits."""
        return self._written(self._fold.opening())

    def keep_alive(self) -> bytes:
        """OpenAI's event `keepalive`, which some clients wait for: Codex takes no comment for a sign of life.

        It has the number of the event before it, since it is none of the response's own.
        """
        return sse({"type": "keepalive", "sequence_number": max(self._fold.number - 1, self._after)})

    def opening(self) -> bytes:
        """A worker has begun."""
        return self._written(self._fold.started())

    def chunk(self, delta: Delta) -> bytes:
        """The events of one delta."""
        return self._written(self._fold.delta(delta))

    def closing(self, completed: Completed) -> bytes:
        """The response is whole."""
        return self._written(self._fold.completed(completed))

    def failure(self, error: ApiError) -> bytes:
        """The response broke off."""
        return self._written(self._fold.failed(error.status, error.code, error.message))

    def whole(self, deltas: Iterable[Delta], completed: Completed) -> bytes:
        """The answer as one JSON object."""
        self._fold.opening()
        for delta in deltas:
            self._fold.delta(delta)
        self._fold.completed(completed)
        return self._fold.encode()

    def waiting(self) -> bytes:
        """The response object before anything has come."""
        self._fold.opening()
        return self._fold.encode()

    def _written(self, events: list[Event]) -> bytes:
        return b"".join(sse(event) for event in events if event["sequence_number"] > self._after)
