"""OpenAI's two answer formats, streamed and whole, from the same deltas.

Sources: https://platform.openai.com/docs/api-reference/chat/object, chat/streaming and completions/object.
A whole answer is a fold over the stream, so the two cannot differ.
"""

import codecs
import functools
from collections.abc import Iterable
from typing import Any, ClassVar, Protocol

import orjson

from forebay_contracts.wire.errors import ApiError
from forebay_contracts.wire.frames import Completed, Delta, TokenLogprob, TopLogprob
from forebay_contracts.wire.request import InferenceRequest
from forebay_contracts.wire.state import Usage

DONE = b"data: [DONE]\n\n"


def event(payload: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(payload) + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """The event that ends a stream which had begun and failed; no [DONE] follows it."""
    return event(error.body())


class WholeFormat(Protocol):
    """How an answer is written that is not streamed."""

    def whole(self, deltas: Iterable[Delta], completed: Completed) -> bytes:
        """The answer as one JSON object."""
        ...


class Format(WholeFormat, Protocol):
    """How an answer is written, streamed or not."""

    def opening(self) -> bytes:
        """Events before the first token."""
        ...

    def chunk(self, delta: Delta) -> bytes:
        """The event of a delta; empty where it shows nothing."""
        ...

    def closing(self, completed: Completed) -> bytes:
        """Finish reasons, usage if asked for, [DONE]."""
        ...


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


class _Stream:
    """What chunks of both formats have in common."""

    _prefix: ClassVar[str]
    _chunk_object: ClassVar[str]

    def __init__(self, request: InferenceRequest, *, include_usage: bool) -> None:
        self._request = request
        self._include_usage = include_usage

    @functools.cached_property
    def _head(self) -> dict[str, Any]:
        # Made when it is sent: a request that waits does without.
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

    def _usage_and_done(self, completed: Completed) -> bytes:
        if not self._include_usage:
            return DONE
        return self._event([], usage_object(completed.usage)) + DONE

    def _whole(self, whole_object: str, choices: list[dict[str, Any]], completed: Completed) -> bytes:
        return orjson.dumps(
            self._head | {"object": whole_object, "choices": choices, "usage": usage_object(completed.usage)}
        )


class ChatFormat(_Stream):
    """`chat.completion` and `chat.completion.chunk`."""

    _prefix = "chatcmpl"
    _chunk_object = "chat.completion.chunk"

    def opening(self) -> bytes:
        """One role delta for each choice."""
        return b"".join(
            self._choice(index, {"role": "assistant", "content": "", "refusal": None})
            for index in range(self._request.n)
        )

    def chunk(self, delta: Delta) -> bytes:
        """Content, or pieces of tool calls."""
        if not (delta.text or delta.tool_calls or delta.logprobs):
            return b""
        fields: dict[str, Any] = {}
        if delta.text or delta.logprobs:
            fields["content"] = delta.text
        if delta.tool_calls:
            fields["tool_calls"] = delta.tool_calls
        return self._choice(delta.index, fields, logprobs=_chat_logprobs(delta.logprobs))

    def closing(self, completed: Completed) -> bytes:
        """One finish reason for each choice, then usage, then [DONE]."""
        finishes = (self._choice(c.index, {}, finish_reason=c.finish_reason) for c in completed.choices)
        return b"".join(finishes) + self._usage_and_done(completed)

    def whole(self, deltas: Iterable[Delta], completed: Completed) -> bytes:
        """A `chat.completion`."""
        by_index = _by_index(deltas, completed)
        choices = []
        for choice in completed.choices:
            own = by_index[choice.index]
            text = "".join(delta.text for delta in own)
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if calls := _joined_tool_calls(own):
                message |= {"content": text or None, "tool_calls": calls}
            choices.append(
                {
                    "index": choice.index,
                    "message": message,
                    "logprobs": _chat_logprobs(
                        _joined_logprobs(own), asked=self._request.sampling.logprobs is not None
                    ),
                    "finish_reason": choice.finish_reason,
                }
            )
        return self._whole("chat.completion", choices, completed)

    def _choice(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        return self._event([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}])


class CompletionFormat(_Stream):
    """`text_completion`, streamed and whole."""

    _prefix = "cmpl"
    _chunk_object = "text_completion"

    def __init__(self, request: InferenceRequest, *, include_usage: bool) -> None:
        super().__init__(request, include_usage=include_usage)
        self._logprobs: dict[int, _CompletionLogprobs] = {}

    def opening(self) -> bytes:
        """Nothing: a completion has no role."""
        return b""

    def chunk(self, delta: Delta) -> bytes:
        """Text."""
        if not (delta.text or delta.logprobs):
            return b""
        logprobs = self._logprobs.setdefault(delta.index, _CompletionLogprobs())
        return self._choice(delta.index, delta.text, logprobs=logprobs.object(delta.logprobs))

    def closing(self, completed: Completed) -> bytes:
        """One finish reason for each choice, then usage, then [DONE]."""
        finishes = (self._choice(c.index, "", finish_reason=c.finish_reason) for c in completed.choices)
        return b"".join(finishes) + self._usage_and_done(completed)

    def whole(self, deltas: Iterable[Delta], completed: Completed) -> bytes:
        """A `text_completion`."""
        by_index = _by_index(deltas, completed)
        choices = []
        for choice in completed.choices:
            own = by_index[choice.index]
            logprobs = _CompletionLogprobs().object(_joined_logprobs(own))
            choices.append(
                {
                    "text": "".join(delta.text for delta in own),
                    "index": choice.index,
                    "logprobs": logprobs,
                    "finish_reason": choice.finish_reason,
                }
            )
        return self._whole("text_completion", choices, completed)

    def _choice(
        self, index: int, text: str, logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> bytes:
        return self._event([{"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}])


def _by_index(deltas: Iterable[Delta], completed: Completed) -> dict[int, list[Delta]]:
    by_index: dict[int, list[Delta]] = {choice.index: [] for choice in completed.choices}
    for delta in deltas:
        by_index[delta.index].append(delta)
    return by_index


def _joined_logprobs(deltas: Iterable[Delta]) -> tuple[TokenLogprob, ...]:
    return tuple(logprob for delta in deltas for logprob in delta.logprobs)


def _joined_tool_calls(deltas: Iterable[Delta]) -> list[dict[str, Any]]:
    """The calls that the streamed pieces make up: first the id and name, then the arguments bit by bit."""
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        for piece in delta.tool_calls:
            function = piece.get("function", {})
            call = calls.setdefault(
                piece["index"], {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
            )
            call["id"] = call["id"] or piece.get("id", "")
            call["function"]["name"] += function.get("name") or ""
            call["function"]["arguments"] += function.get("arguments") or ""
    return [calls[index] for index in sorted(calls)]


def _chat_logprobs(logprobs: tuple[TokenLogprob, ...], *, asked: bool = False) -> dict[str, Any] | None:
    if not logprobs and not asked:
        return None
    content = [_token(one) | {"top_logprobs": [_token(other) for other in one.top]} for one in logprobs]
    return {"content": content, "refusal": None}


def _token(one: TopLogprob) -> dict[str, Any]:
    return {"token": one.text, "logprob": one.logprob, "bytes": list(one.utf8)}


class _CompletionLogprobs:
    """The logprobs object of one completion's tokens, which come in one piece or several."""

    def __init__(self) -> None:
        self._text_offset = 0
        # Where a character is of several tokens, all of them are at its place.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def object(self, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
        """The object of the next tokens, None where there are none."""
        if not logprobs:
            return None
        offsets = []
        for one in logprobs:
            offsets.append(self._text_offset)
            self._text_offset += len(self._decoder.decode(one.utf8))
        return {
            "tokens": [_shown(one) for one in logprobs],
            "token_logprobs": [one.logprob for one in logprobs],
            # The chosen token is among them even where it is none of the best.
            "top_logprobs": [{_shown(other): other.logprob for other in (*one.top, one)} for one in logprobs],
            "text_offset": offsets,
        }


def _shown(one: TopLogprob) -> str:
    """A token as a completion names it: its text or, where that is no whole character, its bytes."""
    if one.raw is None:
        return one.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in one.raw)
