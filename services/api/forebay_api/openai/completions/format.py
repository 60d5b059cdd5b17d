"""The answer of `POST /v1/completions`, streamed and whole.

Source: https://platform.openai.com/docs/api-reference/completions/object.
"""

import codecs
from collections import defaultdict
from typing import Any

from forebay_api.openai.body import GenerationBody
from forebay_api.openai.format import StreamFormat, joined_logprobs
from forebay_contracts.wire.frames import Delta, FinishedChoice, TokenLogprob, TopLogprob
from forebay_contracts.wire.request import InferenceRequest


class CompletionFormat(StreamFormat):
    """`text_completion`, streamed and whole."""

    _prefix = "cmpl"
    _whole_object = _chunk_object = "text_completion"

    def __init__(self, request: InferenceRequest, body: GenerationBody) -> None:
        super().__init__(request, body)
        self._logprobs: defaultdict[int, Logprobs] = defaultdict(Logprobs)

    def chunk(self, delta: Delta) -> bytes:
        """Text."""
        if not (delta.text or delta.logprobs):
            return b""
        logprobs = self._logprobs[delta.index].next(delta.logprobs) if delta.logprobs else None
        return self._event([_choice(delta.index, delta.text, logprobs=logprobs)])

    def _last_chunk(self, choice: FinishedChoice) -> dict[str, Any]:
        return _choice(choice.index, "", finish_reason=choice.finish_reason)

    def _whole_choice(self, choice: FinishedChoice, deltas: list[Delta]) -> dict[str, Any]:
        text, logprobs = "".join(delta.text for delta in deltas), joined_logprobs(deltas)
        return _choice(choice.index, text, Logprobs().next(logprobs) if logprobs else None, choice.finish_reason)


def _choice(
    index: int, text: str, logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish_reason}


class Logprobs:
    """The logprobs objects of one choice, whose tokens come in one or more pieces."""

    def __init__(self) -> None:
        self._text_offset = 0
        # All tokens of one character have its offset.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def next(self, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        """The object of the next tokens."""
        offsets = []
        for one in logprobs:
            offsets.append(self._text_offset)
            self._text_offset += len(self._decoder.decode(one.utf8))
        return {
            "tokens": [_shown(one) for one in logprobs],
            "token_logprobs": [one.logprob for one in logprobs],
            # The chosen token is always among them, as with OpenAI.
            "top_logprobs": [{_shown(other): other.logprob for other in (*one.top, one)} for one in logprobs],
            "text_offset": offsets,
        }


def _shown(one: TopLogprob) -> str:
    """A token's text or, if it is only a part of a character, its bytes."""
    if one.raw is None:
        return one.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in one.raw)
