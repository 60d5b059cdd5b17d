"""The answer of `POST /v1/chat/completions`, streamed and whole.

Sources: https://platform.openai.com/docs/api-reference/chat/object and chat/streaming.
"""

from collections.abc import Iterable
from typing import Any

from forebay_api.openai.format import StreamFormat, joined_logprobs
from forebay_contracts.wire.frames import Delta, FinishedChoice, TokenLogprob, TopLogprob


class ChatFormat(StreamFormat):
    """`chat.completion` and `chat.completion.chunk`."""

    _prefix = "chatcmpl"
    _whole_object = "chat.completion"
    _chunk_object = "chat.completion.chunk"
    _prompt_in_choice = False

    def opening(self) -> bytes:
        """One role delta for each choice."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(self._event([_chunk(index, delta)]) for index in range(self._request.n))

    def chunk(self, delta: Delta) -> bytes:
        """Reasoning, content, or pieces of tool calls."""
        told = self._told(delta) if self._request.return_prompt else {}
        if delta.prompt or not (delta.text or delta.reasoning or delta.tool_calls or delta.logprobs or told):
            return b""
        fields: dict[str, Any] = {}
        if delta.reasoning:
            fields["reasoning_content"] = delta.reasoning
        if delta.text or (delta.logprobs and not delta.reasoning):
            fields["content"] = delta.text
        if delta.tool_calls:
            fields["tool_calls"] = delta.tool_calls
        choice = _chunk(delta.index, fields, logprobs=_logprobs(delta.logprobs))
        return self._event([choice | told if told else choice])

    def _last_chunk(self, choice: FinishedChoice) -> dict[str, Any]:
        return _chunk(choice.index, {}, finish_reason=choice.finish_reason)

    def _whole_choice(self, choice: FinishedChoice, deltas: list[Delta]) -> dict[str, Any]:
        if self._request.return_prompt:
            deltas = [delta for delta in deltas if not delta.prompt]
        text = "".join(delta.text for delta in deltas)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if reasoning := "".join(delta.reasoning for delta in deltas):
            message["reasoning_content"] = reasoning
        if calls := _joined_tool_calls(deltas):
            message |= {"content": text or None, "tool_calls": calls}
        asked = self._request.sampling.logprobs is not None
        return {
            "index": choice.index,
            "message": message,
            "logprobs": _logprobs(joined_logprobs(deltas), asked=asked),
            "finish_reason": choice.finish_reason,
        }


def _chunk(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _joined_tool_calls(deltas: Iterable[Delta]) -> list[dict[str, Any]]:
    """The whole calls: their pieces bring first the id and the name, then the arguments."""
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


def _logprobs(logprobs: tuple[TokenLogprob, ...], *, asked: bool = False) -> dict[str, Any] | None:
    if not logprobs and not asked:
        return None
    content = [_token(one) | {"top_logprobs": [_token(other) for other in one.top]} for one in logprobs]
    return {"content": content, "refusal": None}


def _token(one: TopLogprob) -> dict[str, Any]:
    return {"token": one.text, "logprob": one.logprob, "bytes": list(one.utf8)}
