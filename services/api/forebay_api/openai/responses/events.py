"""What a client sees of a response: a pure function of its record and the frames of its answer.

So every api gives the same events with the same numbers, while the answer grows and after it.
Sources: https://platform.openai.com/docs/api-reference/responses-streaming and https://www.openresponses.org.
"""

import json
from typing import Any, Final

import orjson

from forebay_api.openai.responses.output import CallItem, Event, OutputItem, TextItem, logprob_objects
from forebay_api.openai.responses.record import ResponseRecord, item_id
from forebay_api.openai.responses.tools import by_function_name
from forebay_contracts.wire.errors import RequestCancelled
from forebay_contracts.wire.frames import Completed, Delta
from forebay_contracts.wire.state import Usage

_CODES: Final = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
"""The codes of errors that have none of their own."""


def sse(event: Event) -> bytes:
    """An event as a server-sent event."""
    return b"event: %s\ndata: %s\n\n" % (event["type"].encode(), _encoded(event))


def _encoded(shown: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(shown)
    except TypeError:  # a response repeats the client's numbers, and orjson writes those of 64 bits alone
        return json.dumps(shown).encode()


class ResponseFold:
    """Makes events of frames, and holds the response as it is. After its end, frames make no events.

    Frames must come in order: no delta twice, none missing. Each event has a `sequence_number`, from 0; `number` is
    that of the next.
    """

    def __init__(self, record: ResponseRecord) -> None:
        self._record = record
        self._tools = by_function_name(record.parameters["tools"])
        self.number = 0
        self._status = "queued"
        self._done: list[dict[str, Any]] = []
        self._text: TextItem | None = None
        self._call: CallItem | None = None
        # Of tokens whose text is still to come.
        self._logprobs: list[dict[str, Any]] = []
        self._usage: Usage | None = None
        self._error: dict[str, str] | None = None
        self._cut: dict[str, str] | None = None
        self._completed_at: int | None = None

    @property
    def ended(self) -> bool:
        """Whether no more events come."""
        return self._status not in ("queued", "in_progress")

    def opening(self) -> list[Event]:
        """The response is created, and waits."""
        return self._numbered([self._lifecycle("created"), self._lifecycle("queued")])

    def started(self) -> list[Event]:
        """An attempt has begun; the first gives an event."""
        if self._status != "queued":
            return []
        self._status = "in_progress"
        return self._numbered([self._lifecycle("in_progress")])

    def delta(self, delta: Delta) -> list[Event]:
        """The next tokens: reasoning, then text, then pieces of calls."""
        if self.ended:
            return []
        events = self.started()
        made: list[Event] = []
        if delta.reasoning:
            made += self._say(delta.reasoning, reasoning=True)
        if delta.logprobs and self._record.logprobs and (delta.text or not delta.reasoning):
            self._logprobs += logprob_objects(delta.logprobs)
        if delta.text:
            made += self._say(delta.text, reasoning=False)
        for piece in delta.tool_calls:
            # What was held back for the next text belongs to the markup of the call.
            self._logprobs = []
            made += self._piece(piece)
        return events + self._numbered(made)

    def completed(self, completed: Completed) -> list[Event]:
        """The answer is whole, or cut at its most tokens. The deltas of its last frame have come by `delta`."""
        if self.ended:
            return []
        events = self.started()
        made: list[Event] = []
        if not (self._done or self._text or self._call):
            made += self._say("", reasoning=False)
        if self._logprobs and self._text is not None and not self._text.reasoning:
            made += self._say("", reasoning=False)
        made += self._close("incomplete" if completed.cut else "completed")
        self._usage = completed.usage
        if completed.cut:
            self._status, self._cut = "incomplete", {"reason": "max_output_tokens"}
        else:
            self._status, self._completed_at = "completed", int(completed.at)
        return events + self._numbered([*made, self._lifecycle(self._status)])

    def failed(self, status: int, code: str | None, message: str) -> list[Event]:
        """The answer broke off: its HTTP status, code and message. What has come is kept as incomplete."""
        if self.ended:
            return []
        if status == RequestCancelled.status:
            self._status = "cancelled"
        else:
            self._status = "failed"
            self._error = {"code": code or _CODES.get(status, "server_error"), "message": message}
        return self._numbered([self._lifecycle("failed")])

    def encode(self) -> bytes:
        """The response object as JSON."""
        return _encoded(self.response())

    def response(self) -> dict[str, Any]:
        """The response object as it is now."""
        record, growing = self._record, self._growing()
        output = list(self._done)
        if growing is not None:
            output.append(growing.item("incomplete" if self.ended else "in_progress"))
        return {
            "id": record.id,
            "object": "response",
            "created_at": int(record.created_at),
            "completed_at": self._completed_at,
            "status": self._status,
            "background": record.background,
            "error": self._error,
            "incomplete_details": self._cut,
            "model": record.model,
            "output": output,
            "previous_response_id": record.previous_response_id,
            "conversation": {"id": record.conversation} if record.conversation is not None else None,
            "store": record.store,
            **record.parameters,
            "usage": usage_object(self._usage) if self._usage is not None else None,
        }

    def _numbered(self, events: list[Event]) -> list[Event]:
        for event in events:
            event["sequence_number"] = self.number
            self.number += 1
        return events

    def _lifecycle(self, name: str) -> Event:
        return {"type": f"response.{name}", "response": self.response()}

    def _growing(self) -> OutputItem | None:
        return self._text or self._call

    def _say(self, text: str, *, reasoning: bool) -> list[Event]:
        item, events = self._text, []
        if item is None or item.reasoning != reasoning:
            events = self._close("completed")
            item = self._text = TextItem(self._next_id("rs" if reasoning else "msg"), self._place, reasoning=reasoning)
            events += item.opened()
        logprobs, self._logprobs = ([], self._logprobs) if reasoning else (self._logprobs, [])
        events.append(item.delta(text, logprobs))
        return events

    def _piece(self, piece: dict[str, Any]) -> list[Event]:
        events, function = [], piece["function"]
        if "id" in piece:
            events = self._close("completed")
            served = self._tools.get(function["name"])
            prefix = "ctc" if served is not None and served.custom else "fc"
            self._call = CallItem(self._next_id(prefix), self._place, piece["id"], function["name"], served)
            events += self._call.opened()
        if self._call is not None and (arguments := function.get("arguments")):
            events += self._call.delta(arguments)
        return events

    def _close(self, status: str) -> list[Event]:
        item = self._growing()
        if item is None:
            return []
        events = item.closed(status)
        self._done.append(events[-1]["item"])
        self._text = self._call = None
        return events

    @property
    def _place(self) -> int:
        return len(self._done)

    def _next_id(self, prefix: str) -> str:
        return item_id(prefix, self._record.id, self._place)


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage of a response."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
