"""One choice of an answer: its tokens, its text, and when it is at its end."""

from collections.abc import Callable, Sequence
from typing import Any

from forebay_contracts.wire.frames import TokenLogprob, TopLogprob
from forebay_inference.engine.protocol import Tokens
from forebay_inference.engine.text.detokenizer import REPLACEMENT, ChoiceText
from forebay_inference.engine.text.tool_calls import ToolParser
from forebay_inference.engine.transformers.batch import SequenceInBatch, Step
from forebay_inference.engine.transformers.sampling import ChosenLogprob


class Choice:
    """Follows one sequence on the event loop.

    `bytes_of` gives the bytes of a token. `limit` is the most tokens that it may have; `finish_reason` is None
    until its end. `echo` goes before the text of the first token.
    """

    def __init__(
        self,
        index: int,
        decode: Callable[[Sequence[int]], str],
        bytes_of: Callable[[int], bytes],
        stops: Sequence[str],
        end_tokens: frozenset[int],
        limit: int,
        parser: ToolParser | None = None,
        echo: str = "",
    ) -> None:
        self.index = index
        self.limit = limit
        self.end_tokens = end_tokens
        self.tokens: list[int] = []
        self.finish_reason: str | None = "length" if limit == 0 else None
        self.sequence: SequenceInBatch | None = None
        self._decode = decode
        self._bytes_of = bytes_of
        self._text = ChoiceText(decode, stops)
        self._parser = parser
        self._echo = echo

    def replay(self, tokens: Sequence[int]) -> None:
        """Take `tokens` as generated and shown already, with what goes before them."""
        for token in tokens:
            self._show(self._push(token))

    def advance(self, step: Step) -> Tokens | None:
        """The event of one step, or None where it brings nothing. Sets `finish_reason` at the end."""
        taken: list[int] = []
        text = ""
        for token in step.tokens:
            if self.finish_reason is not None:
                break
            text += self._push(token)
            taken.append(token)
        if not taken:
            return None
        text, calls = self._show(text)
        logprobs = tuple(self._logprob(chosen) for chosen in step.logprobs if chosen.token not in self.end_tokens)
        return Tokens(self.index, tuple(taken), text, logprobs, tuple(calls))

    def _show(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """Text and tool calls of what may be shown now; sets the finish reason of an answer that calls tools."""
        if self._parser is None:
            return text, []
        content, calls = self._parser.push(text)
        if self.finish_reason is not None:
            content += self._parser.flush()
            if self._parser.calls and self.finish_reason == "stop":
                self.finish_reason = "tool_calls"
        return content, calls

    def _push(self, token: int) -> str:
        echo, self._echo = self._echo, ""
        return echo + self._push_token(token)

    def _push_token(self, token: int) -> str:
        self.tokens.append(token)
        if token in self.end_tokens:
            self.finish_reason = "stop"
            return self._text.flush()
        text = self._text.push(token)
        if self._text.stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.limit:
            self.finish_reason = "length"
            text += self._text.flush()
            if self._text.stopped:
                self.finish_reason = "stop"
        return text

    def _logprob(self, chosen: ChosenLogprob) -> TokenLogprob:
        top = tuple(TopLogprob(logprob=value, **self._token(token)) for token, value in chosen.top)
        return TokenLogprob(logprob=chosen.logprob, top=top, **self._token(chosen.token))

    def _token(self, token: int) -> dict[str, Any]:
        text = self._decode([token])
        raw = tuple(self._bytes_of(token)) if REPLACEMENT in text else None
        return {"token": token, "text": text, "raw": raw}
