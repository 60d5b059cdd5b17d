"""The answer of `POST /v1/responses`, as events and as an object."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson

from forebay_api.openai.responses.compaction import sealed
from forebay_api.openai.responses.events import ResponseFold, sse, usage_object
from forebay_api.openai.responses.output import Event
from forebay_api.openai.responses.record import ResponseRecord, item_id
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ApiError, InferenceFailed
from forebay_contracts.wire.frames import Completed, Delta
from forebay_contracts.wire.request import InferenceRequest


class InputTokensFormat:
    """The number of tokens of an input."""

    def whole(self, deltas: Iterable[Delta], completed: Completed) -> bytes:
        """The answer as one JSON object."""
        tokens = completed.usage.prompt_tokens
        return orjson.dumps({"object": "response.input_tokens", "input_tokens": tokens})


class CompactFormat:
    """A compacted conversation, to be sent as `input`: what users and developers said in `items`, and the summary."""

    def __init__(self, request: InferenceRequest, items: Sequence[Mapping[str, Any]]) -> None:
        self._request = request
        self._kept = [item for item in items if item["type"] == "message" and item["role"] != "assistant"]

    def whole(self, deltas: Iterable[Delta], completed: Completed) -> bytes:
        """The answer as one JSON object. Raises InferenceFailed if the summary is empty."""
        summary = "".join(delta.text for delta in deltas).strip()
        if not summary:
            raise InferenceFailed("the model wrote no summary of the conversation")
        identifier = names.response_id(self._request.id)
        compaction = {
            "id": item_id("cmp", identifier, len(self._kept)),
            "type": "compaction",
            "encrypted_content": sealed(summary),
        }
        return orjson.dumps(
            {
                "id": identifier,
                "object": "response.compaction",
                "created_at": int(self._request.created_at),
                "output": [*self._kept, compaction],
                "usage": usage_object(completed.usage),
            }
        )


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

    def response(self) -> dict[str, Any]:
        """The response object as far as it has been written."""
        return self._fold.response()

    def waiting(self) -> bytes:
        """The response object before anything has come."""
        self._fold.opening()
        return self._fold.encode()

    def _written(self, events: list[Event]) -> bytes:
        return b"".join(sse(event) for event in events if event["sequence_number"] > self._after)
