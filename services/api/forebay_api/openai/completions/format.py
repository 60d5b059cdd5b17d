"""The answer of `POST /v1/completions`, streamed and whole.

Source: https://platform.openai.com/docs/api-reference/completions/object.
"""

import codecs
from collections import defaultdict
from typing import Any

from forebay_api.openai.format import StreamFormat, joined_logprobs
from forebay_api.openai.generation import GenerationBody
from forebay_contracts.wire.frames import Delta, FinishedChoice, TokenLogprob, TopLogprob
from forebay_contracts.wire.request import InferenceRequest


class CompletionFormat(StreamFormat):
    """`text_completion`, streamed and whole."""

    _prefix = "cmpl"
    _whole_object = _chunk_object = "text_completion"
    _prompt_in_choice = True

    def __init__(self, request: InferenceRequest, body: GenerationBody) -> None:
        super().__init__(request, body)
        self._count = request.sampling.logprobs
        self._logprobs: defaultdict[int, Logprobs] = defaultdict(lambda: Logprobs(self._count or 0))

    def chunk(self, delta: Delta) -> bytes:
        """Text; the prompt's, if it is echoed."""
        told = self._told(delta) if self._request.return_prompt else {}
        shown = self._shown_logprobs([delta])
        if not (delta.text or shown or told):
            return b""
        logprobs = self._logprobs[delta.index].next(shown) if shown else None
        return self._event([_choice(delta.index, delta.text, logprobs=logprobs) | told])

    def _shown_logprobs(self, deltas: list[Delta]) -> tuple[TokenLogprob, ...]:
        if self._count is None:
            return ()
        return joined_logprobs(delta for delta in deltas if self._request.echo or not delta.prompt)

    def _last_chunk(self, choice: FinishedChoice) -> dict[str, Any]:
        return _choice(choice.index, "", finish_reason=choice.finish_reason)

    def _whole_choice(self, choice: FinishedChoice, deltas: list[Delta]) -> dict[str, Any]:
        text, logprobs = "".join(delta.text for delta in deltas), self._shown_logprobs(deltas)
        shown = Logprobs(self._count or 0).next(logprobs) if logprobs else None
        return _choice(choice.index, text, shown, choice.finish_reason)


def _choice(
    index: int, text: str, logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish_reason}


class Logprobs:
    """The logprobs objects of one choice, whose tokens come in one or more pieces, with `count` alternatives."""

    def __init__(self, count: int) -> None:
        self._count = count
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
            "top_logprobs": [self._top(one) for one in logprobs],
            "text_offset": offsets,
        }

    def _top(self, one: TokenLogprob) -> dict[str, float | None] | None:
        if one.logprob is None:
            return None
        return {_shown(other): other.logprob for other in (*one.top[: self._count], one)}


def _shown(one: TopLogprob) -> str:
    """A token's text or, if it is only a part of a character, its bytes."""
    if one.raw is None:
        return one.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in one.raw)
