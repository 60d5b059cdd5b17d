"""One choice of an answer: its tokens, its text, and when it is at its end."""

from collections.abc import Callable, Sequence

from forebay_contracts.messages import TokenLogprob, TopLogprob
from forebay_inference.engine.protocol import Tokens
from forebay_inference.engine.transformers.batch import SequenceInBatch, Step
from forebay_inference.engine.transformers.sampling import ChosenLogprob
from forebay_inference.engine.transformers.text import ChoiceText


class Choice:
    """Follows one sequence on the event loop.

    `limit` is the most tokens that it may have; `finish_reason` is None until its end.
    """

    def __init__(
        self,
        index: int,
        decode: Callable[[Sequence[int]], str],
        stops: Sequence[str],
        end_tokens: frozenset[int],
        limit: int,
    ) -> None:
        self.index = index
        self.limit = limit
        self.end_tokens = end_tokens
        self.tokens: list[int] = []
        self.finish_reason: str | None = "length" if limit == 0 else None
        self.sequence: SequenceInBatch | None = None
        self._decode = decode
        self._text = ChoiceText(decode, stops)

    def replay(self, tokens: Sequence[int]) -> None:
        """Take `tokens` as generated and shown already."""
        for token in tokens:
            self._push(token)

    def advance(self, step: Step) -> Tokens | None:
        """The event of one step, or None where it brings nothing. Sets `finish_reason` at the end."""
        taken: list[int] = []
        text = ""
        for token in step.tokens:
            if self.finish_reason is not None:
                break
            text += self._push(token)
            taken.append(token)
        if not taken and not text:
            return None
        logprobs = tuple(self._logprob(chosen) for chosen in step.logprobs if chosen.token not in self.end_tokens)
        return Tokens(self.index, tuple(taken), text, logprobs)

    def _push(self, token: int) -> str:
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
        top = tuple(TopLogprob(token=token, text=self._decode([token]), logprob=value) for token, value in chosen.top)
        return TokenLogprob(token=chosen.token, text=self._decode([chosen.token]), logprob=chosen.logprob, top=top)
