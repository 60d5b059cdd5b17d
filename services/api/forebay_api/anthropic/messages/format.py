"""The answers of `POST /v1/messages`, streamed and whole, and of `/v1/messages/count_tokens`.

Sources: https://docs.anthropic.com/en/api/messages and https://docs.anthropic.com/en/docs/build-with-claude/streaming.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Final

import orjson

from forebay_api.anthropic.errors import anthropic_error
from forebay_api.anthropic.messages.body import CountTokensBody, MessagesBody
from forebay_contracts.wire import names
from forebay_contracts.wire.errors import ApiError
from forebay_contracts.wire.frames import Completed, Delta
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import Usage

_STOP_REASONS: Final = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_FORMS: Final[dict[str, tuple[dict[str, Any], str, str]]] = {
    "text": ({"text": ""}, "text_delta", "text"),
    "thinking": ({"thinking": "", "signature": ""}, "thinking_delta", "thinking"),
    "tool_use": ({"input": {}}, "input_json_delta", "partial_json"),
}
"""Of each type of block: how it begins, the type of its deltas, and their member."""


class CountFormat:
    """The number of tokens."""

    def __init__(self, request: InferenceRequest, body: CountTokensBody) -> None:
        pass

    def whole(self, deltas: Iterable[Delta], completed: Completed) -> bytes:
        """The answer as one JSON object."""
        return orjson.dumps({"input_tokens": completed.usage.prompt_tokens})


class MessagesFormat:
    """A message: blocks of thinking, text and tool use, one after the other.

    As events, each block has a start, deltas and a stop. The whole message is a fold over the same events.
    """

    def __init__(self, request: InferenceRequest, body: MessagesBody) -> None:
        self._request = request
        self._shows_thinking = body.shows_thinking
        self._shows_thoughts = body.thinking is not None and body.thinking.display != "omitted"
        self._begun = False
        self._block: str | None = None
        self._call: int | None = None
        self._blocks = 0

    def queued(self) -> bytes:
        """`message_start` and a ping, if the stream begins before a worker has."""
        self._begun = True
        return _written([self._start_of_message(), {"type": "ping"}])

    def keep_alive(self) -> bytes:
        """A ping."""
        return _written([{"type": "ping"}])

    def opening(self) -> bytes:
        """`message_start`, unless it was sent. The tokens of the prompt are known only at the end."""
        return b"" if self._begun else _written([self._start_of_message()])

    def chunk(self, delta: Delta) -> bytes:
        """The events of one delta."""
        return _written(self._events(delta))

    def closing(self, completed: Completed) -> bytes:
        """The events that end the message."""
        return _written([*self._stop(), self._end(completed), {"type": "message_stop"}])

    def failure(self, error: ApiError) -> bytes:
        """The event that ends a broken stream."""
        return _written([anthropic_error(error, self._request.id)[1]])

    def whole(self, deltas: Iterable[Delta], completed: Completed) -> bytes:
        """The answer as one JSON object."""
        blocks: list[dict[str, Any]] = []
        pieces: list[str] = []
        for event in (*(event for delta in deltas for event in self._events(delta)), *self._stop()):
            match event["type"]:
                case "content_block_start":
                    blocks.append(event["content_block"])
                    pieces.clear()
                case "content_block_delta":
                    pieces.append(next(value for name, value in event["delta"].items() if name != "type"))
                case "content_block_stop":
                    _fill(blocks[-1], "".join(pieces))
        end = self._end(completed)
        return orjson.dumps(self._message() | {"content": blocks, **end["delta"], "usage": end["usage"]})

    def _start_of_message(self) -> dict[str, Any]:
        return {"type": "message_start", "message": self._message()}

    def _message(self) -> dict[str, Any]:
        return {
            "id": f"{names.MESSAGE_PREFIX}{self._request.id.replace('-', '')}",
            "type": "message",
            "role": "assistant",
            "model": self._request.named_model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "stop_details": None,
            "usage": _usage(Usage(prompt_tokens=0, completion_tokens=0)),
        }

    def _events(self, delta: Delta) -> Iterator[dict[str, Any]]:
        if delta.reasoning and self._shows_thinking:
            yield from self._piece("thinking", delta.reasoning if self._shows_thoughts else "")
        if delta.text:
            yield from self._piece("text", delta.text)
        for call in delta.tool_calls:
            function = call.get("function", {})
            if call["index"] != self._call:
                self._call = call["index"]
                yield from self._start("tool_use", id=call.get("id", ""), name=function.get("name") or "")
            if arguments := function.get("arguments"):
                yield from self._piece("tool_use", arguments)

    def _piece(self, block: str, text: str) -> Iterator[dict[str, Any]]:
        """The next piece of a block, which it starts if it is not open."""
        if self._block != block:
            yield from self._start(block)
        _, kind, member = _FORMS[block]
        yield {"type": "content_block_delta", "index": self._blocks, "delta": {"type": kind, member: text}}

    def _start(self, block: str, **known: Any) -> Iterator[dict[str, Any]]:
        yield from self._stop()
        self._block = block
        yield {
            "type": "content_block_start",
            "index": self._blocks,
            "content_block": {"type": block, **known, **_FORMS[block][0]},
        }

    def _stop(self) -> Iterator[dict[str, Any]]:
        if self._block is not None:
            yield {"type": "content_block_stop", "index": self._blocks}
            self._block = None
            self._blocks += 1

    def _end(self, completed: Completed) -> dict[str, Any]:
        (choice,) = completed.choices
        reason = "stop_sequence" if choice.stop_string is not None else _STOP_REASONS[choice.finish_reason]
        return {
            "type": "message_delta",
            "delta": {"stop_reason": reason, "stop_sequence": choice.stop_string, "stop_details": None},
            "usage": _usage(completed.usage),
        }


def _written(events: Iterable[dict[str, Any]]) -> bytes:
    """Server-sent events, which have their type as name too."""
    return b"".join(b"event: %s\ndata: %s\n\n" % (event["type"].encode(), orjson.dumps(event)) for event in events)


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic's usage: `input_tokens` are those that were not cached."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
        "service_tier": "standard",
    }


def _fill(block: dict[str, Any], text: str) -> None:
    """Give a block its whole content."""
    if block["type"] != "tool_use":
        block[block["type"]] = text
        return
    try:
        block["input"] = orjson.loads(text or "{}")
    except orjson.JSONDecodeError:
        block["input"] = {}  # the call was cut: `stop_reason` says so
