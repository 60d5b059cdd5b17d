"""The items of an answer while they grow: each gives the events of its opening, its deltas and its closing."""

import re
from typing import Any, Final, Protocol

from forebay_api.openai.responses.tools import CUSTOM_INPUT, Served
from forebay_contracts.wire.frames import TokenLogprob, TopLogprob

Event = dict[str, Any]

# The arguments of a custom tool, up to their text.
_HEAD: Final = re.compile(rf'\s*\{{\s*"{CUSTOM_INPUT}"\s*:\s*"')
# Text up to its quote, or up to an escape that is not whole yet. The halves of a surrogate pair are one escape.
_TEXT: Final = re.compile(
    r'(?:[^"\\]+|\\[^u]|\\u(?!(?:[0-9a-f]{0,3}|d[89ab][0-9a-f]{2}(?:\\(?:u[0-9a-f]{0,3})?)?)\Z))*', re.IGNORECASE
)
_ESCAPE: Final = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", '"': '"', "\\": "\\", "/": "/"}


class OutputItem(Protocol):
    """An item that grows."""

    def closed(self, status: str) -> list[Event]:
        """The events that end it as `status`, with the whole item in the last."""
        ...

    def item(self, status: str) -> dict[str, Any]:
        """The item as it is now."""
        ...


class TextItem:
    """A message, or what the model thinks: one content part that is text."""

    def __init__(self, identity: str, place: int, *, reasoning: bool) -> None:
        self.reasoning = reasoning
        self._id = identity
        self._place = place
        self._pieces: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._where = {"item_id": identity, "output_index": place, "content_index": 0}
        self._events = "response.reasoning_text" if reasoning else "response.output_text"

    def opened(self) -> list[Event]:
        """The empty item, and its empty part."""
        return [
            {"type": "response.output_item.added", "output_index": self._place, "item": self._shell("in_progress", [])},
            {"type": "response.content_part.added", **self._where, "part": self._part()},
        ]

    def delta(self, text: str, logprobs: list[dict[str, Any]]) -> Event:
        """The event of the next text."""
        self._pieces.append(text)
        event: Event = {"type": f"{self._events}.delta", **self._where, "delta": text}
        if not self.reasoning:
            self._logprobs += logprobs
            event["logprobs"] = logprobs
        return event

    def closed(self, status: str) -> list[Event]:
        """The whole text, part and item."""
        item = self.item(status)
        part = item["content"][0]
        done: Event = {"type": f"{self._events}.done", **self._where, "text": part["text"]}
        if not self.reasoning:
            done["logprobs"] = part["logprobs"]
        return [
            done,
            {"type": "response.content_part.done", **self._where, "part": part},
            {"type": "response.output_item.done", "output_index": self._place, "item": item},
        ]

    def item(self, status: str) -> dict[str, Any]:
        """The item with its text so far."""
        return self._shell(status, [self._part()])

    def _shell(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        if self.reasoning:
            return {"id": self._id, "type": "reasoning", "summary": [], "content": content}
        return {"id": self._id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _part(self) -> dict[str, Any]:
        text = "".join(self._pieces)
        if self.reasoning:
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "annotations": [], "logprobs": list(self._logprobs), "text": text}


class CallItem:
    """A call of a function, or of a custom tool on a text."""

    def __init__(self, identity: str, place: int, call_id: str, name: str, served: Served | None) -> None:
        self._custom = served is not None and served.custom
        self._id = identity
        self._place = place
        self._pieces: list[str] = []
        self._text = CustomInput()
        self._kind = "custom_tool_call" if self._custom else "function_call"
        self._holds = "input" if self._custom else "arguments"
        self._events = f"response.{self._kind}_{self._holds}"
        self._about: dict[str, Any] = {"call_id": call_id, "name": served.tool["name"] if served else name}
        if served is not None and served.namespace is not None:
            self._about["namespace"] = served.namespace

    def opened(self) -> list[Event]:
        """The call without arguments."""
        return [{"type": "response.output_item.added", "output_index": self._place, "item": self.item("in_progress")}]

    def delta(self, arguments: str) -> list[Event]:
        """The event of the next piece of the arguments, unless it shows nothing."""
        text = self._text.push(arguments) if self._custom else arguments
        return [self._delta(text)] if text else []

    def closed(self, status: str) -> list[Event]:
        """The whole arguments and the whole call."""
        rest = self._text.flush() if self._custom else ""
        events = [self._delta(rest)] if rest else []
        item = self.item(status)
        where = {"item_id": self._id, "output_index": self._place}
        return [
            *events,
            {"type": f"{self._events}.done", **where, self._holds: item[self._holds]},
            {"type": "response.output_item.done", "output_index": self._place, "item": item},
        ]

    def item(self, status: str) -> dict[str, Any]:
        """The call with its arguments so far."""
        return {
            "id": self._id,
            "type": self._kind,
            "status": status,
            **self._about,
            self._holds: "".join(self._pieces),
        }

    def _delta(self, text: str) -> Event:
        self._pieces.append(text)
        return {"type": f"{self._events}.delta", "item_id": self._id, "output_index": self._place, "delta": text}


class CustomInput:
    """Reads the text of a custom tool out of the arguments of its function while they stream.

    Arguments of another form are the text as they are.
    """

    def __init__(self) -> None:
        self._pending = ""
        self._inside = self._ended = False

    def push(self, arguments: str) -> str:
        """The text that `arguments` adds."""
        self._pending += arguments
        if not self._inside:
            head = _HEAD.match(self._pending)
            if head is None:
                return ""
            self._inside, self._pending = True, self._pending[head.end() :]
        if self._ended:
            return ""
        found = _TEXT.match(self._pending)
        assert found is not None
        raw = found[0]
        self._ended = len(raw) < len(self._pending) and self._pending[len(raw)] == '"'
        self._pending = self._pending[len(raw) :]
        return _unescaped(raw)

    def flush(self) -> str:
        """What is left at the end: all of it, if it is no object with a text."""
        rest, self._pending = self._pending, ""
        return "" if self._inside else rest


def _unescaped(raw: str) -> str:
    """The text of a JSON string. What JSON does not escape stays as it is: models write `\\d` for a digit."""
    text = _ESCAPE.sub(_character, raw)
    # Joins surrogate pairs, and replaces halves: they cannot be written as UTF-8.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if "\\u" in raw else text


def _character(escape: re.Match[str]) -> str:
    return chr(int(escape[1], 16)) if escape[1] else _ESCAPES.get(escape[2], escape[0])


def logprob_objects(logprobs: tuple[TokenLogprob, ...]) -> list[dict[str, Any]]:
    """Log probabilities as a response shows them."""
    return [_token(one) | {"top_logprobs": [_token(other) for other in one.top]} for one in logprobs]


def _token(one: TopLogprob) -> dict[str, Any]:
    return {"token": one.text, "logprob": one.logprob, "bytes": list(one.utf8)}
